"""Stores of gradient rows: what share may be unusable, the weighted mean over checkpoints, the mean cosine, some of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsift.encode import EncodedRows
from gradsift.errors import DataError
from gradsift.methods.reading import Narrow
from gradsift.store import RowStore, RowView

MOST_QUARANTINED = 0.05  # share of the encoded rows whose gradient may be unusable before a stage stops
_FEW = 128  # rows read at a time: what they take in fp32 adds to the peak of the stage that just made them


class Scaled:
    """Stored unit rows times their norms: the rows as they were before the store normalised them."""

    def __init__(self, store: RowStore) -> None:
        self.store, self.shape = store, store.shape

    def __getitem__(self, rows: slice) -> Tensor:
        return self.store[rows].float() * self.store.scales[rows, None]


def check_quarantine(store: RowStore, encoded: EncodedRows, what: str = "gradient") -> None:
    """Raises DataError when more than 5 % of the encoded rows have no usable gradient (or `what` else the store holds).

    That many are a sign that model or data are wrong.
    """
    expected = int((encoded.codes == 0).sum())
    lost = expected - int(store.usable.sum())
    if lost > max(1, MOST_QUARANTINED * expected):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in store.quarantined().items())
        remedy = "Look at the model's dtype (bfloat16 or float32 instead of float16), the learning rate of the warm-up, and the rows."
        raise DataError(f"{lost:,} of {expected:,} rows have no usable {what} ({reasons})", where=store.path, remedy=remedy)


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


def restrict(value: Any, kept: Tensor) -> Any:
    """The rows `kept` of a signal's value: numbers, rows, or a list of rows."""
    if isinstance(value, list):
        return [restrict(rows, kept) for rows in value]
    return value[kept] if isinstance(value, Tensor) else RowView(value, kept)


def narrowed(value: Any, dim: int | None) -> Any:
    """Rows, or a list of them, that are wider than `dim` projected to it; anything else as it is."""
    if isinstance(value, list):
        return [narrowed(rows, dim) for rows in value]
    return Narrow(value, dim) if dim is not None and value.shape[1] > dim else value
