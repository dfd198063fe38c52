"""The gradient walk of G2IS: follow neighbours that agree with each other and with a direction of
the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Rows, check_finite, floating, gather, sizes, stream, unit
from .topk import apportion

SCAN = 512  # rows looked at together when no neighbour passes
# of a cosine: what float32 rows leave of a right angle, or of an equal alignment, is no conflict
# and no loss
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Walk:
    """`indices` int64 [k], unique, in pick order; `component` int64 [k]: which direction each was
    picked for.
    """

    indices: Tensor
    component: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def gradient_walk(
    rows: Rows,
    components: Any,
    budgets: Sequence[int],
    neighbours: Any,
    *,
    consistency: float = 0.8,
    redistribute: bool = False,
) -> Walk:
    """For each direction in turn, walk the graph of rows [n, d] until its budget is spent or no row
    passes.

    components [c, d] (signed: orient them first), budgets [c], neighbours int [n, k], each row's
    nearest ones in descending similarity (-1 = none). All vectors are normalised inside. The walk
    of a direction starts at the unused row of highest signed product with it. From the row added
    last it takes the first neighbour that is unused, has a product >= 0 with every row of this walk
    (no conflict), and leaves |cos(G + row, direction)| >= consistency * |cos(G, direction)|, G the
    sum of the walk's unit rows. Both hold to `TOLERANCE`, so that rounding does not decide at a
    right angle: a row at 90 degrees is in no conflict. If no neighbour passes, all unused rows are
    tried under the same two tests, in descending product with the direction; if none of them does,
    the walk has ended.

    May return fewer rows than the budgets ask for. With `redistribute` the seats left by ended
    walks are shared out among the walks that have not ended, by budget, until none is left or every
    walk has ended; an ended walk never starts again, a budget of 0 never starts. Ties go to the
    lowest row. Source: G2IS (Zhao et al. 2025, appendix C); as released there is no redistribution,
    and the anchor is looked for in a list of 1,000 first, which comes to the same.

    Raises ValueError for shapes that do not match, values that are not finite, negative budgets or
    consistency, neighbours outside -1..n-1.
    """
    n, d = sizes(rows)
    directions = floating(components, "components", 2).cpu()
    graph = torch.as_tensor(neighbours).cpu()
    seats = [int(b) for b in budgets]
    if directions.shape[1] != d or len(seats) != len(directions) or min(seats, default=0) < 0:
        raise ValueError(
            f"components must be [c, {d}] with c budgets >= 0, got {list(directions.shape)} and"
            f" {seats}"
        )
    if (
        graph.ndim != 2
        or len(graph) != n
        or graph.is_floating_point()
        or (graph.numel() and not -1 <= int(graph.min()) <= int(graph.max()) < n)
    ):
        raise ValueError(
            f"neighbours must be row numbers [{n}, k] below {n}, got shape {list(graph.shape)},"
            f" {graph.dtype}"
        )
    if not consistency >= 0:
        raise ValueError(f"consistency must be >= 0, got {consistency}")
    directions = unit(directions.double())
    products = torch.cat(
        [unit(block).cpu().double() @ directions.T for _, _, block in stream(rows)]
    )
    check_finite(products, "rows")
    used = torch.zeros(n, dtype=torch.bool)
    walks = [
        _Path(rows, directions[c], products[:, c], graph, used, consistency)
        for c in range(len(seats))
    ]
    picks: list[int] = []
    origin: list[int] = []

    def advance(shares: Sequence[int]) -> None:
        for c, share in enumerate(shares):
            found = walks[c].extend(share)
            picks.extend(found)
            origin.extend([c] * len(found))

    advance(seats)
    while redistribute and len(picks) < min(n, sum(seats)):
        able = [float(seats[c]) if not walks[c].ended else 0.0 for c in range(len(seats))]
        if not any(able):
            break
        # every seat is taken, or a walk ends
        advance(apportion(min(n, sum(seats)) - len(picks), able))
    return Walk(torch.tensor(picks, dtype=torch.int64), torch.tensor(origin, dtype=torch.int64))


class _Path:
    """One direction's walk. `used` is shared by all of them."""

    def __init__(
        self,
        rows: Rows,
        direction: Tensor,
        products: Tensor,
        graph: Tensor,
        used: Tensor,
        consistency: float,
    ) -> None:
        self.rows, self.direction, self.products, self.graph, self.used = (
            rows,
            direction,
            products,
            graph,
            used,
        )
        self.consistency, self.ended = consistency, False
        self.members: list[Tensor] = []
        self.last = -1
        self.total = torch.zeros_like(direction)
        # rows that some member excludes: for good, as members only increase
        self.conflicts = torch.zeros(len(used), dtype=torch.bool)
        self.order: Tensor | None = None

    def extend(self, seats: int) -> list[int]:
        """Walk on for up to `seats` rows."""
        found: list[int] = []
        while len(found) < seats and not self.ended:
            row = self._next() if self.members else self._anchor()
            if row < 0:
                self.ended = True
                break
            vector = unit(gather(self.rows, torch.tensor([row])).cpu().double())[0]
            self.members.append(vector)
            self.total = self.total + vector
            self.used[row] = True
            self.last = row
            found.append(row)
        return found

    def _anchor(self) -> int:
        return (
            -1
            if bool(self.used.all())
            else int(torch.where(self.used, -torch.inf, self.products).argmax())
        )

    def _next(self) -> int:
        near = self.graph[self.last]
        row = self._first(near[near >= 0])
        if row >= 0:
            return row
        if self.order is None:
            self.order = self.products.sort(descending=True, stable=True).indices
        open_ = self.order[~(self.used | self.conflicts)[self.order]]
        for start in range(0, len(open_), SCAN):
            row = self._first(open_[start : start + SCAN])
            if row >= 0:
                return row
        return -1

    def _first(self, candidates: Tensor) -> int:
        """The first of `candidates` that passes both tests, or -1."""
        candidates = candidates[~(self.used | self.conflicts)[candidates]]
        if len(candidates) == 0:
            return -1
        vectors = unit(gather(self.rows, candidates).cpu().double())
        sums = vectors + self.total
        floor = self.consistency * self._alignment(self.total[None])
        steady = torch.nonzero(self._alignment(sums) >= floor - TOLERANCE).flatten()
        if len(steady) == 0:
            return -1
        agree = (vectors[steady] @ torch.stack(self.members).T >= -TOLERANCE).all(1)
        self.conflicts[candidates[steady[~agree]]] = True
        return int(candidates[steady[agree][0]]) if bool(agree.any()) else -1

    def _alignment(self, sums: Tensor) -> Tensor:
        return (unit(sums) @ self.direction).abs()
