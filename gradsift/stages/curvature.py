"""Influence through the inverse curvature as stages: the curvature fitted on pool rows, then every pool row scored on every target row.

Nothing is projected: the target's gradients are preconditioned and held, the pool's stream past them, shard by shard.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradsift.compute.stopping import Stopping
from gradsift.errors import UserError
from gradsift.signals.backends import backend
from gradsift.signals.curvature.exact import MEMORY, Targets, prepare_targets, rank_agreement
from gradsift.signals.curvature.fit import Fitting
from gradsift.signals.curvature.fitted import Curvature
from gradsift.signals.curvature.kfac import Inverse
from gradsift.stages.checks import check_values
from gradsift.stages.recipe import Recipe
from gradsift.stages.work import FittingWork, ScoreWork
from gradsift.store.artifact import Artifact
from gradsift.store.canonical import recipe_digest
from gradsift.store.partial import FOLDER, Parts
from gradsift.store.provenance import made_on
from gradsift.store.tensors import write_tensors
from gradsift.types import Signal

if TYPE_CHECKING:
    from gradsift.stages.pipeline import Pipeline

AGREE_ROWS, AGREE_TARGETS = 64, 16  # on which low-rank scores are held against those of whole matrices, or as many targets as fit in memory
_FIT = ("fit_rows", "form", "labels", "correct", "seed")


def settings(pipeline: Pipeline, signal: Signal) -> dict[str, Any]:
    """The curvature settings in force: the run's, with what the backend fixes on top."""
    return {**pipeline.config.curvature.canonical(), "correct": True, "drop_last": False, **(backend(str(signal.backend)).curvature or {})}


def curvature_recipe(pipeline: Pipeline, signal: Signal) -> Recipe:
    fitting = {name: settings(pipeline, signal)[name] for name in _FIT}
    gradients = pipeline.config.gradients
    fitting |= {"modules": gradients.modules, "token_budget": gradients.token_budget, "shard_rows": gradients.shard_rows}
    inputs = {"rows": pipeline.encode_recipe("pool").digest, "warmup": pipeline.warmup_recipe().digest}
    return Recipe("curvature", fitting, inputs, pipeline.compute_identity())


def influence_recipe(pipeline: Pipeline, signal: Signal) -> Recipe:
    rest = {name: value for name, value in settings(pipeline, signal).items() if name not in _FIT}
    rest |= {"backend": signal.backend, "checkpoints": "last", "shard_rows": pipeline.config.gradients.shard_rows}
    inputs = {"curvature": curvature_recipe(pipeline, signal).digest}
    inputs |= {side: pipeline.encode_recipe(side).digest for side in pipeline.sides}
    return Recipe("influence", rest, inputs)


def recipes(pipeline: Pipeline, signal: Signal) -> list[Recipe]:
    return [pipeline.warmup_recipe(), curvature_recipe(pipeline, signal), influence_recipe(pipeline, signal)]


def curvature(pipeline: Pipeline, signal: Signal) -> Curvature:
    """The curvature at the last checkpoint over `fit_rows` usable pool rows, drawn with its seed."""
    recipe, chosen = curvature_recipe(pipeline, signal), settings(pipeline, signal)
    at = pipeline.checkpoints()[-1]

    def fill(artifact: Artifact) -> None:
        encoded, ids = pipeline.encoded("pool"), pipeline.sides["pool"].ids
        usable = np.flatnonzero(encoded.codes == 0)
        count = min(len(usable), chosen["fit_rows"])
        rows = np.sort(np.random.default_rng(chosen["seed"]).choice(usable, size=count, replace=False)).tolist()
        gradients = pipeline.config.gradients
        taken, model = [encoded[i] for i in rows], pipeline.model_at(at)
        about = {name: chosen[name] for name in ("form", "labels", "correct", "seed")}
        about |= {"modules": pipeline.modules, "token_budget": gradients.token_budget, "shard_rows": gradients.shard_rows}
        about |= {"ids": [ids[i] for i in rows], "identity": artifact.digest}
        fitting = Fitting(model, taken, store=artifact.path / FOLDER, progress=Stopping(pipeline.progress), **about)
        if pipeline.executor.remote:
            _spread(pipeline, fitting, FittingWork(pipeline.lend(model, at), taken, about))
        fitted = fitting.result()
        if fitting.left_out:
            pipeline.progress.note(
                f"{len(fitting.left_out):,} of the {count:,} rows of the fit do not fit in memory and are left out of it"
            )
        hash_ = fitted.save(artifact.path / "curvature.safetensors")
        counts = {"rows": count - len(fitting.left_out), "parameters": len(fitted.names)}
        artifact.finish(files={"curvature.safetensors": hash_}, counts=counts, extra=fitting.made())
        shutil.rmtree(artifact.path / FOLDER)

    return Curvature.load(pipeline.make(recipe, fill).path / "curvature.safetensors")


def _spread(pipeline: Pipeline, fitting: Fitting, work: FittingWork) -> None:
    """Both passes of a fit, shard by shard, by workers elsewhere; `fitting.result()` then only adds up."""
    for shard, sums in pipeline.executor.map(work, fitting.missing("factors")):
        fitting.factors(shard, sums, made_on(pipeline.executor.gpu))
    if fitting.correct:
        for shard, sums in pipeline.executor.map(replace(work, basis=fitting.basis()), fitting.missing("eigenvalues")):
            fitting.eigenvalues(shard, sums, made_on(pipeline.executor.gpu))


