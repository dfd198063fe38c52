"""`gradsift plan`: what a selection would run and cost, before it runs. Writes nothing; measures
for a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from gradsift.commands import budget as budgets
from gradsift.commands.check import Inputs, check_budget, check_selection
from gradsift.commands.plan.costs import Rates, StageCost
from gradsift.commands.plan.ray import Spread, spread
from gradsift.commands.select.constraints import Constraints
from gradsift.commands.select.select import limits_of, select_recipe
from gradsift.commands.session import opened
from gradsift.compute import machine
from gradsift.compute.batches import pad_batch, token_batches
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.progress import Progress, duration, silent
from gradsift.config import WarmupSettings
from gradsift.data.encode import EncodedRows, encode
from gradsift.gradients.adam import Adam
from gradsift.gradients.passes import extract, output_dim
from gradsift.model.layers import tracked_modules
from gradsift.model.lora import attach_lora
from gradsift.model.losses import row_losses
from gradsift.model.warmup import plan_warmup
from gradsift.rules import blocks, kmeans
from gradsift.signals.backends import through_curvature
from gradsift.signals.curvature import exact
from gradsift.signals.embeddings import hidden_size
from gradsift.stages import curvature, tuned
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.rows import HEADER
from gradsift.types import IGNORE, Selector, Signal

# a multiply-add of a matrix and one row against one of two matrices (bench/scale.py): the matrix is
# read for every pick
MATCHING = 16
SAMPLE = 2000  # rows that are encoded to learn token counts, where the encoding is not there yet
PROBE = 48  # rows whose gradient is taken to learn the machine's speed
OVERLAP = 4e-4  # seconds to look for a row of 200 words in test sets
CHARTS = 100_000_000  # bytes that the renderer of the report's charts takes, however few they show
# What a stage does with the model.
TRAINING = {"warmup", "difficulty", "tuned"}
GRADIENTS = {"gradients", "curvature", "influence"}
FORWARD = {"loss", "ifd", "embeddings", "tuned"}
ANY = frozenset(TRAINING | GRADIENTS | FORWARD)
SHARD_META = 17  # bytes of norms, losses, scales, tokens and code per row


@dataclass(frozen=True)
class Plan:
    """The stages of a selection with their cost. `read`, `dropped`, `usable`: pool rows; `tokens`
    of the pool; totals over what is not there yet.
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        lines = [
            f"rows     {self.read:,} read, {self.dropped:,} quarantined, {self.usable:,} usable,"
            f" {self.budget:,} to choose, {self.tokens:,} tokens"
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
        return "\n".join(lines if self.spread is None else [*lines, self.spread.line()])


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
    progress: Progress | None = None,
) -> Plan:
    """The cost of `select` with the same arguments. Nothing is written; the model is loaded and run
    on a few dozen rows. `peak_bytes` counts from what this process already holds, so a plan made in
    a fresh process (as the command is) says what a fresh process will hold.

    Errors as `selection.select`.
    """
    inputs = Inputs(run, pool, target, model, settings, pool_group, target_group, warmup_from)
    selector, wanted = check_selection(
        method, inputs, budget=budget, options=options, allow_short=allow_short
    )
    machine.forget_peak()
    with opened(inputs, progress=progress, keep=False) as pipeline:
        limits = limits_of(constraints or {}, pipeline.config, progress or silent())
        limits.check(pipeline.sides["pool"])
        check_budget(wanted, pipeline.sides["pool"], allow_short)
        *stages, selection = stage_recipes(pipeline, method, selector, wanted, limits, seed)
        return _plan(pipeline, method, selector, wanted, limits, stages, selection)


def stage_recipes(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    seed: int,
) -> list[Recipe]:
    """Every stage that `select` takes with these arguments, in the order it makes them; the
    selection itself is the last.

    Computes nothing and loads no model. Raises MismatchError, UserError for settings of the run
    that the method cannot work with.
    """
    stages = pipeline.recipes(selector.needs() | limits.needs())
    return [*stages, select_recipe(pipeline, method, selector, wanted, limits, seed)]


