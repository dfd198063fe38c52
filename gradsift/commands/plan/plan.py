"""`gradsift plan`: what a selection would run and cost, before it runs. Writes nothing; measures
for a few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.commands import budget as budgets
from gradsift.commands.plan.costs import (
    StageCost,
    null_cost,
    of_target,
    peak_bytes,
    remaining,
    screening_seconds,
    select_cost,
    stage_cost,
)
from gradsift.commands.plan.probe import probe
from gradsift.commands.plan.ray import Spread, spread
from gradsift.commands.preflight import Inputs, check_budget, check_selection
from gradsift.commands.select.constraints import Constraints
from gradsift.commands.select.select import limits_of, select_recipe
from gradsift.commands.session import opened
from gradsift.compute import machine
from gradsift.compute.progress import Progress, duration, silent
from gradsift.data.encode import EncodedRows, encode
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.types import Selector, counted

SAMPLE = 2000  # rows that are encoded to learn token counts, where the encoding is not there yet


@dataclass(frozen=True)
class Plan:
    """The stages of a selection with their cost. `read`, `dropped`, `usable`: pool rows; `tokens`
    of the pool; totals over what is not there yet; `warnings`: of the method, at so many rows.
    """

    method: str
    read: int
    dropped: int
    usable: int
    budget: int
    tokens: int
    stages: list[StageCost]
    bytes: int
    seconds: float
    peak_bytes: int
    spread: Spread | None = None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        lines = [
            f"rows     {self.read:,} read, {self.dropped:,} quarantined, {self.usable:,} usable,"
            f" {self.budget:,} to choose, {counted(self.tokens, 'token')}"
        ]
        for stage in self.stages:
            cost = (
                "there already"
                if stage.reused
                else f"{duration(stage.seconds):>12}  {stage.bytes / 1e6:>10,.1f} MB"
            )
            lines.append(f"{stage.stage:<10} {stage.label:<44} {cost}")
        lines.append(
            f"total    {duration(self.seconds)}, {self.bytes / 1e6:,.1f} MB on disk,"
            f" {self.peak_bytes / 1e6:,.0f} MB of memory at the most"
        )
        lines += [] if self.spread is None else [self.spread.line()]
        return "\n".join([*lines, *(f"warning  {text}" for text in self.warnings)])


def plan(
    method: str,
    *,
    pool: Sequence[str | Path] | str | Path,
    budget: str | int | float,
    run: str | Path,
    model: str | None = None,
    target: Sequence[str | Path] | str | Path = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    allow_short: bool = False,
    constraints: Mapping[str, Any] | None = None,
    null: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """The cost of `select` with the same arguments. Nothing is written; the model is loaded and run
    on a few dozen rows. `peak_bytes` counts from what this process already holds, so a plan made in
    a fresh process (as the command is) says what a fresh process will hold.

    Errors as `selection.select`.
    """
    inputs = Inputs(run, pool, target, model, settings, pool_group, target_group, warmup_from)
    selector, wanted = check_selection(
        method,
        inputs,
        budget=budget,
        options=options,
        allow_short=allow_short,
        null=null,
        constraints=constraints,
    )
    machine.forget_peak()
    with opened(inputs, progress=progress, keep=False) as pipeline:
        limits = limits_of(constraints or {}, pipeline.config, progress or silent())
        limits.check(pipeline.sides["pool"])
        check_budget(wanted, pipeline.sides["pool"], allow_short)
        *stages, selection = stage_recipes(pipeline, method, selector, wanted, limits, seed, null)
        return _plan(pipeline, method, selector, wanted, limits, stages, selection, null)


def stage_recipes(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    seed: int,
    null: bool = False,
) -> list[Recipe]:
    """Every stage that `select` takes with these arguments, in the order it makes them; the
    selection itself is the last.

    Computes nothing and loads no model. Raises MismatchError, UserError for settings of the run
    that the method cannot work with.
    """
    stages = pipeline.recipes(selector.needs() | limits.needs())
    selection = select_recipe(pipeline, method, selector, wanted, limits, seed, null=null)
    return [*stages, selection]


def _plan(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    recipes: Sequence[Recipe],
    selection: Recipe,
    null: bool,
) -> Plan:
    needs = selector.needs() | limits.needs()
    encoded = {side: _encoded(pipeline, side) for side in pipeline.sides}
    todo = {recipe.stage for recipe in recipes if remaining(pipeline, recipe)}
    null = null and not pipeline.stored(selection)
    if null:  # toward the drawn rows, what reads a target is done again
        todo |= {recipe.stage for recipe in of_target(pipeline, recipes)}
    rates = probe(
        pipeline,
        encoded["pool"][0],
        needs,
        todo if pipeline.warmup_from is None else todo - {"warmup"},
    )
    tokens = {side: int(rows.lengths.sum() * scale) for side, (rows, scale) in encoded.items()}
    stages = [stage_cost(pipeline, recipe, tokens, rates) for recipe in recipes]
    candidates = pipeline.sides["pool"]
    if wanted.unit == "rows":
        rows = min(wanted.rows(candidates.funnel["read"]), len(candidates))
    else:  # at the pool's mean length
        mean = (
            encoded["pool"][0].lengths if wanted.unit == "tokens" else encoded["pool"][0].supervised
        ).mean()
        rows = min(len(candidates), int(wanted.tokens(int(mean * len(candidates))) / max(mean, 1)))
    if pipeline.stored(selection):
        stages.append(
            StageCost(
                "select",
                counted(rows, "row"),
                selection.digest[:12],
                True,
                len(candidates),
                0,
                0,
                0.0,
            )
        )
    else:
        chosen = select_cost(pipeline, selector, rows, rates)
        seconds = chosen.seconds + screening_seconds(pipeline, limits, rates)
        stages.append(replace(chosen, digest=selection.digest[:12], seconds=seconds))
        if null:
            stages.append(null_cost(pipeline, selector, recipes, tokens, rates, chosen.seconds))
    over = spread(pipeline, stages, rates)
    return Plan(
        method=method,
        read=candidates.funnel["read"],
        dropped=len(candidates.dropped),
        usable=len(candidates),
        budget=rows,
        tokens=tokens["pool"],
        stages=stages,
        bytes=sum(stage.bytes for stage in stages),
        seconds=sum(stage.seconds for stage in stages) if over is None else over.seconds,
        peak_bytes=peak_bytes(pipeline, selector, rates, limits),
        spread=over,
        warnings=tuple(getattr(selector, "notices", lambda n, budget: [])(len(candidates), rows)),
    )


def _encoded(pipeline: Pipeline, side: str) -> tuple[EncodedRows, float]:
    """Encoded rows and by how much they must be multiplied to stand for the whole side: the stored
    encoding, or that of a sample.
    """
    there = pipeline.stored(pipeline.encode_recipe(side))
    if there is not None:
        return EncodedRows.load(there.path), 1.0
    rows = pipeline.sides[side]
    sample = (
        rows
        if len(rows) <= SAMPLE
        else rows.take(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))
    )
    return encode(sample, pipeline.tokenizer, pipeline.config.encode), len(rows) / len(sample)
