"""The signal "tuned" as a stage: the model is trained on a group of target rows, then asked for its
loss on every pool row.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsift.compute.executor import Serial
from gradsift.compute.progress import quiet
from gradsift.compute.stopping import Stopping
from gradsift.errors import ConfigError, UserError
from gradsift.model.finetune import finetune
from gradsift.model.load import FOUR_BIT
from gradsift.model.lora import load_adapter
from gradsift.stages.context import Context
from gradsift.stages.per_row import finish_scalars
from gradsift.stages.recipe import Recipe
from gradsift.stages.shards import map_shards
from gradsift.stages.work import ScalarWork
from gradsift.store.artifact import Artifact
from gradsift.store.partial import Partial
from gradsift.types import Checkpoint, Signal


def groups(context: Context) -> list[str]:
    """The target groups in order of appearance: the columns of the signal."""
    if "target" not in context.sides:
        raise UserError(
            "losses after training on a target need a target", remedy="Add --target FILE."
        )
    return list(dict.fromkeys(context.sides["target"].groups))


def recipes(context: Context, signal: Signal) -> list[Recipe]:
    """One stage for each target group. Raises ConfigError for a training in full of a model in 4
    bits.
    """
    if context.config.tuning.mode == "full" and context.config.model.dtype == FOUR_BIT:
        raise ConfigError(
            "a model in 4 bits cannot be trained in full",
            remedy='Leave [tuning] mode = "lora", or take --dtype bfloat16.',
        )
    inputs = {side: context.encode_recipe(side).digest for side in ("pool", "target")}
    config = {
        **context.config.tuning.canonical(),
        "lr": context.config.tuning.rate,
        "shard_rows": context.config.gradients.shard_rows,
    }
    return [
        Recipe("tuned", {**config, "group": group}, inputs, context.compute_identity())
        for group in groups(context)
    ]


def value(context: Context, signal: Signal) -> tuple[Tensor, Tensor]:
    """Loss fp32 [n, groups] of every pool row, nats per supervised token, after training on each
    group; NaN for rows that could not be encoded or did not fit in memory. And which rows have all
    of them, bool [n].

    Raises DataError for a group without a usable row, and as `checks.check_values`.
    """
    each = zip(groups(context), recipes(context, signal), strict=True)
    stages = [
        context.make(recipe, lambda artifact, group=group: _fill(context, group, artifact))
        for group, recipe in each
    ]
    losses = torch.stack([stage.tensors("tuned.safetensors")["tuned"] for stage in stages], dim=1)
    return losses, losses.isfinite().all(dim=1)


def steps_on(context: Context, group: str) -> int:
    """Optimiser steps of the training on one group."""
    return context.config.tuning.steps_for(
        sum(other == group for other in context.sides["target"].groups)
    )


def training(context: Context, group: str) -> tuple[int, int]:
    """(optimiser steps, rows) of the training on one group: of its rows that could be encoded."""
    count = len(_taken(context, group))
    return context.config.tuning.steps_for(count), count


def _taken(context: Context, group: str) -> list[int]:
    """The rows of a target group that could be encoded."""
    codes = context.encoded("target").codes
    groups = context.sides["target"].groups
    return [i for i, other in enumerate(groups) if other == group and codes[i] == 0]


def _fill(context: Context, group: str, artifact: Artifact) -> None:
    encoded = context.encoded("pool")
    keeper = Partial(artifact, len(encoded), context.config.gradients.shard_rows)
    label = f"loss after training on {group}"
    if keeper.missing():
        with _trained(context, group) as (model, executor):
            work = ScalarWork(model, "loss", context.pad_id, context.advance, column="tuned")
            map_shards(context, keeper, work, encoded, label=label, executor=executor)
    finish_scalars(keeper, "tuned", artifact, context, label, torch.float32)


@contextlib.contextmanager
def _trained(context: Context, group: str) -> Iterator[tuple[Any, Any]]:
    """(how workers get the model trained on a group, the executor they run in). A model that was
    trained in full stays in this process: only an adapter is small enough to travel.
    """
    target, settings = context.encoded("target"), context.config.tuning
    taken = _taken(context, group)
    model = context.config.model
    context.progress.start(settings.steps_for(len(taken)), "steps", f"training on {group}")
    steps = Stopping(context.progress)
    trained = finetune(
        # In full, weights of half precision would lose small updates.
        lambda: context.load_base(None if settings.mode == "lora" else "float32"),
        [target[i] for i in taken],
        settings=settings,
        device=model.device,
        progress=lambda step, of: steps.advance(1),
    )
    context.progress.done()
    if settings.mode == "full":
        # as the base model, whose loss it is compared with
        whole = trained.to(getattr(torch, model.dtype))
        yield (
            lambda: whole,
            Serial(context.config.model.device) if context.executor.remote else context.executor,
        )
        return
    with tempfile.TemporaryDirectory(prefix="gradsift-") as folder:
        with quiet():
            trained.save_pretrained(folder)  # type: ignore[operator]
        del trained
        at = Checkpoint(Path(folder), settings.steps_for(len(taken)), 0.0, settings.rate)
        adapted = None if context.executor.remote else load_adapter(context.load_base(), folder)
        yield context.lend(adapted, at), context.executor
