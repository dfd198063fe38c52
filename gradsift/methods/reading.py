"""How methods read stored rows: at their own length or at length 1, whole for a target, in blocks
for a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.rules import topk
from gradsift.rules.blocks import Unit, group_means, stream, unit
from gradsift.types import Rows, Signal, Signals

__all__ = [
    "Centred",
    "Unit",
    "blocks",
    "by_turns",
    "finite",
    "group_means",
    "mean",
    "products",
    "whole",
]


class Centred:
    """Rows at length 1, less the mean of all of them: what is left when the part that every row
    shares is taken out.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = Unit(rows)
        self.shape, self.mean = self.rows.shape, mean(self.rows).float()

    def __getitem__(self, where: slice) -> Tensor:
        block = self.rows[where]
        return block - self.mean.to(block.device)


def blocks(rows: Rows) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 rows) of every 2,048 rows, in order."""
    for start, _, block in stream(rows):
        yield start, block.float()


def finite(signals: Signals, signal: Signal, *, below: bool = False) -> Tensor:
    """A signal's scores [n] or [n, m] as they are; `below`: -infinity may stand for what is never
    to be taken.

    Raises ValueError that names the signal and says how many rows are not finite.
    """
    scores = torch.as_tensor(signals[signal])
    bad = ~(torch.isfinite(scores) | torch.isneginf(scores) if below else torch.isfinite(scores))
    if bad.any():
        raise ValueError(
            f"{signal.name} is NaN or infinite in"
            f" {int(bad.reshape(len(bad), -1).any(dim=1).sum()):,} of {len(bad):,} rows"
        )
    return scores


def whole(rows: Rows) -> Tensor:
    """All rows, fp32 [m, d]: for a target, which is small."""
    return torch.cat([block for _, block in blocks(rows)])


def mean(rows: Rows) -> Tensor:
    """The mean row, fp64 [d]."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _, block in blocks(rows):
        total += block.sum(dim=0, dtype=torch.float64).cpu()
    return total / rows.shape[0]


def by_turns(
    columns: Tensor, budget: int, *, taken: Literal["lose", "next"] = "next"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns [n, m] take turns as `rules.topk.round_robin` says: (rows in pick order, each one's
    score in the column whose turn it was, that column).
    """
    turns = topk.round_robin(columns, budget, taken=taken)
    gains = columns[turns.indices, turns.column].double()
    return turns.indices.numpy(), gains.numpy(), turns.column.numpy()


def products(rows: Rows, columns: Tensor) -> Tensor:
    """Cosines of rows [n, d] with columns [c, d] (normalised here), fp32 [n, c]; 0 for a zero
    row.
    """
    directions = unit(columns.float())
    return torch.cat(
        [(unit(block) @ directions.T.to(block.device)).cpu() for _, block in blocks(rows)]
    )