def _plan(
    pipeline: Pipeline,
    method: str,
    selector: Selector,
    wanted: budgets.Budget,
    limits: Constraints,
    recipes: Sequence[Recipe],
    selection: Recipe,
) -> Plan:
    needs = selector.needs() | limits.needs()
    encoded = {side: _encoded(pipeline, side) for side in pipeline.sides}
    todo = {recipe.stage for recipe in recipes if _left(pipeline, recipe)}
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
                "select", f"{rows:,} rows", selection.digest[:12], True, len(candidates), 0, 0, 0.0
            )
        )
    else:
        chosen = select_cost(pipeline, selector, rows, rates)
        seconds = chosen.seconds + _screening(pipeline, limits, rates)
        stages.append(replace(chosen, digest=selection.digest[:12], seconds=seconds))
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
        peak_bytes=_peak(pipeline, selector, rates, limits),
        spread=over,
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


def probe(
    pipeline: Pipeline, encoded: EncodedRows, needs: Collection[Signal], todo: Collection[str] = ANY
) -> Rates:
    """Runs the model as the stages named in `todo` will (others get a rate of 1), to learn speed
    and memory on this machine: on rows spread over the pool's lengths, and the batches that are the
    largest. Where `needs` names no signal, the model is not loaded.
    """
    started = time.perf_counter()
    encode(
        pipeline.sides["pool"].take(range(min(500, len(pipeline.sides["pool"])))),
        pipeline.tokenizer,
        pipeline.config.encode,
    )
    encode_rate = min(500, len(pipeline.sides["pool"])) / (time.perf_counter() - started)
    a, b = torch.randn(1024, 2048), torch.randn(2048, 128)
    multiply = a.numel() * 128 / min(_timed(lambda: a @ b) for _ in range(5))
    if not needs:
        return Rates(
            1,
            1,
            1,
            encode_rate,
            multiply,
            machine.peak_bytes(),
            machine.used_bytes(),
            0,
            0,
            0,
            0,
            0,
        )
    model = attach_lora(pipeline.load_base(), pipeline.config.warmup.lora)
    settings = pipeline.config.gradients
    modules = None if settings.modules == "lora" else settings.modules
    names = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    train, taken, forward = 1.0, 1.0, 1.0
    if TRAINING & set(todo):
        batches = _micro_batches(encoded, pipeline.config.warmup)
        tokens = sum(len(encoded[i]["input_ids"]) for batch in batches for i in batch)
        train = tokens / _timed(lambda: _pass(model, encoded, batches, pipeline.pad_id))
    rows = [
        encoded[i] for i in _spread_and_largest(encoded, settings.shard_rows, settings.token_budget)
    ]
    tokens = sum(len(row["input_ids"]) for row in rows)
    if GRADIENTS & set(todo):
        adam = None
        if modules is None:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in names.items()}
            adam = Adam(
                zeros, {name: torch.ones_like(parameter) for name, parameter in names.items()}, 1
            )

        def gradients() -> None:
            for start in range(0, len(rows), settings.shard_rows):
                part, options = (
                    rows[start : start + settings.shard_rows],
                    {"transform": adam, "modules": modules},
                )
                for _ in extract(
                    model,
                    part,
                    projection=pipeline.projection,
                    token_budget=settings.token_budget,
                    **options,
                ):
                    pass

        gradients()  # draws the projection's maps, once
        taken = tokens / _timed(gradients)
    if FORWARD & set(todo):
        forward = tokens / _timed(lambda: row_losses(model, rows, pad_id=pipeline.pad_id))
    dim = output_dim(model, pipeline.projection, modules)
    parameters = sum(p.numel() for p in names.values())
    shapes = [
        tuple(cast(Any, module).weight.shape) for module in tracked_modules(model, modules).values()
    ]
    factors, tracked = 4 * sum(r * r + c * c for r, c in shapes), 4 * sum(r * c for r, c in shapes)
    used, peak = machine.used_bytes(), machine.peak_bytes()
    return Rates(
        train,
        taken,
        forward,
        encode_rate,
        multiply,
        peak,
        used,
        dim,
        parameters,
        hidden_size(model),
        factors,
        tracked,
    )


