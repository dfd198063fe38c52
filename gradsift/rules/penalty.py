"""Greedy choice by a score that is lowered around everything chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import (
    Picks,
    Rows,
    best,
    check_budget,
    check_finite,
    floating,
    gather,
    sizes,
    spans,
    stream,
    unit,
)

AHEAD = 64  # rows whose similarities are made in one pass


def diverse(
    difficulty: Any, rows: Rows, budget: int, *, neighbours: int = 10, gamma: float = 1.0
) -> Picks:
    """Repeat: take the row of the highest current difficulty, then lower that of its nearest
    remaining rows.

    difficulty [n], rows [n, d] (normalised inside). The `neighbours` remaining rows j of highest
    cosine s_j to the picked row i lose gamma * difficulty_i * s_j^2, with difficulty_i as it stands
    (so a negative one raises them; nothing is clamped). The gain of a pick is its difficulty at
    that moment and may be negative. Ties go to the lowest row; a larger budget only appends.
    Source: Self-Filter (Chen et al. 2024, section 3.3).

    Similarities are made for the 64 most difficult rows at a time and used while they last: one
    pass over the rows per batch. Raises ValueError for shapes that do not match, values that are
    not finite, a budget outside 0..n, neighbours < 0 or gamma < 0.
    """
    current = floating(difficulty, "difficulty", 1).cpu().clone()
    n, _ = sizes(rows)
    if len(current) != n:
        raise ValueError(f"difficulty has {len(current)} entries, there are {n} rows")
    budget = check_budget(budget, n)
    if neighbours < 0 or not gamma >= 0:
        raise ValueError(f"neighbours and gamma must be >= 0, got {neighbours} and {gamma}")
    for _, _, block in stream(rows):
        check_finite(block.sum(1), "rows")
    known: dict[int, Tensor] = {}
    picks, gains = [], []
    gone = torch.zeros(n, dtype=torch.bool)
    for _ in range(budget):
        pick = int(torch.where(gone, -torch.inf, current).argmax())
        worth = float(current[pick])
        picks.append(pick)
        gains.append(worth)
        gone[pick] = True
        if neighbours == 0 or gamma == 0 or len(picks) == n:
            continue
        if pick not in known:
            known = _similarities(rows, current, gone, pick)
        similarity = torch.where(gone, -torch.inf, known.pop(pick))
        near = best(similarity, min(neighbours, n - len(picks)))
        current[near] -= gamma * worth * similarity[near].to(current).square()
    return Picks(torch.tensor(picks, dtype=torch.int64), torch.tensor(gains, dtype=current.dtype))


def _similarities(rows: Rows, current: Tensor, gone: Tensor, pick: int) -> dict[int, Tensor]:
    """Cosines [n] of `pick` and of the rows most likely to be picked next, in one pass."""
    left = torch.where(gone, -torch.inf, current)
    ahead = best(left, min(AHEAD - 1, int((~gone).sum())))
    chosen = torch.cat([torch.tensor([pick]), ahead])
    directions = unit(gather(rows, chosen))
    out = torch.empty(len(chosen), rows.shape[0], dtype=directions.dtype)
    for (a, b), (_, _, block) in zip(spans(rows.shape[0]), stream(rows), strict=True):
        out[:, a:b] = (directions @ unit(block).T).cpu()
    return dict(zip(chosen.tolist(), out, strict=True))
