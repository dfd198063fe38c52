"""Stores of gradient rows: what share may be unusable, the weighted mean over checkpoints, the mean cosine, some of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsift.data.encode import EncodedRows
from gradsift.errors import DataError
from gradsift.methods.reading import Narrow
from gradsift.store.artifact import Artifact
from gradsift.store.packing import OUT_OF_MEMORY, QUARANTINE
from gradsift.store.rows import RowStore, RowView

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
    _check(int(store.usable.sum()), encoded, what, store.quarantined(), store.path)


def check_values(finite: Tensor, encoded: EncodedRows, what: str, failed: Mapping[str, int], artifact: Artifact) -> None:
    """The same for numbers that are not `finite` [n] where a row has none; `failed`: those of them whose reason is known."""
    fine = int((finite & torch.as_tensor(encoded.codes == 0)).sum())
    rest = int((encoded.codes == 0).sum()) - fine - sum(failed.values())
    _check(fine, encoded, what, {**failed, **({"not finite": rest} if rest else {})}, artifact.path)


def _check(usable: int, encoded: EncodedRows, what: str, reasons: Mapping[str, int], where: Path) -> None:
    expected = int((encoded.codes == 0).sum())
    if expected - usable > max(1, MOST_QUARANTINED * expected):
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        remedy = "Look at the model's dtype (bfloat16 or float32 instead of float16), the learning rate of the warm-up, and the rows."
        if reasons.get(QUARANTINE[OUT_OF_MEMORY]):
            remedy = "Encode with a smaller max_length, or use a machine with more memory. " + remedy
        raise DataError(f"{expected - usable:,} of {expected:,} rows have no usable {what} ({told})", where=where, remedy=remedy)


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
