"""Gradient rows as stages: the rows of one side at one checkpoint, and their mean over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradsift.gradients.adam import Adam
from gradsift.model.checkpoints import read_adam_state
from gradsift.store.rows import RowStore
from gradsift.types import Checkpoint

_FEW = 128  # rows read at a time: what they take in fp32 adds to the peak of the stage that just made them


def adam_transform(
    checkpoint: Checkpoint, form: Any = "released", *, momentum: bool = True, base: nn.Module | None = None, force: bool = False
) -> Adam:
    """The Adam transform at a checkpoint with the run's own betas, eps and number of updates; without `momentum`, with beta1 = 0."""
    state = read_adam_state(checkpoint, base=base, force=force)
    betas = state.betas if momentum else (0.0, state.betas[1])
    return Adam(state.m, state.v, state.step, betas, state.eps, form=form)


def fill_mean(mean: RowStore, stores: Sequence[RowStore], weights: Sequence[float]) -> None:
    """Fills `mean` with sum_t weights_t * unit row_t; a row that any checkpoint quarantined is zero, and so quarantined. Other columns are
    the last checkpoint's."""
    for shard in mean.missing():
        where = mean.shards[shard]
        rows = torch.zeros(where.stop - where.start, mean.shape[1])
        for weight, store in zip(weights, stores, strict=True):
            rows += weight * store[where].float()
        rows[~torch.stack([store.usable[where] for store in stores]).all(dim=0)] = 0
        last = stores[-1]
        mean.write(shard, rows, norms=last.norms[where], losses=last.losses[where], tokens=last.tokens[where])


def mean_pairwise_cosine(store: RowStore) -> float:
    """Mean cosine over all pairs of different usable rows: (|sum|^2 - n) / (n (n - 1)). High = a large component shared by all rows."""
    total, count = torch.zeros(store.shape[1], dtype=torch.float64), int(store.usable.sum())
    for start in range(0, store.shape[0], _FEW):
        total += store[start : start + _FEW].float().sum(dim=0).double()
    return float((total @ total - count) / max(count * (count - 1), 1))
