from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradsift.rules import balance

TABLE = torch.tensor([[10.0, 0, 0], [9, 0, 0.1], [0, 1, 0], [0, 0, 0.5], [1, 0.2, 0.1]])


def naive(scores: torch.Tensor, budget: int) -> tuple[list[int], list[float]]:
    """Every row evaluated every time, with the same arithmetic for one value."""
    values, total = scores.numpy(), np.zeros(scores.shape[1])
    picks: list[int] = []
    gains: list[float] = []
    for turn in range(budget):
        mean = (total / max(turn, 1)).astype(values.dtype)
        worth = (values - mean).max(1)
        worth[picks] = -np.inf
        picks.append(int(worth.argmax()))
        gains.append(float(worth.max()))
        total += values[picks[-1]]
    return picks, gains


def test_table_of_five_rows():
    """methods.md T4.1; T4.3 is the order this must not give."""
    found = balance.greedy(TABLE, 5)
    assert found.indices.tolist() == [2, 3, 0, 1, 4] != [0, 3, 2, 1, 4]
    assert found.gains.tolist() == pytest.approx(
        [1.75281, 2.41121, 1.98030, 1.12217, -0.11532], abs=1e-5
    )
    assert balance.greedy(TABLE, 5, standardise=False).indices.tolist() == [0, 2, 1, 3, 4]


def test_scale_and_offset_of_a_column_do_not_matter():
    """methods.md T4.2."""
    scores = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = balance.greedy(scores, 40).indices
    moved = balance.greedy(
        scores * torch.tensor([1, 9, 0.1, 3, 1e4]) + torch.tensor([0, 5.0, -2, 100, 0]), 40
    ).indices
    assert torch.equal(plain, moved)


def test_one_column_is_a_ranking_and_budgets_are_prefixes():
    """methods.md T4.4."""
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert (
        balance.greedy(scores[:, :1], 50).indices.tolist()
        == scores[:, 0].argsort(descending=True).tolist()
    )
    long = balance.greedy(scores, 50).indices.tolist()
    for budget in (0, 1, 17, 50):
        assert balance.greedy(scores, budget).indices.tolist() == long[:budget]


def test_specialists_of_two_tasks_are_taken_in_pairs():
    """methods.md T4.5."""
    scores = torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).repeat_interleave(6, 0)
    picks = balance.greedy(scores, 12, standardise=False).indices.reshape(6, 2)
    assert ((picks < 6).sum(1) == 1).all()


@given(
    scores=arrays(
        np.float32,
        st.tuples(st.integers(2, 30), st.integers(1, 6)),
        elements=st.integers(-4, 4).map(float),
    ),
    window=st.sampled_from([1, 3, 8192]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_matches_evaluating_every_row(scores, window, data):
    values = torch.from_numpy(scores)
    budget = data.draw(st.integers(0, len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "WINDOW", window)
        patch.setattr(balance, "HEAD", 2)
        found = balance.greedy(values, budget, standardise=False)
    picks, gains = naive(values, budget)
    assert found.indices.tolist() == picks
    assert found.gains.tolist() == pytest.approx(gains)


@pytest.mark.parametrize("window", [40, 8192])
def test_matches_evaluating_every_row_on_many_rows(window, monkeypatch):
    monkeypatch.setattr(balance, "WINDOW", window)
    scores = torch.randn(3000, 12, generator=torch.Generator().manual_seed(2)).exp()
    standard = (scores.double() - scores.double().mean(0)) / scores.double().std(0)
    found = balance.greedy(scores, 600)
    picks, _ = naive(standard.float(), 600)
    assert found.indices.tolist() == picks


def test_permuting_rows_permutes_the_picks_and_constant_columns_are_left_out():
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    plain = balance.greedy(scores, 25).indices
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4))
    assert torch.equal(order[balance.greedy(scores[order], 25).indices], plain)
    wide = torch.cat([torch.full((40, 1), 0.1, dtype=torch.float64), scores], dim=1)
    assert torch.equal(balance.greedy(wide, 25).indices, plain)


@pytest.mark.parametrize(
    ("scores", "budget"),
    [
        (torch.ones(4, 2), 2),
        (torch.ones(1, 2), 1),
        (torch.tensor([[1.0, float("nan")], [0, 1]]), 1),
        (TABLE, 6),
        (TABLE, -1),
        (torch.ones(3), 1),
    ],
)
def test_bad_arguments_are_value_errors(scores, budget):
    with pytest.raises(ValueError, match=r"constant|hold|must"):
        balance.greedy(scores, budget)
