"""How methods read stored rows: at their own length or at length 1, whole for a target, in blocks
for a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.rules import topk
from gradsift.rules.blocks import Unit, group_means, stream, unit
from gradsift.types import Rows, Signal, Signals, Subset

__all__ = [
    "Centred",
    "Unit",
    "blocks",
    "by_turns",
    "finite",
    "group_means",
    "mean",
    "nearest_by_turns",
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


def nearest_by_turns(
    scores: Tensor,
    target_groups: Sequence[str],
    budget: int,
    aggregate: Literal["rows", "groups", "max"],
    taken: Literal["lose", "next"],
) -> Subset:
    """Rows of highest scores [n, m] for a target row, each of a group in `target_groups` [m]: the
    target rows take turns, or the groups by the best of their rows, or the highest of all count.

    Returns:
        The rows in pick order. Gain: the score for whose turn it was. Notes: score [n], the best of
        a row; nearest_group [n], whose that is, for a pick whose turn it was.
    """
    columns = list(target_groups) or ["target"] * scores.shape[1]
    groups = list(dict.fromkeys(columns))
    of = torch.tensor([groups.index(group) for group in columns])
    by_group = torch.stack([scores[:, of == g].amax(dim=1) for g in range(len(groups))], dim=1)
    best, which = by_group.max(dim=1)
    score, why = best.numpy(), np.array([groups[g] for g in which.tolist()], dtype=object)
    if aggregate == "max":
        indices = topk.top(best, budget).numpy()
        gains = score[indices]
    else:
        by_row = aggregate == "rows"
        indices, gains, turn = by_turns(scores if by_row else by_group, budget, taken=taken)
        why[indices] = [columns[c] if by_row else groups[c] for c in turn]
    return Subset(indices=indices, gains=gains, notes={"score": score, "nearest_group": why})


def products(rows: Rows, columns: Tensor) -> Tensor:
    """Cosines of rows [n, d] with columns [c, d] (normalised here), fp32 [n, c]; 0 for a zero
    row.
    """
    directions = unit(columns.float())
    return torch.cat(
        [(unit(block) @ directions.T.to(block.device)).cpu() for _, block in blocks(rows)]
    )
