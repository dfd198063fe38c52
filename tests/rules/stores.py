"""Rows that are not a Tensor, for tests: only `.shape` and slices, as a store has."""

from __future__ import annotations

from torch import Tensor


class Sliced:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.shape = tuple(rows.shape)
        self.widest = 0

    def __getitem__(self, rows: slice, /) -> Tensor:
        assert isinstance(rows, slice)
        assert rows.step is None
        block = self.rows[rows]
        self.widest = max(self.widest, len(block))
        return block