def _spread_and_largest(encoded: EncodedRows, shard_rows: int, token_budget: int) -> list[int]:
    """First the rows of the batch with the most tokens that a shard can give, which takes what a
    stage takes at the most, then rows spread over the lengths.
    """
    usable = np.flatnonzero(encoded.codes == 0)
    shards = [usable[start : start + shard_rows] for start in range(0, len(usable), shard_rows)]
    batches = [
        shard[batch]
        for shard in shards
        for batch in token_batches(encoded.lengths[shard], token_budget)
    ]
    largest = max(batches, key=lambda batch: len(batch) * encoded.lengths[batch].max()).tolist()
    by_length = usable[np.argsort(encoded.lengths[usable], kind="stable")]
    spread = by_length[np.linspace(0, len(by_length) - 1, min(PROBE, len(by_length))).astype(int)]
    return [*largest, *sorted(set(spread.tolist()) - set(largest))]


def _micro_batches(encoded: EncodedRows, settings: WarmupSettings) -> list[list[int]]:
    """The first micro-batches of the warm-up, of `PROBE` rows or a few more, and its largest."""
    planned = plan_warmup(encoded, settings)
    batches = [planned.rows[piece].tolist() for step in planned.steps for piece in step]
    counts = np.cumsum([len(batch) for batch in batches])
    largest = max(batches, key=lambda batch: len(batch) * encoded.lengths[batch].max())
    return [*batches[: int(np.searchsorted(counts, PROBE)) + 1], largest]


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _pass(model: Any, encoded: EncodedRows, batches: list[list[int]], pad_id: int) -> None:
    """Forward and backward, as the warm-up's steps; each in a call of its own, so that nothing of
    it is there when the next one starts.
    """

    def step(batch: list[int]) -> None:
        ids, mask, labels = pad_batch([encoded[i] for i in batch], pad_id)
        kept = labels[:, 1:] != IGNORE
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][kept].float()
        torch.nn.functional.cross_entropy(logits, labels[:, 1:][kept]).backward()

    with quick_layers(model.modules()):
        for batch in batches:
            step(batch)
    model.zero_grad(set_to_none=True)


