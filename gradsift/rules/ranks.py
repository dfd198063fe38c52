"""Rank correlation of two columns of numbers."""

from __future__ import annotations

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over the pairs where both are finite, ties at their mean rank; NaN where one
    side is constant.
    """
    good = np.isfinite(a) & np.isfinite(b)
    if good.sum() < 2:
        return float("nan")
    x, y = _mean_ranks(a[good]), _mean_ranks(b[good])
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
