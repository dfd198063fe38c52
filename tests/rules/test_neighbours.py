"""knn, kcenter, penalty and sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.rules import blocks, kcenter, knn, penalty, sample

from .stores import Sliced

SEEDS = st.integers(0, 10_000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(seed: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_neighbours(rows: np.ndarray, k: int) -> list[list[int]]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = (unit @ unit.T).round(12)
    return [
        sorted((j for j in range(len(rows)) if j != i), key=lambda j: (-similarity[i, j], j))[:k]
        for i in range(len(rows))
    ]


@given(seed=SEEDS, n=st.integers(2, 30), d=st.integers(2, 8), exact=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_neighbours_match_the_plain_loops(seed, n, d, exact, data):
    k = data.draw(st.integers(1, n - 1))
    rows = normal(seed, n, d, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", data.draw(st.sampled_from([7, 2048])))
        patch.setattr(knn, "WIDE", 2)
        patch.setattr(knn, "SIDE", data.draw(st.sampled_from([1, 7, 16])))
        neighbours, similarity = knn.graph(rows, k, exact=exact)
    assert neighbours.tolist() == naive_neighbours(rows.double().numpy(), k)
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert torch.allclose(similarity, (unit @ unit.T).gather(1, neighbours), atol=1e-5)


def test_equal_rows_are_neighbours_in_index_order(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    neighbours, similarity = knn.graph(torch.ones(30, 4), 3)
    assert neighbours[0].tolist() == [1, 2, 3]
    assert neighbours[2].tolist() == [0, 1, 3]
    assert neighbours[29].tolist() == [0, 1, 2]
    assert torch.allclose(similarity, torch.ones(30, 3))
    assert knn.graph(torch.zeros(4, 2), 2)[0][3].tolist() == [0, 1]


def test_bfloat16_finds_nearly_all_and_a_store_gives_the_same(monkeypatch):
    rows = normal(0, 2500, 64, torch.float32).half()
    exact, _ = knn.graph(rows, 10)
    close, similarity = knn.graph(rows, 10, exact=False)
    assert knn.recall(rows, exact, rng=rng()) == 1.0
    assert knn.recall(rows, close, rng=rng()) >= 0.999
    assert (similarity.diff(dim=1) <= 0).all()
    store = Sliced(rows)
    monkeypatch.setattr(knn, "RESIDENT", 0)
    assert torch.equal(knn.graph(store, 10)[0], exact)
    assert torch.equal(knn.graph(store, 10, exact=False)[0], close)
    assert store.widest <= blocks.BLOCK
    wrong = close.clone()
    wrong[:, 5:] = (torch.arange(2500) * 7 % 2500)[:, None]
    assert 0.4 < knn.recall(rows, wrong, rng=rng()) < 0.6


def naive_centres(rows: np.ndarray, budget: int, start: int) -> list[int]:
    picks, nearest = [start], np.full(len(rows), np.inf)
    while len(picks) < budget:
        nearest = np.minimum(nearest, ((rows - rows[picks[-1]]) ** 2).sum(1))
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks[:budget]


@given(
    seed=SEEDS,
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    pending=st.sampled_from([1, 2, 64]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_farthest_first_matches_the_plain_loops(seed, n, d, pending, data):
    rows = normal(seed, n, d)
    start, budget = data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kcenter, "PENDING", pending)
        found = kcenter.farthest_first(rows, budget, start=start, rng=rng())
    assert found.tolist() == naive_centres(rows.numpy(), budget, start)


@pytest.mark.parametrize("step", [1e-4, 1e-6])
def test_farthest_first_tells_close_float64_rows_apart(step):
    """Squared distances of 1e-8 and less of the rows' own, which float32 could not hold."""
    places = torch.tensor([0.0, 1, 4, 2, 4], dtype=torch.float64)
    rows = torch.stack([torch.ones(5, dtype=torch.float64), step * places], dim=1)
    found = kcenter.farthest_first(rows, 5, start=0, rng=rng()).tolist()
    # the last row is that of row 2
    assert found == [0, 2, 3, 1, 4] == naive_centres(rows.numpy(), 5, 0)


def test_farthest_first_takes_equal_rows_last_in_any_precision():
    for dtype in (torch.float16, torch.float32, torch.float64):
        rows = normal(2, 30, 500, torch.float32).to(dtype).repeat(2, 1)
        found = kcenter.farthest_first(rows, 60, start=0, rng=rng()).tolist()
        assert sorted(i % 30 for i in found[:30]) == list(range(30)) and found[30:] == sorted(
            found[30:]
        )


def test_farthest_first_on_many_rows_prefixes_stores_and_duplicates():
    rows = normal(1, 2500, 12, torch.float32)
    found = kcenter.farthest_first(rows, 150, start=5, rng=rng())
    assert found.tolist() == naive_centres(rows.double().numpy(), 150, 5)
    assert (
        kcenter.farthest_first(Sliced(rows), 60, start=5, rng=rng()).tolist() == found.tolist()[:60]
    )
    assert torch.equal(
        kcenter.farthest_first(rows, 9, rng=rng(4)), kcenter.farthest_first(rows, 9, rng=rng(4))
    )
    assert kcenter.farthest_first(torch.ones(6, 3), 6, start=2, rng=rng()).tolist() == [
        2,
        0,
        1,
        3,
        4,
        5,
    ]
    doubled = torch.eye(3).repeat(2, 1)
    assert kcenter.farthest_first(doubled, 6, start=4, rng=rng()).tolist() == [4, 0, 2, 1, 3, 5]
    assert kcenter.farthest_first(rows, 0, rng=rng()).tolist() == []


