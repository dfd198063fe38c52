"""The main job: pool in, the rows worth training on out, with a report. One call, resumable at any
point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradsift import methods
from gradsift.commands import budget as budgets
from gradsift.commands.preflight import Inputs, as_list, check_budget, check_selection, read_side
from gradsift.commands.select import outputs
from gradsift.commands.select.choose import choose
from gradsift.commands.select.constraints import Constraints, screen
from gradsift.commands.select.constraints import build as build_constraints
from gradsift.commands.select.explain import report_data
from gradsift.commands.select.mix import DRAWN
from gradsift.commands.select.null import against_null, draws_for
from gradsift.commands.select.result import Chosen
from gradsift.commands.session import deliver, opened
from gradsift.compute.progress import Progress, silent
from gradsift.config import Config
from gradsift.data.files import container, converted
from gradsift.report.agreement import matrix
from gradsift.report.write import write_report
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe, Timing
from gradsift.store.artifact import Artifact
from gradsift.store.tensors import file_hash, write_tensors
from gradsift.types import Selector, Subset


@dataclass(frozen=True)
class Selection:
    """A finished selection: `folder` holds its files, `indices` [k] are pool rows in pick order,
    `ids` their ids.
    """

    method: str
    folder: Path
    subset_path: Path
    indices: np.ndarray
    ids: list[str]
    asked: int
    read: int
    timings: list[Timing]
    warnings: list[str]
    funnel: dict[str, int]
    converted: str | None = None
    null: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def summary(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "selected": len(self),
            "asked": self.asked,
            "funnel": self.funnel,
            "subset": str(self.subset_path),
            "converted": self.converted,
            "report": str(self.report),
            "folder": str(self.folder),
            "stages": [vars(timing) for timing in self.timings],
            "warnings": self.warnings,
        }

    def lines(self) -> list[str]:
        funnel = ", ".join(f"{count:,} {name}" for name, count in self.funnel.items())
        bad = (
            f" (each in {self.folder / 'dropped.jsonl'})"
            if any(name.startswith(("quarantined:", "not encoded:")) for name in self.funnel)
            else ""
        )
        made = [
            f"{timing.stage} {timing.seconds:.1f} s" for timing in self.timings if not timing.reused
        ]
        reused = sum(timing.reused for timing in self.timings)
        return [
            f"rows      {funnel}{bad}",
            (
                f"selected  {len(self):,} ({len(self) / max(self.read, 1):.2%} of the rows read)"
                f" with {self.method}"
            ),
            (
                "stages   "
                f" {', '.join(made) or 'nothing to make'}{f'; {reused} reused' if reused else ''}"
            ),
            *([f"null      {self.null.removeprefix('Null target: ')}"] if self.null else []),
            *[f"warning   {text}" for text in self.warnings],
            f"report    {self.report}",
            f"subset    {self.subset_path}{f' ({self.converted})' if self.converted else ''}",
        ]


def select(
    method: str,
    *,
    pool: Sequence[str | Path] | str | Path,
    budget: str | int | float,
    run: str | Path,
    model: str | None = None,
    target: Sequence[str | Path] | str | Path = (),
    out: str | Path | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    pool_group: str | None = None,
    target_group: str | None = None,
    warmup_from: str | Path | None = None,
    allow_short: bool = False,
    add_scores: bool = False,
    constraints: Mapping[str, Any] | None = None,
    null: bool = False,
    progress: Progress | None = None,
) -> Selection:
    """Choose rows of `pool` with a method of METHODS, reusing whatever the folder `run` already
    holds.

    pool, target: files as `[NAME=]FILE` or hf:NAME (see docs/formats.md). budget: "5%", 0.05, a
    count or "10M-tokens". settings: sections of Config that differ from the run's (or, in a new
    run, from the defaults). options: the method's hyper-parameters. constraints: arguments of
    `gradsift.commands.select.constraints.build`, test sets as files, applied to any method
    (docs/constraints.md). null: also say how far the picks' scores stand above those toward rows
    drawn from the pool, for a method with a target. Killed at any point, the same call goes on
    where it stopped and ends with the same subset.

    Raises UserError (a wrong name, option, budget or combination), DataError (unusable input),
    ResourceError (disk, memory), IntegrityError (damaged work in `run`), Interrupted (a signal;
    resumable).
    """
    inputs = Inputs(run, pool, target, model, settings, pool_group, target_group, warmup_from)
    selector, wanted = check_selection(
        method,
        inputs,
        budget=budget,
        options=options,
        out=out,
        allow_short=allow_short,
        null=null,
        constraints=constraints,
    )
    with opened(inputs, progress=progress) as pipeline:
        limits = limits_of(constraints or {}, pipeline.config, progress or silent())
        limits.check(pipeline.sides["pool"])
        check_budget(wanted, pipeline.sides["pool"], allow_short)
        return select_in(
            pipeline, method, selector, wanted, limits, seed, allow_short, add_scores, out, null
        )


def limits_of(given: Mapping[str, Any], config: Config, progress: Progress) -> Constraints:
    """Constraints as asked for; `decontaminate` names files, read as targets are. Raises
    ConfigError, UserError, DataError.
    """
    tests = {
        str(file): read_side([file], config, None, progress, "target")
        for file in as_list(given.get("decontaminate") or ())
    }
    return build_constraints(**{**given, "decontaminate": tests})


def select_in(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    seed: int,
    allow_short: bool = False,
    add_scores: bool = False,
    out: str | Path | None = None,
    null: bool = False,
) -> Selection:
    """A selection in a run that is already open and locked; see `select`."""
    needs, read = selector.needs(), pipeline.sides["pool"].funnel["read"]
    recipes = pipeline.recipes(needs | limits.needs())

    def fill(artifact: Artifact) -> None:
        signals, kept = pipeline.signals(needs | limits.needs())
        pool, lengths = pipeline.sides["pool"], pipeline.encoded("pool").lengths
        left = screen(limits, pool, signals, kept)
        subset = choose(
            selector,
            signals,
            left,
            kept,
            limits,
            wanted,
            read=read,
            lengths=lengths,
            seed=seed,
            allow_short=allow_short,
        )
        asked = wanted.rows(read) if wanted.unit == "rows" else len(subset)
        evidence = pipeline.evidence(needs, recipes)
        whole = over_pool(subset, kept, len(pool))
        target = pipeline.sides.get("target")
        told = against_null(pipeline, selector, signals, kept, left, len(subset)) if null else None
        _write(
            pipeline,
            artifact,
            Chosen(
                pool, target, evidence, method, selector, whole, asked, seed, left, wanted, told
            ),
            add_scores,
        )

    chosen = select_recipe(pipeline, method, selector, wanted, limits, seed, add_scores, null)
    if pipeline.stored(chosen) and any(pipeline.unfinished(recipe) for recipe in recipes):
        # a repair took something away that the selection was made from
        pipeline.signals(needs | limits.needs())
    artifact = pipeline.make(chosen, fill)
    pool, target = pipeline.sides["pool"], pipeline.sides.get("target")
    indices = artifact.tensors("subset.safetensors")["indices"].numpy()
    name = next(name for name in artifact.manifest["files"] if name.startswith("selected."))
    path = deliver(artifact, name, out)
    return Selection(
        method=method,
        folder=artifact.path,
        subset_path=path,
        indices=indices,
        ids=[pool.ids[int(i)] for i in indices],
        asked=artifact.manifest["counts"]["asked"],
        read=read,
        timings=pipeline.timings,
        warnings=[
            *pool.warnings,
            *([f"target: {text}" for text in target.warnings] if target is not None else []),
            *pipeline.run.mended(),
            *artifact.manifest.get("extra", {}).get("warnings", []),
        ],
        funnel={**pool.funnel, **pipeline.encoded("pool").funnel()},
        converted=None if out is None else converted([container(name)[0]], out),
        null=artifact.manifest.get("extra", {}).get("null", {}).get("text", ""),
    )


def select_recipe(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    seed: int,
    add_scores: bool = False,
    null: bool = False,
) -> Recipe:
    """The recipe of a selection: the method with its options, the budget in rows, the constraints,
    and the stages it reads.
    """
    config = {
        "method": method,
        "options": methods.options_of(selector),
        "budget": wanted.canonical(pipeline.sides["pool"].funnel["read"]),
    }
    config |= {
        "seed": seed,
        "add_scores": add_scores,
        # a method may share a share out among clusters otherwise than as many rows
        **({} if wanted.share is None else {"share": str(wanted.share)}),
        **({"constraints": limits.canonical()} if limits.canonical() else {}),
        **({"null": draws_for(selector)} if null else {}),
    }
    recipes = pipeline.recipes(selector.needs() | limits.needs())
    return Recipe(
        "select",
        config,
        {f"{i:02d}-{recipe.stage}": recipe.digest for i, recipe in enumerate(recipes)},
    )


def over_pool(subset: Subset, kept: np.ndarray, n: int) -> Subset:
    """A subset of the usable rows as a subset of the pool: indices mapped, per-row columns padded
    (NaN, -1 or None where not usable).
    """
    notes = {}
    for name, value in subset.notes.items():
        column = np.asarray(value) if not isinstance(value, (str, dict)) else None
        if column is None or column.ndim != 1 or len(column) != len(kept):
            notes[name] = value
            continue
        empty = np.nan if column.dtype.kind == "f" else None if column.dtype == object else -1
        full = np.full(n, empty, dtype=column.dtype)
        full[kept] = column
        notes[name] = full
    return replace(subset, indices=kept[np.asarray(subset.indices, dtype=np.int64)], notes=notes)


def _write(pipeline: Pipeline, artifact: Artifact, chosen: Chosen, add_scores: bool) -> None:
    subset, pool, config = chosen.subset, chosen.pool, pipeline.config
    written = outputs.write_outputs(
        artifact.path,
        pool,
        subset,
        columns=chosen.columns(),
        add_scores=add_scores,
        model=config.model.name,
        max_length=config.encode.max_length,
        template=config.encode.template,
        tool_calls=config.encode.tool_calls,
        system=config.encode.system,
        say=pipeline.progress.note,
        left_out=chosen.left_out(),
    )
    tensors = {"indices": torch.as_tensor(np.asarray(subset.indices))}
    for name in ("gains", "weights"):
        if getattr(subset, name) is not None:
            tensors[name] = torch.as_tensor(np.asarray(getattr(subset, name), dtype=np.float64))
    files = {path.relative_to(artifact.path).as_posix(): file_hash(path) for path in written}
    files["subset.safetensors"] = write_tensors(
        artifact.path / "subset.safetensors", tensors, {"recipe": artifact.digest}
    )
    # The report is not hashed: it shows clocks, and `gradsift report` may write it anew.
    for fault in pipeline.run.trusted()[1]:
        pipeline.progress.note(f"not needed and not read: {fault}")
    agreement = matrix(pipeline.run, artifact)
    data = report_data(chosen, pipeline.timings, pipeline.run.commands[-1], agreement)
    write_report(data, artifact.path)
    # in the terminal too
    warnings = [line.text.removesuffix(".") for line in data.verdict if line.level == "warn"]
    numbers = {
        name: value for name, value in subset.notes.items() if isinstance(value, (int, float))
    }
    counts = {"selected": len(subset), "asked": chosen.asked, "read": pool.funnel["read"]}
    if DRAWN in subset.notes:
        counts["drawn"] = int(chosen.drawn.sum())
    extra = {"warnings": warnings, "notes": numbers}
    if chosen.null is not None:
        extra["null"] = {**chosen.null.plain(), "text": chosen.null.text()}
    artifact.finish(files=files, counts=counts, extra=extra)
