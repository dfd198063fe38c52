"""Influence through the inverse curvature as stages: the curvature fitted on pool rows, then every pool row scored on every target row.

Nothing is projected: the target's gradients are preconditioned and held, the pool's stream past them, shard by shard.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradsift.artifact import Artifact
from gradsift.curvature import Curvature, Fitting, prepare_targets, score_pool
from gradsift.durable import make_folder, read_tensors, write_tensors
from gradsift.errors import DataError, IntegrityError, UserError
from gradsift.execute import Stopping, stop_here
from gradsift.influence import backend
from gradsift.stages import Recipe
from gradsift.types import Signal

if TYPE_CHECKING:
    from gradsift.pipeline import Pipeline

PARTS = "parts"  # sums and scores of finished shards, kept until the stage is complete
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
        fitted = Fitting(
            pipeline.model_at(at),
            [encoded[i] for i in rows],
            modules=pipeline.modules,
            form=chosen["form"],
            labels=chosen["labels"],
            correct=chosen["correct"],
            seed=chosen["seed"],
            token_budget=gradients.token_budget,
            store=artifact.path / PARTS,
            shard_rows=gradients.shard_rows,
            ids=[ids[i] for i in rows],
            identity=artifact.digest,
            progress=Stopping(pipeline.progress),
        ).result()
        hash_ = fitted.save(artifact.path / "curvature.safetensors")
        shutil.rmtree(artifact.path / PARTS)
        artifact.finish(files={"curvature.safetensors": hash_}, counts={"rows": count, "parameters": len(fitted.names)})

    return Curvature.load(pipeline.make(recipe, fill).path / "curvature.safetensors")


def influence(pipeline: Pipeline, signal: Signal) -> tuple[Tensor, Tensor]:
    """Scores [n, m] at the last checkpoint and which rows have one [n]; the file's "target" [m] is the first row of each target."""
    if "target" not in pipeline.sides:
        raise UserError("influence needs a target", remedy="Add --target FILE.")
    artifact = pipeline.make(influence_recipe(pipeline, signal), lambda artifact: _score(pipeline, signal, artifact))
    scores = artifact.tensors("scores.safetensors")["scores"]
    return scores, torch.isfinite(scores).all(dim=1)


def _score(pipeline: Pipeline, signal: Signal, artifact: Artifact) -> None:
    chosen, gradients = settings(pipeline, signal), pipeline.config.gradients
    inverse = curvature(pipeline, signal).inverse(chosen["damping"], chosen["style"], absolute=chosen["absolute"])
    model = pipeline.model_at(pipeline.checkpoints()[-1])
    wanted, pool = pipeline.encoded("target"), pipeline.encoded("pool")
    usable = np.flatnonzero(wanted.codes == 0)
    if not len(usable):
        raise DataError("no target row is usable", remedy="Look at the target with `gradsift inspect`.")
    shared = {"modules": pipeline.modules, "token_budget": gradients.token_budget}
    targets = prepare_targets(
        model,
        [wanted[int(i)] for i in usable],
        inverse,
        target_batch=chosen["target_batch"],
        drop_last=chosen["drop_last"],
        rank=chosen["rank"],
        **shared,
    )
    parts = artifact.path / PARTS
    make_folder(parts)
    starts = range(0, len(pool), gradients.shard_rows)
    pipeline.progress.start(int(pool.lengths.sum()), "tokens", f"influence on {len(targets)} targets, {signal.backend}")
    for start in starts:
        stop_here()
        path, meta = parts / f"scores-{start:09d}.safetensors", {"recipe": artifact.digest, "start": str(start)}
        rows = range(start, min(start + gradients.shard_rows, len(pool)))
        if not _there(path, meta):
            found = torch.full((len(rows), len(targets)), torch.nan)
            fine = [i for i in rows if pool.codes[i] == 0]
            for indices, scores in score_pool(model, [pool[i] for i in fine], targets, **shared):
                found[torch.tensor([fine[int(i)] - start for i in indices])] = scores
            write_tensors(path, {"scores": found}, meta)
        pipeline.progress.advance(int(pool.lengths[rows.start : rows.stop].sum()))
    pipeline.progress.done()
    every = torch.cat([read_tensors(path)["scores"] for path in sorted(parts.glob("scores-*.safetensors"))])
    first = torch.tensor([int(usable[members[0]]) for members in targets.members])
    hash_ = write_tensors(artifact.path / "scores.safetensors", {"scores": every, "target": first}, {"recipe": artifact.digest})
    ratios = sorted(line.ratio for line in inverse.damped)
    damping = {"least": ratios[0], "median": ratios[len(ratios) // 2], "most": ratios[-1]}
    extra = {"damping_to_mean_eigenvalue": damping, "rank": targets.rank, "norm_kept_by_rank": min(targets.kept.values(), default=1.0)}
    shutil.rmtree(parts)
    counts = {"rows": len(every), "targets": len(targets)}
    artifact.finish(files={"scores.safetensors": hash_}, counts=counts, extra=extra)


def _there(path: Any, meta: dict[str, str]) -> bool:
    try:
        read_tensors(path, expect=meta)
    except IntegrityError:
        return False
    return True
