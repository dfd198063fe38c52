"""Greedy choice that keeps several targets equally well served."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import Picks, best, check_budget, check_finite, spans

WINDOW = 8192  # rows of highest value that are looked at more closely
HEAD = 32  # rows evaluated before the bounds are asked how many more are needed


def greedy(influence: Any, budget: int, *, standardise: bool = True) -> Picks:
    """Repeat: add the row i with the largest max_j (Z_ij - mean over the chosen rows of Z_sj);
    nothing chosen yet = mean 0.

    influence [n, m], positive = row i helps target j; Z is it with every column brought to mean 0
    and sample standard deviation 1 (n - 1) over all rows, constant columns left out.
    `standardise=False` takes the columns as they are. The gain of a pick is how far the row was
    above that mean in its best column. Ties go to the lowest row; a larger budget only appends.
    Source: BIDS (Dai et al. 2025, section 4, algorithm 1; the mean of the empty set is not
    specified there).

    The picks are those of evaluating every row every time, without doing so: a row's value can rise
    by at most the largest fall of a column mean since it was last evaluated, and the means move
    slowly. On the CPU; a copy of `influence` in memory. Raises ValueError for values that are not
    finite, a budget outside 0..n, and when every column is constant.
    """
    scores = torch.as_tensor(influence).detach()
    scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    if scores.ndim != 2 or min(scores.shape) < 1:
        raise ValueError(
            f"influence must have shape [n, m] with n, m >= 1, got {list(scores.shape)}"
        )
    budget = check_budget(budget, len(scores))
    check_finite(scores.sum(1, dtype=torch.float64), "influence")
    scores = _standardised(scores.cpu()) if standardise else scores.cpu()
    queue = _Queue(scores)
    picks = [queue.pop() for _ in range(budget)]
    indices = torch.tensor([row for row, _ in picks], dtype=torch.int64)
    return Picks(indices, torch.tensor([gain for _, gain in picks], dtype=scores.dtype))


def _standardised(scores: Tensor) -> Tensor:
    n, m = scores.shape
    total, squares = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    for a, b in spans(n):
        total += scores[a:b].sum(0, dtype=torch.float64)
    mean = total / n
    for a, b in spans(n):
        squares += (scores[a:b].double() - mean).square().sum(0)
    deviation = (squares / max(n - 1, 1)).sqrt()
    least, most = scores.amin(0), scores.amax(0)
    noise = 4 * torch.finfo(scores.dtype).eps * torch.maximum(least.abs(), most.abs()).double()
    kept = torch.nonzero(deviation > noise).flatten()
    if len(kept) == 0:
        raise ValueError("every column of influence is constant: there is nothing to balance")
    out = torch.empty(n, len(kept), dtype=scores.dtype)
    for a, b in spans(n):
        out[a:b] = (scores[a:b, kept].double() - mean[kept]) / deviation[kept]
    return out


class _Queue:
    """The rows still open, by bounds on their value max_j (Z_ij - mean_j).

    Two references: the means at which all rows were last evaluated (`pool_means`), and those at
    which the window, the WINDOW best rows then, was (`near_means`). A value is at most the
    evaluated one plus the largest fall of a mean since. Comparisons leave room for rounding, and
    what decides is always evaluated afresh, so the picks do not depend on the bookkeeping.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores.numpy()
        self.open = np.ones(len(self.scores), dtype=bool)
        self.total, self.count = np.zeros(self.scores.shape[1]), 0
        self.means = np.zeros(self.scores.shape[1], dtype=self.scores.dtype)
        self.slack = 8 * float(np.finfo(self.scores.dtype).eps * np.abs(self.scores).max())
        self._evaluate_pool()

    def pop(self) -> tuple[int, float]:
        """Take out the open row of highest value -> (row, value)."""
        row, value = self._best_near()
        if self.ceiling + self._fall(self.pool_means) + self.slack >= value:
            self._evaluate_pool()
            row, value = self._best_near()
        self.open[row] = False
        place = int(np.flatnonzero(self.near == row)[0])
        self.near, self.values = np.delete(self.near, place), np.delete(self.values, place)
        self.total += self.scores[row]
        self.count += 1
        self.means = (self.total / self.count).astype(self.scores.dtype)
        return row, value

    def _best_near(self) -> tuple[int, float]:
        if len(self.near) == 0:
            self._evaluate_pool()
        fall = self._fall(self.near_means)
        exact = self._evaluate(self.near[:HEAD])
        reach = float(exact.max()) - fall - self.slack
        more = int(np.searchsorted(-self.values, -reach, side="right"))
        if more > HEAD:
            exact = np.concatenate([exact, self._evaluate(self.near[HEAD:more])])
            self.work += more
        if self.work > 2 * len(self.near):
            self._evaluate_near()
            return int(self.near[0]), float(self.values[0])
        value = exact.max()
        return int(self.near[: len(exact)][exact == value].min()), float(value)

    def _fall(self, reference: np.ndarray) -> float:
        return float((reference.astype(np.float64) - self.means).max())

    def _evaluate(self, rows: np.ndarray) -> np.ndarray:
        return (self.scores[rows] - self.means).max(axis=1)

    def _evaluate_near(self) -> None:
        values = self._evaluate(self.near)
        order = np.lexsort((self.near, -values))
        self.near, self.values, self.near_means, self.work = (
            self.near[order],
            values[order],
            self.means,
            0,
        )

    def _evaluate_pool(self) -> None:
        values = np.full(len(self.scores), -np.inf, dtype=self.scores.dtype)
        for a, b in spans(len(values)):
            values[a:b] = (self.scores[a:b] - self.means).max(axis=1)
        values[~self.open] = -np.inf
        count = min(WINDOW, int(self.open.sum()))
        self.near = best(torch.from_numpy(values), count).numpy()
        self.values = values[self.near]
        values[self.near] = -np.inf
        self.ceiling = float(values.max())
        self.pool_means = self.near_means = self.means
        self.work = 0