def influence(pipeline: Pipeline, signal: Signal) -> tuple[Tensor, Tensor]:
    """Scores [n, m] at the last checkpoint and which rows have one [n]; the file's "target" [m] is the first row of each target."""
    scores = made(pipeline, signal).tensors("scores.safetensors")["scores"]
    return scores, torch.isfinite(scores).all(dim=1)


def made(pipeline: Pipeline, signal: Signal) -> Artifact:
    """The complete artifact that `influence` reads."""
    if "target" not in pipeline.sides:
        raise UserError("influence needs a target", remedy="Add --target FILE.")
    return pipeline.make(influence_recipe(pipeline, signal), lambda artifact: _score(pipeline, signal, artifact))


def _score(pipeline: Pipeline, signal: Signal, artifact: Artifact) -> None:
    chosen, gradients = settings(pipeline, signal), pipeline.config.gradients
    inverse = curvature(pipeline, signal).inverse(chosen["damping"], chosen["style"], absolute=chosen["absolute"])
    at = pipeline.checkpoints()[-1]
    model = pipeline.model_at(at)
    wanted, pool = pipeline.encoded("target"), pipeline.encoded("pool")
    usable = np.flatnonzero(wanted.codes == 0)
    shared = {"modules": pipeline.modules, "token_budget": gradients.token_budget}
    rows = [wanted[int(i)] for i in usable]
    targets = prepare_targets(
        model,
        rows,
        inverse,
        target_batch=chosen["target_batch"],
        drop_last=chosen["drop_last"],
        rank=chosen["rank"],
        **shared,
    )
    agreement = _agreement(model, pool, rows, targets, inverse, target_batch=chosen["target_batch"], seed=chosen["seed"], **shared)
    # Target rows that did not fit in memory have no column, and another time they may fit.
    parts = Parts(artifact, len(pool), gradients.shard_rows, {"targets": recipe_digest(targets.members)})
    missing = parts.missing()
    tokens = sum(int(pool.lengths[parts.shards[shard]].sum()) for shard in missing)
    pipeline.progress.start(tokens, "tokens", f"influence on {len(targets)} targets, {signal.backend}")
    work = ScoreWork(pipeline.lend(model, at), targets, **shared)
    del model
    for shard, (found, halving) in pipeline.executor.map(work, missing, lambda shard: pool.part(parts.shards[shard])):
        parts.keep(shard, {"scores": found}, made_on(pipeline.executor.gpu, halving.count), halving.failed)
        pipeline.progress.advance(int(pool.lengths[parts.shards[shard]].sum()))
    pipeline.progress.done()
    every = parts.read("scores")  # mapped from disk, not in memory
    first = torch.tensor([int(usable[members[0]]) for members in targets.members])
    hash_ = write_tensors(artifact.path / "scores.safetensors", {"scores": every, "target": first}, {"recipe": artifact.digest})
    ratios = sorted(line.ratio for line in inverse.damped)
    damping = {"least": ratios[0], "median": ratios[len(ratios) // 2], "most": ratios[-1]}
    extra = {"damping_to_mean_eigenvalue": damping, "rank": targets.rank, "norm_kept_by_rank": min(targets.kept.values(), default=1.0)}
    extra["rank_agreement"] = agreement
    if targets.left_out:
        extra["left_out"] = [int(usable[i]) for i in targets.left_out]
        pipeline.progress.note(f"{len(targets.left_out):,} target rows do not fit in memory and have no influence score")
    about = parts.about()
    finite = torch.cat([part.isfinite().all(dim=1) for part in every])
    check_values(finite, pool, "influence", about["counts"].get("quarantined", {}), artifact)
    about["counts"]["targets"] = len(targets)
    about["extra"] |= extra
    artifact.finish(files={"scores.safetensors": hash_}, **about)
    parts.remove()  # last: until then they are what is kept of the work


def _agreement(
    model: Any, pool: Any, rows: list[Any], targets: Targets, inverse: Inverse, *, seed: int, **shared: Any
) -> dict[str, float | int] | None:
    """How far low-rank targets order the pool as whole ones do: the least and mean Spearman correlation of the two over rows and targets
    drawn with `seed`. None where all targets are whole, or fewer than three rows are there to be ordered."""
    usable = np.flatnonzero(pool.codes == 0)
    if not targets.low or len(usable) < 3:
        return None
    draw = np.random.default_rng(seed)
    size = 4 * sum(int(np.prod(targets.shape(name) or 0)) for name in (*targets.full, *targets.low))
    most = min(len(targets), AGREE_TARGETS, max(1, MEMORY // size))
    some = np.sort(draw.choice(usable, min(AGREE_ROWS, len(usable)), replace=False))
    members = [targets.members[k] for k in np.sort(draw.choice(len(targets), most, replace=False))]
    found = rank_agreement(
        model, [pool[int(i)] for i in some], [rows[i] for member in members for i in member], inverse, targets.rank or 0, **shared
    )
    return {"rows": len(some), "targets": most, "least": float(found.min()), "mean": float(found.mean())}
