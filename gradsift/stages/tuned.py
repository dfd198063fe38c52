"""The signal "tuned" as a stage: the model is trained on a group of target rows, then asked for its loss on every pool row."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsift.compute.executor import Serial
from gradsift.compute.progress import quiet
from gradsift.compute.stopping import Stopping
from gradsift.errors import ConfigError, UserError
from gradsift.model.finetune import finetune
from gradsift.model.load import FOUR_BIT
from gradsift.model.lora import load_adapter
from gradsift.stages.checks import check_values
from gradsift.stages.recipe import Recipe
from gradsift.stages.work import ScalarWork
from gradsift.store.artifact import Artifact
from gradsift.store.partial import Partial
from gradsift.store.provenance import made_on
from gradsift.store.tensors import write_tensors
from gradsift.types import Checkpoint

if TYPE_CHECKING:
    from gradsift.stages.pipeline import Pipeline

_FILE = "tuned.safetensors"


def groups(pipeline: Pipeline) -> list[str]:
    """The target groups in order of appearance: the columns of the signal."""
    if "target" not in pipeline.sides:
        raise UserError("losses after training on a target need a target", remedy="Add --target FILE.")
    return list(dict.fromkeys(pipeline.sides["target"].groups))


def recipes(pipeline: Pipeline) -> list[Recipe]:
    """One stage for each target group. Raises ConfigError for a training in full of a model in 4 bits."""
    if pipeline.config.tuning.mode == "full" and pipeline.config.model.dtype == FOUR_BIT:
        raise ConfigError("a model in 4 bits cannot be trained in full", remedy='Leave [tuning] mode = "lora", or take --dtype bfloat16.')
    inputs = {side: pipeline.encode_recipe(side).digest for side in ("pool", "target")}
    config = {**pipeline.config.tuning.canonical(), "lr": pipeline.config.tuning.rate, "shard_rows": pipeline.config.gradients.shard_rows}
    return [Recipe("tuned", {**config, "group": group}, inputs, pipeline.compute_identity()) for group in groups(pipeline)]


def values(pipeline: Pipeline) -> Tensor:
    """Loss fp32 [n, groups] of every pool row, nats per supervised token, after training on each group; NaN for rows that could not be
    encoded or did not fit in memory. Raises DataError for a group without a usable row, and as `check_values`."""
    made = zip(groups(pipeline), recipes(pipeline), strict=True)
    stages = [pipeline.make(recipe, lambda artifact, group=group: _fill(pipeline, group, artifact)) for group, recipe in made]
    return torch.stack([stage.tensors(_FILE)["tuned"] for stage in stages], dim=1)


def steps_on(pipeline: Pipeline, group: str) -> int:
    """Optimiser steps of the training on one group."""
    return pipeline.config.tuning.steps_for(sum(other == group for other in pipeline.sides["target"].groups))


def _fill(pipeline: Pipeline, group: str, artifact: Artifact) -> None:
    encoded = pipeline.encoded("pool")
    parts = Partial(artifact, len(encoded), pipeline.config.gradients.shard_rows)
    missing = parts.missing()
    if missing:
        rows = [i for shard in missing for i in range(parts.shards[shard].start, parts.shards[shard].stop) if encoded.codes[i] == 0]
        with _trained(pipeline, group) as (model, executor):
            pipeline.progress.start(int(encoded.lengths[rows].sum()), "tokens", f"loss after training on {group}")
            inner, outer = pipeline.advances(encoded)
            work = ScalarWork(model, "loss", pipeline.pad_id, inner)
            for shard, (found, halving) in executor.map(work, missing, lambda shard: encoded.part(parts.shards[shard])):
                parts.keep(shard, {"tuned": found}, made_on(executor.gpu, halving.count), halving.failed)
                outer(parts.shards[shard])
            pipeline.progress.done()
    found, about = torch.cat(parts.read("tuned")).float(), parts.about()
    check_values(found.isfinite(), encoded, f"loss after training on {group}", about["counts"].get("quarantined", {}), artifact)
    hash_ = write_tensors(artifact.path / _FILE, {"tuned": found}, {"recipe": artifact.digest})
    artifact.finish(files={_FILE: hash_}, **about)
    parts.remove()  # last: until then they are what is kept of the work


@contextlib.contextmanager
def _trained(pipeline: Pipeline, group: str) -> Iterator[tuple[Any, Any]]:
    """(how workers get the model trained on a group, the executor they run in). A model that was trained in full stays in this process: only
    an adapter is small enough to travel."""
    target, settings = pipeline.encoded("target"), pipeline.config.tuning
    taken = [i for i, other in enumerate(pipeline.sides["target"].groups) if other == group and target.codes[i] == 0]
    model = pipeline.config.model
    pipeline.progress.start(settings.steps_for(len(taken)), "steps", f"training on {group}")
    steps = Stopping(pipeline.progress)
    trained = finetune(
        # In full, weights of half precision would lose small updates.
        lambda: pipeline.load_base(None if settings.mode == "lora" else "float32"),
        [target[i] for i in taken],
        settings=settings,
        device=model.device,
        progress=lambda step, of: steps.advance(1),
    )
    pipeline.progress.done()
    if settings.mode == "full":
        whole = trained.to(getattr(torch, model.dtype))  # as the base model, whose loss it is compared with
        yield lambda: whole, Serial(pipeline.config.model.device) if pipeline.executor.remote else pipeline.executor
        return
    with tempfile.TemporaryDirectory(prefix="gradsift-") as folder:
        with quiet():
            trained.save_pretrained(folder)  # type: ignore[operator]
        del trained
        at = Checkpoint(Path(folder), settings.steps_for(len(taken)), 0.0, settings.rate)
        adapted = None if pipeline.executor.remote else load_adapter(pipeline.load_base(), folder)
        yield pipeline.lend(adapted, at), pipeline.executor