def stage_cost(
    pipeline: Pipeline, recipe: Recipe, tokens: Mapping[str, int], rates: Rates
) -> StageCost:
    """The cost of what is left to make of a stage."""
    side = _side(pipeline, recipe)
    rows, n, label = len(pipeline.sides[side]), tokens[side], ""
    ids = sum(len(i.encode()) + 4 for i in pipeline.sides[side].ids)
    store = (
        rows
        * (
            rates.dim * (2 if pipeline.config.gradients.store_dtype == "float16" else 1)
            + SHARD_META
        )
        + ids
    )
    bytes_, seconds = 0, 0.0
    if recipe.stage == "encode":
        label, bytes_, seconds = side, 8 * n + 9 * rows, rows / rates.encode_rows
    elif recipe.stage == "warmup":
        label, trained = _warmup_label(pipeline, n, rows)
        bytes_, seconds = pipeline.checkpoint_count * rates.parameters * 12, trained / rates.train
    elif recipe.stage == "gradients":
        label = (
            f"{side}, checkpoint {recipe.config['checkpoint'] + 1}, {recipe.config['transform']}"
        )
        bytes_, seconds = store, n / rates.gradients
    elif recipe.stage == "mean":
        label, bytes_, seconds = side, store, rows * rates.dim * 20 / 1e9
    elif recipe.stage == "curvature":
        fitted = n * min(1.0, recipe.config["fit_rows"] / max(rows, 1))
        label, bytes_, seconds = (
            recipe.config["form"],
            2 * rates.factors + rates.tracked,
            3 * fitted / rates.gradients,
        )
    elif recipe.stage == "influence" and "curvature" in recipe.inputs:
        m = len(pipeline.sides["target"])
        label, bytes_ = str(recipe.config["backend"]), 8 * rows * m
        seconds = n / rates.gradients + rows * m * (rates.tracked / 4) / rates.multiply
    elif recipe.stage == "influence":
        m = len(pipeline.sides["target"])
        label, bytes_ = str(recipe.config["backend"]), 4 * rows * m
        seconds = rows * m * rates.dim * pipeline.checkpoint_count / rates.multiply
    elif recipe.stage == "embeddings":
        label, bytes_, seconds = (
            side,
            rows * (2 * rates.hidden + SHARD_META) + ids,
            n / rates.forward,
        )
    elif recipe.stage == "features":
        label, bytes_, seconds = (
            ", ".join(recipe.config["fields"]),
            4 * rows * len(recipe.config["fields"]),
            rows * 2e-5,
        )
    elif recipe.stage == "difficulty":
        label, trained = _warmup_label(pipeline, n, rows)
        bytes_, seconds = 4 * rows, trained / rates.train
    elif recipe.stage == "ifd":
        label, bytes_, seconds = "base model", 8 * rows, 2 * n / rates.forward
    elif recipe.stage == "ngrams":
        label, bytes_, seconds = "texts", 8 * rows, rows * 1e-4
    elif recipe.stage == "tuned":
        label = str(recipe.config["group"])
        shown = tuned.steps_on(pipeline, label) * pipeline.config.tuning.batch_size
        trained = shown * tokens["target"] / max(len(pipeline.sides["target"]), 1)
        bytes_, seconds = 4 * rows, trained / rates.train + n / rates.forward
    elif recipe.stage == "loss":
        label, bytes_, seconds = "base model", 4 * rows, n / rates.forward
    left = _left(pipeline, recipe)
    return StageCost(
        recipe.stage,
        label,
        recipe.digest[:12],
        left == 0,
        rows,
        n,
        int(left * bytes_),
        left * seconds,
    )


def _left(pipeline: Pipeline, recipe: Recipe) -> float:
    """The share of a stage that has to be made: none of one that is there, but for files that
    `gradsift verify` found damaged. A stage in shards makes just those anew.
    """
    there = pipeline.stored(recipe)
    if there is None:
        return 1.0
    named, files = pipeline.run.named.get(there.path.name, set()), there.manifest["files"]
    if not named:
        return 0.0
    return min(1.0, len(named) / max(1, len(files))) if (there.path / HEADER).exists() else 1.0


def _warmup_label(pipeline: Pipeline, tokens: int, rows: int) -> tuple[str, float]:
    """What the warm-up trains on, in words and in tokens."""
    if pipeline.warmup_from is not None:
        return f"from {pipeline.warmup_from}", 0.0
    settings = pipeline.config.warmup
    share = min(rows, max(settings.min_rows, round(settings.share * rows)))
    batch = settings.batch_size or (16 if rows < 10_000 else 128)
    steps = max(settings.min_steps, int(np.ceil(settings.epochs * share / batch)))
    return f"{share:,} rows, {steps} steps of {batch}", steps * batch * tokens / max(rows, 1)


def _side(pipeline: Pipeline, recipe: Recipe) -> str:
    inputs = set(recipe.inputs.values())
    if "target" in pipeline.sides:
        own = {pipeline.sides["target"].digest, pipeline.encode_recipe("target").digest}
        if recipe.stage in ("encode", "gradients", "embeddings") and inputs & own:
            return "target"
    return "pool"


def select_cost(pipeline: Pipeline, selector: Selector, rows: int, rates: Rates) -> StageCost:
    """k-means, the graph of neighbours, or matching (a row of products for every pick, inside its
    cluster) dominates where a method does it; elsewhere selecting is reading the signals once.
    """
    n, clusters = len(pipeline.sides["pool"]), getattr(selector, "clusters", 0)
    # greedy k-means++ costs about that many passes besides
    steps = getattr(selector, "iterations", 0) + 8
    pairs = n * n / 2 if hasattr(selector, "neighbours") and hasattr(selector, "exact") else 0
    matching = MATCHING * rows * n / max(clusters, 1) if hasattr(selector, "ridge") else 0
    seconds = (
        1.0 + (n * clusters * steps * 2 + pairs + matching) * rates.dim / rates.multiply + n * 2e-5
    )
    mean_bytes = sum(
        pipeline.sides["pool"].source(i)[2] - pipeline.sides["pool"].source(i)[1]
        for i in range(min(n, 200))
    ) / max(min(n, 200), 1)
    return StageCost(
        "select",
        f"{rows:,} rows",
        "",
        False,
        n,
        0,
        int(rows * mean_bytes + 24 * n + 1_200_000),
        seconds,
    )


