"""BIDS on the published small case and on invariants."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.methods import make
from gradsift.types import Signal, Subset
from tests.methods.vectors import choose, random_rows

SMALL = torch.tensor([[10, 0, 0], [9, 0, 0.1], [0, 1, 0], [0, 0, 0.5], [1, 0.2, 0.1]])


def bids(
    scores: Tensor, budget: int, standardise: bool = True, groups: tuple[str, ...] = ()
) -> Subset:
    return choose(make("bids", {"standardise": standardise}), scores, None, budget, groups=groups)


def naive(scores: Tensor, budget: int) -> list[int]:
    """Every row evaluated for every pick."""
    values = scores.double().numpy()
    values = (values - values.mean(0)) / values.std(0, ddof=1)
    picks: list[int] = []
    while len(picks) < budget:
        gap = (values - (values[picks].mean(0) if picks else 0)).max(axis=1)
        gap[picks] = -np.inf
        picks.append(int(gap.argmax()))
    return picks


def test_order_and_gains_of_the_small_case() -> None:  # T4.1
    chosen = bids(SMALL, 5)
    # taking the best row of the worst column (T4.3) would give 0, 3, 2, 1, 4
    assert chosen.indices.tolist() == [2, 3, 0, 1, 4]
    assert chosen.gains is not None
    assert np.allclose(chosen.gains, [1.75281, 2.41121, 1.98030, 1.12217, -0.11532], atol=1e-4)
    assert bids(SMALL, 5, standardise=False).indices.tolist() == [0, 2, 1, 3, 4]


def test_each_preset_reads_its_influence() -> None:
    plain = Signal("influence", transform="none", checkpoints="last", backend="less")
    of_less = Signal("influence", transform="backend", checkpoints="mean", backend="less")
    assert make("bids").needs() == {plain}
    assert (
        make("bids", {"preset": "paper"}).needs()
        == {of_less}
        == make("less", {"backend": "less"}).needs()
    )
    # the released features of LESS have their own form of Adam's step
    assert make("less", {"preset": "released"}).needs() == {
        dataclasses.replace(of_less, adam_form="released")
    }
    assert make("bids", {"backend": "ekfac"}).needs() == {
        dataclasses.replace(of_less, backend="ekfac")
    }
    assert make(
        "bids", {"preset": "paper", "transform": "none", "checkpoints": "last"}
    ).needs() == {plain}
    assert make(
        "less", {"preset": "released", "transform": "none", "checkpoints": "last"}
    ).needs() == {plain}


def test_scale_and_shift_of_a_column_change_nothing() -> None:  # T4.2
    scores = random_rows(60, 5, 1)
    moved = scores * torch.tensor([1.0, 100.0, 0.01, 3.0, 1.0]) + torch.tensor(
        [0.0, 5.0, -0.2, 40.0, 1.0]
    )
    assert bids(scores, 25).indices.tolist() == bids(moved, 25).indices.tolist()


def test_one_column_is_plain_ranking_and_budgets_nest() -> None:  # T4.4
    column = random_rows(40, 1, 2)
    assert bids(column, 12).indices.tolist() == column[:, 0].argsort(descending=True)[:12].tolist()
    scores = random_rows(50, 4, 3)
    assert bids(scores, 9).indices.tolist() == bids(scores, 30).indices.tolist()[:9]


def test_specialists_of_two_tasks_are_taken_in_pairs() -> None:  # T4.5
    scores = torch.tensor([[2.0, -1.0]] * 5 + [[-1.0, 2.0]] * 5)
    kinds = [int(i >= 5) for i in bids(scores, 10).indices]
    assert all(sorted(kinds[a : a + 2]) == [0, 1] for a in range(0, 10, 2))


def test_picks_are_those_of_evaluating_every_row() -> None:
    scores = random_rows(120, 7, 4)
    assert bids(scores, 60).indices.tolist() == naive(scores, 60)


def test_notes_say_how_far_each_row_stands_above_the_final_means_and_for_which_group() -> None:
    # the last column is constant
    scores = torch.cat([random_rows(30, 4, 5), torch.full((30, 1), 0.3)], dim=1)
    chosen = bids(scores, 6, groups=("a", "b", "b", "c", "constant"))
    values = scores[:, :4].double().numpy()
    values = (values - values.mean(0)) / values.std(0, ddof=1)
    gap = values - values[chosen.indices].mean(0)
    assert np.allclose(chosen.notes["score"], gap.max(1))
    assert chosen.notes["nearest_group"].tolist() == [
        ("a", "b", "b", "c")[j] for j in gap.argmax(1)
    ]
    assert np.allclose(chosen.notes["influence"], scores.amax(1))


def test_rows_that_are_all_alike_are_said_to_be() -> None:
    chosen = bids(torch.ones(6, 3) * torch.tensor([0.1, 0.2, 0.3]), 4)
    assert chosen.indices.tolist() == [0, 1, 2, 3] and "same influence" in chosen.notes["note"]


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        bids(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), 1)
