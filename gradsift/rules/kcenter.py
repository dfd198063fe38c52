"""Farthest-first traversal (greedy k-center)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks import Rows, check_budget, check_finite, check_rng, gather, sizes, stream

if TYPE_CHECKING:
    import numpy as np

PENDING = 64  # chosen rows whose distances are brought up to date in one pass
# Squared distances below this share of |x|^2 + |c|^2 are rounding of the arithmetic (float16 rows
# in float32: 2.5e-7): zero.
NOISE = {torch.float32: 1e-6, torch.float64: 1e-14}


def farthest_first(
    rows: Rows, budget: int, *, start: int | None = None, rng: np.random.Generator
) -> Tensor:
    """Begin at `start` (None: a row drawn from `rng`) and add the row farthest from all chosen ones
    -> int64 [budget], in pick order.

    Euclidean distance of the rows as they are; ties, and rows that coincide with chosen ones (to a
    thousandth of their length in float32, a ten-millionth in float64), go to the lowest index. A
    larger budget with the same start only appends. Source: Gonzalez 1985; Sener & Savarese 2018,
    algorithm 1 (k-Center-Greedy).

    Distances only shrink, so what is known of a row bounds its distance from above: the farthest
    candidates are kept exact among themselves, and the whole pool is brought up to date once per 64
    picks or when a bound of the rest reaches the best candidate. Raises ValueError for a budget
    outside 0..n, a start outside the rows, and rows that are not finite.
    """
    n, _ = sizes(rows)
    budget = check_budget(budget, n)
    if start is not None and not 0 <= start < n:
        raise ValueError(f"start must be a row number below {n}, got {start}")
    if budget == 0:
        return torch.empty(0, dtype=torch.int64)
    squares = torch.cat([block.square().sum(1).cpu() for _, _, block in stream(rows)])
    check_finite(squares, "rows")
    picks = [int(check_rng(rng).integers(n)) if start is None else int(start)]
    # squared distance to the nearest chosen row, from above; -1 = chosen
    bound = torch.full((n,), torch.inf, dtype=squares.dtype)
    bound[picks[0]] = -1
    pending = 0  # picks[pending:] have not been applied to `bound`
    while len(picks) < budget:
        _apply(rows, squares, bound, torch.tensor(picks[pending:]))
        pending = len(picks)
        pool = torch.sort(bound, descending=True, stable=True).indices[: 8 * PENDING]
        rest = bound.clone()
        rest[pool] = -2
        ceiling, first = float(rest.max()), int(rest.argmax())
        points = gather(rows, pool)
        exact = bound[pool].clone()
        while len(picks) < budget and len(picks) - pending < PENDING:
            top = float(exact.max())
            tied = pool[exact == top]
            pick = int(tied.min())
            if top < 0 or top < ceiling or (top == ceiling and first < pick):
                break
            picks.append(pick)
            bound[pick] = -1
            place = int((pool == pick).nonzero()[0])
            distance = _distance(
                points, squares[pool], points[place : place + 1], squares[pick : pick + 1]
            )[:, 0]
            exact = torch.minimum(exact, distance)
            exact[bound[pool] < 0] = -1
    return torch.tensor(picks, dtype=torch.int64)


def _apply(rows: Rows, squares: Tensor, bound: Tensor, new: Tensor) -> None:
    centres = gather(rows, new)
    for a, b, block in stream(rows):
        nearest = _distance(block, squares[a:b], centres, squares[new]).min(1).values
        bound[a:b] = torch.where(bound[a:b] < 0, bound[a:b], torch.minimum(bound[a:b], nearest))


def _distance(
    points: Tensor, point_squares: Tensor, centres: Tensor, centre_squares: Tensor
) -> Tensor:
    both = point_squares[:, None] + centre_squares
    distance = both - 2 * (points @ centres.T).cpu()
    return torch.where(
        distance > NOISE[distance.dtype] * both, distance, torch.zeros_like(distance)
    )