def _screening(pipeline: Pipeline, limits: Constraints, rates: Rates) -> float:
    """Seconds that the constraints take before the method chooses: the cosine of every pair of
    rows, every text against the test sets.
    """
    n = len(pipeline.sides["pool"])
    pairs = 0.0 if limits.near is None else n * n / 2 * _near_width(limits, rates) / rates.multiply
    return pairs + (0.0 if limits.tests is None else n * OVERLAP)


def _near_width(limits: Constraints, rates: Rates) -> int:
    """Numbers in a row that near duplicates are found by."""
    return rates.dim if limits.near_by == "rows" else rates.hidden


def _peak(pipeline: Pipeline, selector: Selector, rates: Rates, limits: Constraints) -> int:
    """The larger of two: the probe's own peak with a shard being filled and packed; what is used
    when the stages are done, with what choosing holds at once and the drawing of the report's
    charts, both of which take what the stages have freed before they take more.

    Rules read blocks of 2,048 rows as float32. k-means has five of them (the rows, their product,
    the rows that move), a sketch of its sample, and then one cluster's atoms at a time, of which
    the largest is taken to be four times the mean; others read and normalise a block. Near
    duplicates hold every row that is kept.
    """
    repeats = (
        0
        if limits.near is None
        else 4 * (len(pipeline.sides["pool"]) + 2 * blocks.BLOCK) * _near_width(limits, rates)
    )
    if not any(
        isinstance(s, Signal) and s.name in ("rows", "influence")
        for s in selector.needs() | limits.needs()
    ):
        return max(rates.peak_bytes, rates.used_bytes + repeats + CHARTS)
    n, clusters = len(pipeline.sides["pool"]), getattr(selector, "clusters", 0)
    shard = min(pipeline.config.gradients.shard_rows, n) * rates.dim * (4 + 4 + 2)
    block = min(blocks.BLOCK, n) * rates.dim * 4
    choosing = 2 * block
    if clusters:
        sample = min(n, max(min(kmeans.SAMPLE * clusters, kmeans.SAMPLE_MOST), kmeans.SAMPLE_LEAST))
        choosing = (
            5 * block + sample * kmeans.SKETCH * 4 + min(n, 4 * -(-n // clusters)) * rates.dim * 4
        )
    # a pass of the engine takes less than half of what a training step does
    passing = (rates.peak_bytes + rates.used_bytes) // 2
    return max(
        rates.peak_bytes + shard,
        passing + _curved(pipeline, selector, rates),
        rates.used_bytes + max(shard, choosing, repeats) + CHARTS,
    )


def _curved(pipeline: Pipeline, selector: Selector, rates: Rates) -> int:
    """Bytes that influence through the curvature holds beside a pass of the model: factors and
    their eigenvectors, the eigenvalues and their inverse, the targets' whole gradients as far as
    they fit, and pool gradients held back.
    """
    signals = [s for s in selector.needs() if isinstance(s, Signal) and through_curvature(s)]
    if not signals:
        return 0
    grouped = min(curvature.settings(pipeline, s)["target_batch"] for s in signals)
    targets = -(-len(pipeline.sides["target"]) // grouped)
    held = (
        min(exact.HELD // rates.tracked, len(pipeline.sides["pool"])) * rates.tracked
        if targets >= exact.MANY
        else 0
    )
    return 2 * rates.factors + 2 * rates.tracked + min(targets * rates.tracked, exact.MEMORY) + held
