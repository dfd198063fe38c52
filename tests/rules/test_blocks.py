"""How rules read rows: in stretches, at unit length, at the length they had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradsift.rules.blocks import Raw, Unit, gather, group_means, take


class Counted:
    """Rows that are not a Tensor, and the slices that were read of them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shape = rows, tuple(rows.shape)
        self.read: list[tuple[int, int]] = []

    def __getitem__(self, where: slice) -> Tensor:
        self.read.append((where.start, where.stop))
        return self.rows[where]


ROWS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize(
    "indices", [[], [7], [3, 4, 5], [9, 3, 4, 3], [59, 0, 30, 31, 33], list(range(59, -1, -1))]
)
@pytest.mark.parametrize("reach", [1, 16])
def test_taken_rows_are_the_indexed_ones(indices: list[int], reach: int) -> None:
    at = torch.tensor(indices, dtype=torch.int64)
    for rows in (ROWS, Counted(ROWS)):
        taken = take(rows, at, reach=reach)
        assert taken.dtype == torch.float16 and torch.equal(taken, ROWS[at])
        gathered = gather(rows, at)
        assert gathered.dtype == torch.float32 and torch.equal(gathered, ROWS[at].float())


def test_a_gap_within_reach_is_read_and_one_beyond_it_is_not() -> None:
    at = torch.tensor([20, 3, 5, 21])
    near, far = Counted(ROWS), Counted(ROWS)
    take(near, at, reach=2)
    take(far, at)
    assert near.read == [(3, 6), (20, 22)]
    assert far.read == [(3, 4), (5, 6), (20, 22)]


def test_a_unit_row_has_length_one_and_a_zero_row_stays_zero() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -0.5]])
    assert torch.equal(Unit(rows)[0:3], torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]))


def test_raw_rows_are_unit_rows_times_their_scales() -> None:
    stored = Counted(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).half())
    assert torch.equal(Raw(stored)[0:2], torch.eye(2))
    stored.scales = torch.tensor([2.0, 0.25])  # type: ignore[attr-defined]
    assert torch.equal(Raw(stored)[1:2], torch.tensor([[0.0, 0.25]]))


def test_group_means_are_named_in_order_of_appearance() -> None:
    means, names = group_means(torch.tensor([[2.0], [4.0], [10.0]]), ["b", "b", "a"])
    assert names == ["b", "a"] and means.tolist() == [[3.0], [10.0]]
    assert group_means(torch.tensor([[2.0], [4.0]]), [])[0].tolist() == [[3.0]]
