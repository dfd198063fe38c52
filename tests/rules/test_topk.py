from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gradsift.rules import topk

# Few distinct values, so that ties are common.
GRID = st.integers(-3, 3).map(float)


def naive_round_robin(scores: np.ndarray, budget: int) -> list[int]:
    picks: list[int] = []
    for turn in range(budget):
        column = scores[:, turn % scores.shape[1]]
        picks.append(
            max((i for i in range(len(scores)) if i not in picks), key=lambda i: (column[i], -i))
        )
    return picks


def test_less_scores_are_the_maximum_of_subtask_means():
    """methods.md T6.3."""
    pool, targets = torch.eye(2), torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, 1]])
    scores = topk.group_scores(pool @ targets.T, ["a", "a", "b", "b"])
    assert scores.tolist() == [[0.5, -0.5], [0.5, 0.5]]
    assert scores.max(1).values.tolist() == [0.5, 0.5]


def test_groups_need_not_be_contiguous_or_equally_large():
    scores = torch.tensor([[1.0, 10, 3, 5]])
    assert topk.group_scores(scores, ["x", "y", "x", "x"]).tolist() == [[3.0, 10.0]]
    assert topk.group_scores(scores, torch.tensor([1, 0, 1, 1])).tolist() == [[3.0, 10.0]]


def test_duplicating_a_group_or_every_example_of_it_changes_no_maximum():
    """methods.md T6.6."""
    scores = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    best = topk.group_scores(scores, [0, 0, 1, 1]).max(1).values
    twice = torch.cat([scores, scores[:, :2]], dim=1)
    assert torch.equal(topk.group_scores(twice, [0, 0, 1, 1, 2, 2]).max(1).values, best)
    assert torch.allclose(
        topk.group_scores(twice, [0, 0, 1, 1, 0, 0]).max(1).values, best, atol=1e-6
    )


def test_apportion_known_cases():
    """methods.md T1.7 and T3.2."""
    assert topk.apportion(5, [19, 20, 39, 41]) == [1, 1, 1, 2]
    assert topk.apportion(10, (0.46, 0.29, 0.25)) == [5, 3, 2]
    assert topk.apportion(7, [1, 1, 1]) == [3, 2, 2]
    assert topk.apportion(0, [0, 0]) == [0, 0]


def test_a_full_capacity_passes_its_seats_on():
    assert topk.apportion(10, [8, 1, 1], [2, 100, 100]) == [2, 4, 4]
    assert topk.apportion(6, [1, 0, 0], [2, 3, 3]) == [2, 2, 2]


@given(
    total=st.integers(0, 60),
    classes=st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 30)), min_size=1, max_size=12),
)
@settings(max_examples=150, deadline=None)
def test_apportion_sums_stays_in_capacity_and_within_one_of_the_exact_share(total, classes):
    weights, capacity = [w for w, _ in classes], [c for _, c in classes]
    if sum(weights) == 0:
        weights[0] = 1.0
    seats = topk.apportion(total, weights)
    assert sum(seats) == total
    assert all(
        abs(s - total * w / sum(weights)) < 1 + 1e-9 for s, w in zip(seats, weights, strict=True)
    )
    total = min(total, sum(capacity))
    bounded = topk.apportion(total, weights, capacity)
    assert sum(bounded) == total
    assert all(0 <= s <= c for s, c in zip(bounded, capacity, strict=True))


@given(
    scores=arrays(np.float32, st.tuples(st.integers(1, 25), st.integers(1, 5)), elements=GRID),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_round_robin_and_top_match_the_plain_loops(scores, data):
    budget = data.draw(st.integers(0, len(scores)))
    assert topk.round_robin(scores, budget).tolist() == naive_round_robin(scores, budget)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i, 0], i))
    assert topk.top(scores[:, 0], budget).tolist() == order[:budget]


def test_round_robin_looks_deeper_when_columns_want_the_same_rows():
    scores = torch.arange(300.0)[:, None].repeat(1, 7)
    assert topk.round_robin(scores, 300).tolist() == list(range(299, -1, -1))
    assert topk.round_robin(scores, 40).tolist() == topk.round_robin(scores, 300).tolist()[:40]


@pytest.mark.parametrize(
    "call",
    [
        lambda: topk.top([1.0, float("nan")], 1),
        lambda: topk.top([1.0], 2),
        lambda: topk.top([1.0], -1),
        lambda: topk.round_robin(torch.zeros(3, 0), 1),
        lambda: topk.group_scores(torch.zeros(2, 3), ["a", "b"]),
        lambda: topk.apportion(3, [0.0, 0.0]),
        lambda: topk.apportion(3, [1.0, -1.0]),
        lambda: topk.apportion(3, [1.0, float("inf")]),
        lambda: topk.apportion(3, [1.0], [2]),
        lambda: topk.apportion(3, [1.0], [2, 2]),
    ],
)
def test_bad_arguments_are_value_errors(call):
    with pytest.raises(ValueError, match=r"must|hold|entries|sums to|no columns"):
        call()
