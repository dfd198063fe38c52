"""Influence through the inverse curvature as stages: the curvature fitted on pool rows, then every
pool row scored on every target row.

Nothing is projected: the target's gradients are preconditioned and held, the pool's stream past
them, shard by shard.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

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
from gradsift.stages.context import Context
from gradsift.stages.recipe import Recipe
from gradsift.stages.shards import map_shards
from gradsift.stages.work import FittingWork, ScoreWork
from gradsift.store.artifact import Artifact
from gradsift.store.canonical import recipe_digest
from gradsift.store.partial import FOLDER, Partial, Pieces
from gradsift.store.tensors import write_tensors
from gradsift.types import Signal, counted

# on which low-rank scores are held against those of whole matrices, or as many targets as fit in
# memory
AGREE_ROWS, AGREE_TARGETS = 64, 16
_FIT = ("fit_rows", "form", "labels", "correct", "seed")


def settings(context: Context, signal: Signal) -> dict[str, Any]:
    """The curvature settings in force: the run's, with what the backend fixes on top."""
    return {
        **context.config.curvature.canonical(),
        "correct": True,
        "drop_last": False,
        **(backend(str(signal.backend)).curvature or {}),
    }


def fit_recipe(context: Context, signal: Signal) -> Recipe:
    fitting = {name: settings(context, signal)[name] for name in _FIT}
    gradients = context.config.gradients
    fitting |= {
        "modules": gradients.canonical()["modules"],
        "token_budget": gradients.token_budget,
        "shard_rows": gradients.shard_rows,
    }
    inputs = {
        "rows": context.encode_recipe("pool").digest,
        "warmup": context.warmup_recipe().digest,
    }
    return Recipe("curvature", fitting, inputs, context.compute_identity())


def recipe(context: Context, signal: Signal) -> Recipe:
    rest = {name: value for name, value in settings(context, signal).items() if name not in _FIT}
    rest |= {
        "backend": signal.backend,
        "checkpoints": "last",
        "shard_rows": context.config.gradients.shard_rows,
    }
    inputs = {"curvature": fit_recipe(context, signal).digest}
    inputs |= {side: context.encode_recipe(side).digest for side in context.sides}
    return Recipe("influence", rest, inputs)


def recipes(context: Context, signal: Signal) -> list[Recipe]:
    return [context.warmup_recipe(), fit_recipe(context, signal), recipe(context, signal)]


def curvature(context: Context, signal: Signal) -> Curvature:
    """The curvature at the last checkpoint over `fit_rows` usable pool rows, drawn with its
    seed.
    """
    chosen = settings(context, signal)
    at = context.checkpoints()[-1]

    def fill(artifact: Artifact) -> None:
        encoded, ids = context.encoded("pool"), context.sides["pool"].ids
        usable = np.flatnonzero(encoded.codes == 0)
        count = min(len(usable), chosen["fit_rows"])
        rows = np.sort(
            np.random.default_rng(chosen["seed"]).choice(usable, size=count, replace=False)
        ).tolist()
        gradients = context.config.gradients
        taken, model = [encoded[i] for i in rows], context.model_at(at)
        about = {name: chosen[name] for name in ("form", "labels", "correct", "seed")}
        about |= {
            "modules": context.modules,
            "token_budget": gradients.token_budget,
            "shard_rows": gradients.shard_rows,
        }
        about |= {"ids": [ids[i] for i in rows], "identity": artifact.digest}
        pieces = Pieces(artifact.path / FOLDER)
        fitting = Fitting(model, taken, store=pieces, progress=Stopping(context.progress), **about)
        if context.executor.remote:
            _fit_elsewhere(context, fitting, FittingWork(context.lend(model, at), taken, about))
        fitted = fitting.result()
        if fitting.left_out:
            context.progress.note(
                f"{len(fitting.left_out):,} of the {count:,} rows of the fit do not fit in memory"
                " and are left out of it"
            )
        hash_ = fitted.save(artifact.path / "curvature.safetensors")
        counts = {"rows": count - len(fitting.left_out), "parameters": len(fitted.names)}
        artifact.finish(files={"curvature.safetensors": hash_}, counts=counts, extra=fitting.made())
        pieces.remove()

    return Curvature.load(
        context.make(fit_recipe(context, signal), fill).path / "curvature.safetensors"
    )


class _FitShards:
    """The keeper of one pass of a fit, "factors" or "eigenvalues": its sums lie among the pieces of
    `fitting`.
    """

    problems: Sequence[str] = ()  # a fit tells of damaged pieces in the log

    def __init__(self, fitting: Fitting, name: Literal["factors", "eigenvalues"]) -> None:
        self._fitting = fitting
        self._name: Literal["factors", "eigenvalues"] = name
        self._save = fitting.factors if name == "factors" else fitting.eigenvalues
        self.shards = [slice(rows.start, rows.stop) for rows in fitting.shards]

    def missing(self) -> list[int]:
        return self._fitting.missing(self._name)

    def keep(
        self,
        shard: int,
        tensors: Mapping[str, Tensor],
        made: Mapping[str, str],
        failed: Collection[int],
    ) -> None:
        self._save(shard, dict(tensors), made)


