"""What each stage of a plan costs: seconds, bytes on disk, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradsift.commands.plan.probe import Rates
from gradsift.commands.select.constraints import Constraints
from gradsift.commands.select.null import draws_for
from gradsift.rules import blocks, kmeans
from gradsift.signals.backends import through_curvature
from gradsift.signals.curvature import exact
from gradsift.stages import curvature, tuned
from gradsift.stages.pipeline import Pipeline
from gradsift.stages.recipe import Recipe
from gradsift.store.rows import HEADER
from gradsift.types import Selector, Signal, counted


@dataclass(frozen=True)
class StageCost:
    """One stage to come: `seconds` and `bytes` are estimates, 0 where it is there already."""

    stage: str
    label: str
    digest: str
    reused: bool
    rows: int
    tokens: int
    bytes: int
    seconds: float


# a multiply-add of a matrix and one row against one of two matrices (bench/scale.py): the matrix is
# read for every pick
MATCHING = 16


OVERLAP = 4e-4  # seconds to look for a row of 200 words in test sets


CHARTS = 100_000_000  # bytes that the renderer of the report's charts takes, however few they show


SHARD_META = 17  # bytes of norms, losses, scales, tokens and code per row


def of_target(pipeline: Pipeline, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The stages that are others toward another target: they read it, or what is made of it."""
    read = {pipeline.sides["target"].digest}
    found = []
    for recipe in recipes:
        if read & set(recipe.inputs.values()):
            read.add(recipe.digest)
            found.append(recipe)
    return found


def null_cost(
    pipeline: Pipeline,
    selector: Selector,
    recipes: Sequence[Recipe],
    tokens: Mapping[str, int],
    rates: Rates,
    choosing: float,
) -> StageCost:
    """The cost of the null targets: what reads a target once more for each draw, toward as many
    rows of the pool; `choosing`: seconds of the method's rule.
    """
    draws, n = draws_for(selector), len(pipeline.sides["pool"])
    drawn = len(pipeline.sides["target"])
    theirs = {**tokens, "target": tokens["pool"] * drawn // max(n, 1)}
    each = [
        stage_cost(pipeline, recipe, theirs, rates, left=1.0)
        for recipe in of_target(pipeline, recipes)
    ]
    return StageCost(
        "null target",
        f"{draws} x {drawn:,} pool rows",
        "",
        False,
        draws * drawn,
        draws * theirs["target"],
        draws * sum(stage.bytes for stage in each),
        draws * sum(stage.seconds for stage in each) + (draws + 1) * choosing,
    )


def stage_cost(
    pipeline: Pipeline,
    recipe: Recipe,
    tokens: Mapping[str, int],
    rates: Rates,
    left: float | None = None,
) -> StageCost:
    """The cost of what is left to make of a stage: the share `left`, or what is not there yet."""
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
    elif recipe.stage == "bm25":
        m = len(pipeline.sides["target"])
        label, bytes_, seconds = "texts", 4 * rows * m, rows * (1e-4 + m * 5e-8)
    elif recipe.stage == "tuned":
        label = str(recipe.config["group"])
        shown = tuned.steps_on(pipeline, label) * pipeline.config.tuning.batch_size
        trained = shown * tokens["target"] / max(len(pipeline.sides["target"]), 1)
        bytes_, seconds = 4 * rows, trained / rates.train + n / rates.forward
    elif recipe.stage == "loss":
        label, bytes_, seconds = "base model", 4 * rows, n / rates.forward
    left = remaining(pipeline, recipe) if left is None else left
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


def remaining(pipeline: Pipeline, recipe: Recipe) -> float:
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
    steps = settings.steps_for(share, rows, batch)
    return (
        f"{counted(share, 'row')}, {counted(steps, 'step')} of {batch}",
        steps * batch * tokens / max(rows, 1),
    )


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
    n = len(pipeline.sides["pool"])
    clusters = _clusters(selector, n, rows)
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
        counted(rows, "row"),
        "",
        False,
        n,
        0,
        int(rows * mean_bytes + 24 * n + 1_200_000),
        seconds,
    )


def _clusters(selector: Selector, n: int, rows: int) -> int:
    """How many clusters a method makes of n rows to choose `rows`; 0 for one that makes none."""
    settled = getattr(selector, "settled", None)
    return getattr(selector, "clusters", 0) if settled is None else settled(n, rows)


def screening_seconds(pipeline: Pipeline, limits: Constraints, rates: Rates) -> float:
    """Seconds that the constraints take before the method chooses: the cosine of every pair of
    rows, every text against the test sets.
    """
    n = len(pipeline.sides["pool"])
    pairs = 0.0 if limits.near is None else n * n / 2 * _near_width(limits, rates) / rates.multiply
    return pairs + (0.0 if limits.tests is None else n * OVERLAP)


def _near_width(limits: Constraints, rates: Rates) -> int:
    """Numbers in a row that near duplicates are found by."""
    return rates.dim if limits.near_by == "rows" else rates.hidden


def peak_bytes(pipeline: Pipeline, selector: Selector, rates: Rates, limits: Constraints) -> int:
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