def naive_diverse(
    difficulty: np.ndarray, rows: np.ndarray, budget: int, neighbours: int, gamma: float
):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    current, left, picks, gains = difficulty.copy(), list(range(len(rows))), [], []
    for _ in range(budget):
        i = max(left, key=lambda j: (current[j], -j))
        left.remove(i)
        picks.append(i)
        gains.append(current[i])
        for j in sorted(left, key=lambda j: (-(rows[j] @ rows[i]), j))[:neighbours]:
            current[j] -= gamma * current[i] * (rows[j] @ rows[i]) ** 2
    return picks, gains


def test_difficulty_is_lowered_around_the_picks():
    """methods.md T5.1 and T5.2."""
    difficulty, rows = torch.tensor([1.0, 0.9, 0.8]), torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]])
    found = penalty.diverse(difficulty, rows, 3, neighbours=2)
    assert found.indices.tolist() == [0, 2, 1]
    assert found.gains.tolist() == pytest.approx([1, 0.8, -0.028], abs=1e-6)
    assert penalty.diverse(difficulty, rows, 3, gamma=0).indices.tolist() == [0, 1, 2]
    assert difficulty.tolist() == pytest.approx([1, 0.9, 0.8])  # the argument is left as it was


@given(
    seed=SEEDS,
    n=st.integers(1, 30),
    k=st.integers(0, 12),
    gamma=st.sampled_from([0.0, 0.5, 1.0]),
    ahead=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=60, deadline=None)
def test_diverse_matches_the_plain_loops(seed, n, k, gamma, ahead):
    difficulty, rows = normal(seed, n, 1)[:, 0], normal(seed + 1, n, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalty, "AHEAD", ahead)
        found = penalty.diverse(difficulty, rows, n, neighbours=k, gamma=gamma)
    picks, gains = naive_diverse(difficulty.numpy(), rows.numpy(), n, k, gamma)
    assert found.indices.tolist() == picks
    assert found.gains.tolist() == pytest.approx(gains)
    assert (
        penalty.diverse(
            difficulty, Sliced(rows), n // 2, neighbours=k, gamma=gamma
        ).indices.tolist()
        == picks[: n // 2]
    )


def test_gumbel_draws_by_weight_without_replacement():
    weights = torch.tensor([4.0, 2, 1, 1]).log()
    first = (
        np.bincount(
            [int(sample.gumbel_topk(weights, 1, rng=rng(seed))[0]) for seed in range(1200)],
            minlength=4,
        )
        / 1200
    )
    assert first == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.05)
    pairs = [sample.gumbel_topk(weights, 2, rng=rng(seed)).tolist() for seed in range(1200)]
    after_first = np.bincount([b for a, b in pairs if a == 0], minlength=4) / sum(
        a == 0 for a, _ in pairs
    )
    assert after_first == pytest.approx([0, 0.5, 0.25, 0.25], abs=0.08)


def test_gumbel_prefixes_shifts_and_impossible_rows():
    weights = normal(0, 50, 1)[:, 0]
    long = sample.gumbel_topk(weights, 50, rng=rng(1)).tolist()
    assert sorted(long) == list(range(50))
    assert sample.gumbel_topk(weights + 3, 10, rng=rng(1)).tolist() == long[:10]
    weights[:40] = -torch.inf
    assert sorted(sample.gumbel_topk(weights, 10, rng=rng(1)).tolist()) == list(range(40, 50))
    with pytest.raises(ValueError, match="only 10 rows"):
        sample.gumbel_topk(weights, 11, rng=rng(1))


NAN = torch.tensor([[1.0, float("nan")], [0, 1], [1, 1]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: knn.graph(torch.eye(3), 3),
        lambda: knn.graph(torch.eye(3), 0),
        lambda: knn.graph(NAN, 1),
        lambda: knn.recall(torch.eye(3), torch.zeros(2, 1, dtype=torch.int64), rng=rng()),
        lambda: kcenter.farthest_first(torch.eye(3), 4, rng=rng()),
        lambda: kcenter.farthest_first(torch.eye(3), 2, start=3, rng=rng()),
        lambda: kcenter.farthest_first(NAN, 2, rng=rng()),
        lambda: kcenter.farthest_first(torch.eye(3), 2, rng=None),  # type: ignore[arg-type]
        lambda: penalty.diverse([1.0, 2.0], torch.eye(3), 1),
        lambda: penalty.diverse([1.0, 2.0, 3.0], NAN, 1),
        lambda: penalty.diverse([1.0, 2.0, float("nan")], torch.eye(3), 1),
        lambda: penalty.diverse([1.0, 2.0, 3.0], torch.eye(3), 1, neighbours=-1),
        lambda: sample.gumbel_topk([0.0, float("nan")], 1, rng=rng()),
        lambda: sample.gumbel_topk([[0.0]], 1, rng=rng()),
        lambda: sample.gumbel_topk([0.0], 2, rng=rng()),
    ],
)
def test_bad_arguments_are_value_errors(call):
    with pytest.raises(ValueError, match=r"must|hold|entries"):
        call()
