"""Signals of one number per pool row, as stages: loss, n-gram weights, instruction-following and learned difficulty."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsift.compute.stopping import Stopping
from gradsift.data.records import text_of
from gradsift.errors import UserError
from gradsift.model.lora import attach_lora
from gradsift.model.warmup import plan_warmup
from gradsift.signals import difficulty, ngrams
from gradsift.signals.features import features as own_features
from gradsift.stages.checks import check_values
from gradsift.stages.recipe import Recipe
from gradsift.stages.work import ScalarWork
from gradsift.store.artifact import Artifact
from gradsift.store.partial import FOLDER, Partial
from gradsift.store.provenance import made_on
from gradsift.store.tensors import write_tensors

if TYPE_CHECKING:
    from gradsift.stages.pipeline import Pipeline

SCALARS = ("difficulty", "ifd", "loss", "ngrams")


def recipes(pipeline: Pipeline, name: str, fields: Sequence[str] = ()) -> list[Recipe]:
    """The stages of one of SCALARS, in the order they are made. `fields`: what difficulty is learned from, in place of embeddings."""
    rows = {"rows": pipeline.encode_recipe("pool").digest}
    if name == "ngrams":
        inputs = {side: rows.digest for side, rows in pipeline.sides.items()}
        return [Recipe("ngrams", {"buckets": ngrams.BUCKETS, "prior": ngrams.PRIOR}, inputs)]
    if name in ("ifd", "loss"):
        return [Recipe(name, {"shard_rows": pipeline.config.gradients.shard_rows}, rows, pipeline.compute_identity())]
    settings = pipeline.config.warmup.canonical()
    for unused in ("checkpoints", "scheduler", "warmup_ratio", "weight_decay"):
        del settings[unused]
    features = features_recipe(pipeline, fields) if fields else pipeline.embeddings_recipe("pool")
    return [features, Recipe("difficulty", settings, {**rows, "features": features.digest}, pipeline.compute_identity())]


def features_recipe(pipeline: Pipeline, fields: Sequence[str]) -> Recipe:
    return Recipe("features", {"fields": list(fields)}, {"rows": pipeline.sides["pool"].digest})


def features(pipeline: Pipeline, fields: Sequence[str]) -> Tensor:
    """Numbers of the pool's own rows, fp32 [n, d]."""

    def fill(artifact: Artifact) -> None:
        found = own_features(pipeline.sides["pool"], fields)
        hash_ = write_tensors(artifact.path / "features.safetensors", {"features": found}, {"recipe": artifact.digest})
        artifact.finish(files={"features.safetensors": hash_}, counts={"rows": len(found), "columns": found.shape[1]})

    return pipeline.make(features_recipe(pipeline, fields), fill).tensors("features.safetensors")["features"]


def values(pipeline: Pipeline, name: str, fields: Sequence[str] = ()) -> Tensor:
    """One of SCALARS for every pool row [n]; NaN for rows that could not be encoded or did not fit in memory. Raises DataError as
    `check_values`."""

    def fill(artifact: Artifact) -> None:
        if name in ("ifd", "loss"):
            found, about = _of_each(pipeline, name, artifact)
        else:
            found = _ngrams(pipeline) if name == "ngrams" else _difficulty(pipeline, fields)
            about = {"counts": {"rows": len(found)}}
        hash_ = write_tensors(artifact.path / f"{name}.safetensors", {name: found}, {"recipe": artifact.digest})
        artifact.finish(files={f"{name}.safetensors": hash_}, **about)
        if (artifact.path / FOLDER).is_dir():  # last: until then the parts are what is kept of the work
            shutil.rmtree(artifact.path / FOLDER)

    return pipeline.make(recipes(pipeline, name, fields)[-1], fill).tensors(f"{name}.safetensors")[name]


def _of_each(pipeline: Pipeline, name: str, artifact: Artifact) -> tuple[Tensor, dict[str, Any]]:
    """What the base model alone says of each row ("loss", "ifd"), shard by shard: fp32 [n] for a loss, else fp64; and `Partial.about` it."""
    encoded = pipeline.encoded("pool")
    parts = Partial(artifact, len(encoded), pipeline.config.gradients.shard_rows)
    missing = parts.missing()
    rows = [i for shard in missing for i in range(parts.shards[shard].start, parts.shards[shard].stop) if encoded.codes[i] == 0]
    tokens = int(encoded.lengths[rows].sum()) + (int(encoded.supervised[rows].sum()) + len(rows) if name == "ifd" else 0)
    label = {"loss": "loss of the base model", "ifd": "instruction-following difficulty"}[name]
    pipeline.progress.start(tokens, "tokens", label)
    inner, outer = pipeline.advances(encoded)
    if missing:
        work = ScalarWork(pipeline.lend(None if pipeline.executor.remote else pipeline.load_base()), name, pipeline.pad_id, inner)
        for shard, (found, halving) in pipeline.executor.map(work, missing, lambda shard: encoded.part(parts.shards[shard])):
            parts.keep(shard, {name: found}, made_on(pipeline.executor.gpu, halving.count), halving.failed)
            outer(parts.shards[shard])
    pipeline.progress.done()
    found, about = torch.cat(parts.read(name)), parts.about()
    check_values(found.isfinite(), encoded, {"loss": "loss", "ifd": "difficulty"}[name], about["counts"].get("quarantined", {}), artifact)
    return found.float() if name == "loss" else found, about


def _ngrams(pipeline: Pipeline) -> Tensor:
    if "target" not in pipeline.sides:
        raise UserError("n-gram weights need a target", remedy="Add --target FILE.")
    sides = {side: (text_of(example) for example in rows) for side, rows in pipeline.sides.items()}
    return torch.as_tensor(ngrams.importance(sides["pool"], sides["target"]))


def _difficulty(pipeline: Pipeline, fields: Sequence[str]) -> Tensor:
    encoded, settings = pipeline.encoded("pool"), pipeline.config.warmup
    learned_from = features(pipeline, fields) if fields else pipeline.embeddings("pool")
    plan = plan_warmup(encoded, settings)
    rows = [encoded[int(i)] for i in plan.rows]
    units = torch.cat([learned_from[int(i) : int(i) + 1].float() for i in plan.rows])
    tokens = sum(len(rows[i]["input_ids"]) for step in plan.steps for batch in step for i in batch)
    pipeline.progress.start(tokens, "tokens", "training the score net")
    model = attach_lora(pipeline.load_base(), settings.lora)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # dropout, where the adapter has any
        net = difficulty.train_score_net(
            model,
            rows,
            units,
            plan.steps,
            lr=settings.lr,
            pad_id=pipeline.pad_id,
            max_grad_norm=settings.max_grad_norm,
            advance=Stopping(pipeline.progress).advance,
        )
    pipeline.progress.done()
    found = difficulty.learned_difficulty(net, learned_from)
    found[torch.as_tensor(encoded.codes != 0) if isinstance(learned_from, Tensor) else ~learned_from.usable] = torch.nan
    return found
