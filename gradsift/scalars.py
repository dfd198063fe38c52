"""Signals of one number per pool row, as stages: loss, n-gram weights, instruction-following and learned difficulty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradsift.artifact import Artifact
from gradsift.contamination import text_of
from gradsift.durable import write_tensors
from gradsift.errors import UserError
from gradsift.execute import Stopping
from gradsift.model import attach_lora
from gradsift.signals import difficulty, ifd, ngrams
from gradsift.signals.loss import row_losses
from gradsift.stages import Recipe
from gradsift.warmup import plan_warmup

if TYPE_CHECKING:
    from gradsift.pipeline import Pipeline

SCALARS = ("difficulty", "ifd", "loss", "ngrams")


def recipes(pipeline: Pipeline, name: str) -> list[Recipe]:
    """The stages of one of SCALARS, in the order they are made."""
    rows = {"rows": pipeline.encode_recipe("pool").digest}
    if name == "ngrams":
        inputs = {side: rows.digest for side, rows in pipeline.sides.items()}
        return [Recipe("ngrams", {"buckets": ngrams.BUCKETS, "prior": ngrams.PRIOR}, inputs)]
    if name in ("ifd", "loss"):
        return [Recipe(name, {}, rows, pipeline.compute_identity())]
    settings = pipeline.config.warmup.canonical()
    for unused in ("checkpoints", "scheduler", "warmup_ratio", "weight_decay"):
        del settings[unused]
    features = pipeline.embeddings_recipe("pool")
    return [features, Recipe("difficulty", settings, {**rows, "features": features.digest}, pipeline.compute_identity())]


def values(pipeline: Pipeline, name: str) -> Tensor:
    """One of SCALARS for every pool row [n]; NaN for rows that could not be encoded."""
    make = {"difficulty": _difficulty, "ifd": _ifd, "loss": _loss, "ngrams": _ngrams}[name]

    def fill(artifact: Artifact) -> None:
        found = make(pipeline)
        hash_ = write_tensors(artifact.path / f"{name}.safetensors", {name: found}, {"recipe": artifact.digest})
        artifact.finish(files={f"{name}.safetensors": hash_}, counts={"rows": len(found)})

    return pipeline.make(recipes(pipeline, name)[-1], fill).tensors(f"{name}.safetensors")[name]


def _ngrams(pipeline: Pipeline) -> Tensor:
    if "target" not in pipeline.sides:
        raise UserError("n-gram weights need a target", remedy="Add --target FILE.")
    sides = {side: (text_of(example) for example in rows) for side, rows in pipeline.sides.items()}
    return torch.as_tensor(ngrams.importance(sides["pool"], sides["target"]))


def _loss(pipeline: Pipeline) -> Tensor:
    encoded = pipeline.encoded("pool")
    usable = np.flatnonzero(encoded.codes == 0)
    pipeline.progress.start(int(encoded.lengths[usable].sum()), "tokens", "loss of the base model")
    rows = [encoded[int(i)] for i in usable]
    found = row_losses(pipeline.load_base(), rows, pad_id=pipeline.pad_id, advance=pipeline.progress.advance)
    pipeline.progress.done()
    return _spread(found.mean, usable, len(encoded)).float()


def _ifd(pipeline: Pipeline) -> Tensor:
    encoded = pipeline.encoded("pool")
    usable = np.flatnonzero(encoded.codes == 0)
    rows = [encoded[int(i)] for i in usable]
    tokens = int(encoded.lengths[usable].sum() + encoded.supervised[usable].sum() + len(rows))
    pipeline.progress.start(tokens, "tokens", "instruction-following difficulty")
    found = ifd.difficulty(pipeline.load_base(), rows, pad_id=pipeline.pad_id, advance=Stopping(pipeline.progress).advance)
    pipeline.progress.done()
    return _spread(found, usable, len(encoded))


def _difficulty(pipeline: Pipeline) -> Tensor:
    encoded, settings = pipeline.encoded("pool"), pipeline.config.warmup
    features = pipeline.embeddings("pool")
    plan = plan_warmup(encoded, settings)
    rows = [encoded[int(i)] for i in plan.rows]
    units = torch.cat([features[int(i) : int(i) + 1].float() for i in plan.rows])
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
    found = difficulty.difficulty(net, features)
    found[~features.usable] = torch.nan
    return found


def _spread(found: Tensor, usable: np.ndarray, n: int) -> Tensor:
    full = torch.full((n,), torch.nan, dtype=torch.float64)
    full[torch.as_tensor(usable)] = found.double()
    return full