def _fit_elsewhere(context: Context, fitting: Fitting, work: FittingWork) -> None:
    """Both passes of a fit, shard by shard, by workers elsewhere; `fitting.result()` then only adds
    up.
    """
    options = {"tokens": fitting.lengths, "label": "curvature, factors"}
    map_shards(context, _FitShards(fitting, "factors"), work, None, **options)
    if fitting.correct:
        options["label"] = "curvature, eigenvalues"
        map_shards(
            context,
            _FitShards(fitting, "eigenvalues"),
            replace(work, basis=fitting.basis()),
            None,
            **options,
        )


def value(context: Context, signal: Signal) -> tuple[Tensor, Tensor]:
    """Scores [n, m] at the last checkpoint and which rows have one [n]; the file's "target" [m] is
    the first row of each target.
    """
    scores = made(context, signal).tensors("scores.safetensors")["scores"]
    return scores, torch.isfinite(scores).all(dim=1)


def made(context: Context, signal: Signal) -> Artifact:
    """The complete artifact that `value` reads."""
    if "target" not in context.sides:
        raise UserError("influence needs a target", remedy="Add --target FILE.")
    return context.make(recipe(context, signal), lambda artifact: _score(context, signal, artifact))


def _score(context: Context, signal: Signal, artifact: Artifact) -> None:
    chosen, gradients = settings(context, signal), context.config.gradients
    inverse = curvature(context, signal).inverse(
        chosen["damping"], chosen["style"], absolute=chosen["absolute"]
    )
    at = context.checkpoints()[-1]
    model = context.model_at(at)
    wanted, pool = context.encoded("target"), context.encoded("pool")
    usable = np.flatnonzero(wanted.codes == 0)
    shared = {"modules": context.modules, "token_budget": gradients.token_budget}
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
    agreement = _agreement(
        model,
        pool,
        rows,
        targets,
        inverse,
        target_batch=chosen["target_batch"],
        seed=chosen["seed"],
        **shared,
    )
    # Target rows that did not fit in memory have no column, and another time they may fit.
    parts = Partial(
        artifact, len(pool), gradients.shard_rows, {"targets": recipe_digest(targets.members)}
    )
    work = ScoreWork(context.lend(model, at), targets, advance=context.advance, **shared)
    del model
    map_shards(
        context,
        parts,
        work,
        pool,
        label=f"influence on {counted(len(targets), 'target')}, {signal.backend}",
    )
    every = parts.read("scores")  # mapped from disk, not in memory
    first = torch.tensor([int(usable[members[0]]) for members in targets.members])
    hash_ = write_tensors(
        artifact.path / "scores.safetensors",
        {"scores": every, "target": first},
        {"recipe": artifact.digest},
    )
    ratios = sorted(line.ratio for line in inverse.damped)
    damping = {"least": ratios[0], "median": ratios[len(ratios) // 2], "most": ratios[-1]}
    extra = {
        "damping_to_mean_eigenvalue": damping,
        "rank": targets.rank,
        "norm_kept_by_rank": min(targets.kept.values(), default=1.0),
    }
    extra["rank_agreement"] = agreement
    if targets.left_out:
        extra["left_out"] = [int(usable[i]) for i in targets.left_out]
        context.progress.note(
            f"{len(targets.left_out):,} target rows do not fit in memory and have no influence"
            " score"
        )
    about = parts.about()
    finite = torch.cat([part.isfinite().all(dim=1) for part in every])
    check_values(finite, pool, "influence", about["counts"].get("quarantined", {}), artifact)
    about["counts"]["targets"] = len(targets)
    about["extra"] |= extra
    artifact.finish(files={"scores.safetensors": hash_}, **about)
    parts.remove()  # last: until `finish` the shards are the only copy


def _agreement(
    model: Any,
    pool: Any,
    rows: list[Any],
    targets: Targets,
    inverse: Inverse,
    *,
    seed: int,
    **shared: Any,
) -> dict[str, float | int] | None:
    """How far low-rank targets order the pool as whole ones do: the least and mean Spearman
    correlation of the two over rows and targets drawn with `seed`. None where all targets are
    whole, or fewer than three rows are there to be ordered.
    """
    usable = np.flatnonzero(pool.codes == 0)
    if not targets.low or len(usable) < 3:
        return None
    draw = np.random.default_rng(seed)
    size = 4 * sum(int(np.prod(targets.shape(name) or 0)) for name in (*targets.full, *targets.low))
    most = min(len(targets), AGREE_TARGETS, max(1, MEMORY // size))
    some = np.sort(draw.choice(usable, min(AGREE_ROWS, len(usable)), replace=False))
    members = [targets.members[k] for k in np.sort(draw.choice(len(targets), most, replace=False))]
    found = rank_agreement(
        model,
        [pool[int(i)] for i in some],
        [rows[i] for member in members for i in member],
        inverse,
        targets.rank or 0,
        **shared,
    )
    return {
        "rows": len(some),
        "targets": most,
        "least": float(found.min()),
        "mean": float(found.mean()),
    }
