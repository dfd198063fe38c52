"""Rules on plain scores: the best rows, means within groups, whole-number shares, and taking
turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from .blocks import best, check_budget, floating, spans


def top(scores: Any, budget: int) -> Tensor:
    """The `budget` highest of `scores` [n], best first, ties to the lowest row -> int64 [budget].

    Raises ValueError for a budget outside 0..n and for scores that are not finite.
    """
    values = floating(scores, "scores", 1)
    return best(values, check_budget(budget, len(values))).cpu()


def group_scores(scores: Any, groups: Sequence[Any]) -> Tensor:
    """Mean score within each group of columns: scores [n, m], groups [m] (names or numbers) -> [n,
    g] on the CPU.

    Columns of the result are in the order in which the groups first appear. LESS ranks a row by the
    maximum over them (Xia et al. 2024, section 4.2, as released: mean of the cosines within a
    subtask, then max over subtasks). Raises ValueError when `groups` does not name every column.
    """
    values = floating(scores, "scores", 2)
    names = groups.tolist() if hasattr(groups, "tolist") else list(groups)  # type: ignore[union-attr]
    n, m = values.shape
    if len(names) != m or m == 0:
        raise ValueError(f"groups must name each of the {m} columns of scores, got {len(names)}")
    columns = {name: i for i, name in enumerate(dict.fromkeys(names))}
    members = torch.zeros(m, len(columns), dtype=torch.float64, device=values.device)
    for j, name in enumerate(names):
        members[j, columns[name]] = 1
    members /= members.sum(0)
    out = torch.empty(n, len(columns), dtype=values.dtype)
    for a, b in spans(n):
        out[a:b] = (values[a:b].double() @ members).to(values.dtype).cpu()
    return out


def apportion(
    total: int, weights: Sequence[float] | Any, capacity: Sequence[int] | Any | None = None
) -> list[int]:
    """Share `total` whole seats in proportion to `weights` [c] by the largest remainder -> list of
    c ints that sums to `total`.

    Exact: weights are taken as the fractions they are, ties go to the lowest index. `capacity` [c]
    bounds every share; what a full one cannot take is shared again among the others by the same
    rule (equally, once only zero weights have room). Raises ValueError for negative or non-finite
    weights, weights that are all zero, or a capacity that sums to less than `total`.
    """
    shares = [
        Fraction(w) if isinstance(w, (int, Fraction)) else _fraction(float(w)) for w in weights
    ]
    if isinstance(total, bool) or int(total) != total or total < 0:
        raise ValueError(f"total must be a whole number >= 0, got {total!r}")
    total = int(total)
    if any(w < 0 for w in shares) or (total > 0 and sum(shares) == 0):
        raise ValueError("weights must be >= 0 and not all zero")
    room = [total] * len(shares) if capacity is None else [int(c) for c in capacity]
    if len(room) != len(shares) or any(c < 0 for c in room):
        raise ValueError(
            f"capacity must hold one whole number >= 0 for each of the {len(shares)} weights, got"
            f" {room}"
        )
    if sum(room) < total:
        raise ValueError(f"capacity sums to {sum(room)}, less than the total of {total}")
    seats = [0] * len(shares)
    while (left := total - sum(seats)) > 0:
        open_ = [i for i in range(len(shares)) if seats[i] < room[i]]
        weight = sum(shares[i] for i in open_)
        exact = {
            i: left * shares[i] / weight if weight else Fraction(left, len(open_)) for i in open_
        }
        full = [i for i in open_ if exact[i] >= room[i] - seats[i]]
        if full and capacity is not None:
            for i in full:
                # fill these to the brim first; the rest is shared again among fewer, so the loop
                # ends
                seats[i] = room[i]
            continue
        extra = left - sum(int(exact[i]) for i in open_)
        for i in open_:
            seats[i] += int(exact[i])
        for i in sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i))[:extra]:
            seats[i] += 1
    return seats


def _fraction(weight: float) -> Fraction:
    try:
        return Fraction(weight)
    except (ValueError, OverflowError):
        raise ValueError(f"weights must be finite, got {weight}") from None


@dataclass(frozen=True)
class Turns:
    """`indices` int64 [k], unique, in pick order; `column` int64 [k]: whose turn each was."""

    indices: Tensor
    column: Tensor


def round_robin(scores: Any, budget: int, *, taken: Literal["lose", "next"] = "next") -> Turns:
    """Columns of scores [n, m] take turns, 0 to m - 1 and again.

    taken: "lose" = in round r a column names its r-th best row, and has lost the turn where
    another column has that row already; "next" = it takes its best row that nobody has. Ties go
    to the lowest row. A larger budget only appends.

    Source: "lose" is algorithm 1 of RDS+ (Ivison et al. 2025) with its duplicates removed; "next"
    is the same with no turn lost. Raises ValueError for a budget outside 0..n and for scores that
    are not finite.
    """
    values = floating(scores, "scores", 2)
    n, m = values.shape
    budget = check_budget(budget, n)
    if budget and m == 0:
        raise ValueError("scores has no columns to take turns")
    # how far each column is sorted; doubled when it runs out
    depth = [min(n, 2 * (budget // max(m, 1)) + 16)] * m
    queues: list[list[int]] = [[] for _ in range(m)]
    places = [0] * m
    free = [True] * n
    picks: list[int] = []
    origin: list[int] = []

    def named(j: int) -> int:
        """The next row in column j's own order."""
        if places[j] == len(queues[j]):
            depth[j] = depth[j] if not queues[j] else min(n, 2 * depth[j])
            queues[j] = best(values[:, j], depth[j]).tolist()
        places[j] += 1
        return queues[j][places[j] - 1]

    j = 0
    while len(picks) < budget:
        row = named(j)
        while taken == "next" and not free[row]:
            row = named(j)
        if free[row]:
            free[row] = False
            picks.append(row)
            origin.append(j)
        j = (j + 1) % m
    return Turns(*(torch.tensor(found, dtype=torch.int64) for found in (picks, origin)))
