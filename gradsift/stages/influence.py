"""Influence through stored rows as stages: the rows of both sides at every checkpoint, and the
product of the two, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsift.errors import MismatchError, UserError
from gradsift.signals.backends import backend, pool_transform
from gradsift.signals.influence import score_blocks
from gradsift.stages import checks, rows
from gradsift.stages.context import Context
from gradsift.stages.recipe import Recipe
from gradsift.store.artifact import Artifact
from gradsift.store.rows import RowStore, RowView
from gradsift.store.tensors import write_tensors
from gradsift.types import Signal


@dataclass(frozen=True)
class Sides:
    """What is multiplied, one entry per checkpoint: `pool` all rows, `target` those of `kept` [m],
    which all checkpoints have; `groups` [m] are theirs, `weights` the checkpoints' mean learning
    rates.
    """

    pool: list[RowStore]
    target: list[RowView]
    weights: list[float]
    kept: Tensor
    groups: list[str]

    @property
    def usable(self) -> Tensor:
        """bool [n]: pool rows that all checkpoints have."""
        return torch.stack([store.usable for store in self.pool]).all(dim=0)


def recipe(context: Context, signal: Signal) -> Recipe:
    """The scores themselves."""
    inputs, loss = {}, backend(str(signal.backend)).loss
    for c in context.used_checkpoints(signal):
        pool = rows.recipe(context, "pool", c, pool_transform(signal), loss, signal.adam_form)
        inputs[f"pool{c}"] = pool.digest
        inputs[f"target{c}"] = rows.recipe(context, "target", c, "none", loss).digest
    return Recipe(
        "influence",
        {"backend": signal.backend, "checkpoints": signal.checkpoints, **_ridge(context, signal)},
        inputs,
    )


def _ridge(context: Context, signal: Signal) -> dict[str, Any]:
    """The run's damping, for a backend that inverts the rows' own second moment."""
    settings = context.config.curvature
    return (
        {"ridge": settings.damping, "absolute": settings.absolute}
        if backend(str(signal.backend)).whiten
        else {}
    )


def recipes(context: Context, signal: Signal) -> list[Recipe]:
    """Every stage of an influence, in the order they are made."""
    both, loss = (
        [("pool", pool_transform(signal)), ("target", "none")],
        backend(str(signal.backend)).loss,
    )
    each = [
        rows.recipe(context, side, c, transform, loss, signal.adam_form)
        for side, transform in both
        for c in context.used_checkpoints(signal)
    ]
    return [context.warmup_recipe(), *each, recipe(context, signal)]


def sides(context: Context, signal: Signal) -> Sides:
    """The stored rows, made where they are missing. Raises UserError without a target, DataError
    for a target group without a usable row.
    """
    if "target" not in context.sides:
        raise UserError("influence needs a target", remedy="Add --target FILE.")
    wanted = context.encoded("target")
    checkpoints, used, loss = (
        context.checkpoints(),
        context.used_checkpoints(signal),
        backend(str(signal.backend)).loss,
    )
    transform, form = pool_transform(signal), signal.adam_form
    pool = [rows.gradients(context, "pool", c, transform, loss, form) for c in used]
    target = [rows.gradients(context, "target", c, "none", loss) for c in used]
    for a, b in zip(pool, target, strict=True):
        for name in ("projection", "dim", "seed", "modules"):
            if a.spec[name] != b.spec[name]:
                raise MismatchError(
                    f"pool and target rows differ in {name}: {a.spec[name]} and {b.spec[name]}"
                )
    good = torch.stack([store.usable for store in target]).all(dim=0)
    checks.check_groups(context.sides["target"], good, wanted)
    kept = good.nonzero()[:, 0]
    groups = [context.sides["target"].groups[int(i)] for i in kept]
    return Sides(
        pool,
        [RowView(store, kept) for store in target],
        [checkpoints[c].mean_lr for c in used],
        kept,
        groups,
    )


def value(context: Context, signal: Signal) -> tuple[Tensor, Tensor]:
    """Scores [n, m] of every pool row, zero where a row is quarantined, and which rows are not
    [n].
    """
    both = sides(context, signal)

    def fill(artifact: Artifact) -> None:
        scores = torch.cat(list(blocks(context, signal, both)))
        hash_ = write_tensors(
            artifact.path / "scores.safetensors",
            {"scores": scores, "target": both.kept},
            {"recipe": artifact.digest},
        )
        artifact.finish(files={"scores.safetensors": hash_}, counts={"rows": len(scores)})

    artifact = context.make(recipe(context, signal), fill)
    return artifact.tensors("scores.safetensors")["scores"], both.usable


def blocks(context: Context, signal: Signal, both: Sides) -> Iterator[Tensor]:
    """What `value` holds, 2,048 pool rows at a time, and nothing of it stored."""
    return score_blocks(
        both.pool,
        both.target,
        both.weights,
        str(signal.backend),
        groups=both.groups,
        **_ridge(context, signal),
    )
