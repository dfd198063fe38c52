"""GIST against a dense twin, and what its subspace may and may not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.methods import make
from gradsift.methods.gist import Gist
from tests.methods.vectors import Stored, choose, random_rows

GROUPS = ["a", "a", "b", "b", "b", "c"]


def naive(pool: Tensor, target: Tensor, rank: int, groups: list[str]) -> np.ndarray:
    """numpy's SVD of the raw target rows, one cosine at a time."""
    basis = np.linalg.svd(target.double().numpy(), full_matrices=False)[2][:rank]
    inside, outside = pool.double().numpy() @ basis.T, target.double().numpy() @ basis.T
    best = np.full(len(pool), -np.inf)
    for group in dict.fromkeys(groups):
        mean = np.mean([outside[j] for j in range(len(target)) if groups[j] == group], axis=0)
        cosine = [row @ mean / np.linalg.norm(row) / np.linalg.norm(mean) for row in inside]
        best = np.maximum(best, cosine)
    return best


@pytest.mark.parametrize("rank", [2, 3, 6, 150])
def test_scores_are_those_of_the_dense_twin(rank: int) -> None:
    pool, target = (
        random_rows(40, 12, 1),
        random_rows(6, 12, 2) * torch.tensor([1.0, 9.0, 2.0, 0.1, 1.0, 4.0])[:, None],
    )
    expected = naive(pool, target, rank, GROUPS)
    chosen = choose(make("gist", {"rank": rank}), Stored(pool), Stored(target), 9, groups=GROUPS)
    assert np.allclose(chosen.notes["score"], expected, atol=1e-5)
    assert chosen.indices.tolist() == np.argsort(-expected)[:9].tolist()
    assert chosen.notes["rank"] == min(rank, 6)


def test_what_lies_outside_the_span_of_the_target_does_not_count() -> None:
    pool, target = random_rows(30, 12, 3), random_rows(6, 12, 4)
    span = torch.linalg.qr(target.double().T)[0]
    away = random_rows(30, 12, 5).double() * 50
    away = (away - away @ span @ span.T).float()
    plain = choose(make("gist"), pool, target, 8, groups=GROUPS)
    moved = choose(make("gist"), pool + away, target, 8, groups=GROUPS)
    assert moved.indices.tolist() == plain.indices.tolist()
    assert np.allclose(moved.notes["score"], plain.notes["score"], atol=1e-4)
    weighted = [
        choose(make("gist", {"energy": True}), rows, target, 8, groups=GROUPS)
        for rows in (pool, pool + away)
    ]
    assert not np.allclose(weighted[0].notes["score"], weighted[1].notes["score"], atol=1e-2)


def test_energy_prefers_rows_that_lie_inside() -> None:
    target = torch.eye(4)[:1]
    pool = torch.tensor([[0.01, 1.0, 0, 0], [0.9, 0.1, 0, 0], [1.0, 1.0, 0, 0]])
    assert choose(make("gist"), pool, target, 3).notes["score"].tolist() == pytest.approx([1, 1, 1])
    weighted = choose(make("gist", {"energy": True}), pool, target, 3)
    assert weighted.indices.tolist() == [1, 2, 0]
    assert weighted.notes["score"].tolist() == pytest.approx([1e-4 / 1.0001, 0.81 / 0.82, 0.5])


def test_variance_sets_the_rank() -> None:
    target = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))  # squared lengths 9, 4, 1, 0.01
    ranks = [
        choose(make("gist", {"variance": v}), random_rows(5, 4, 6), target, 1).notes["rank"]
        for v in (0.6, 0.9, 0.95, 1.0)
    ]
    assert ranks == [1, 2, 3, 4]


def test_a_groups_mean_is_of_raw_gradients_and_its_best_group_counts() -> None:
    target = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    pool = torch.tensor([[0.0, 1.0], [1.0, 0.1], [0.0, -2.0]])
    chosen = choose(make("gist"), pool, Stored(target), 3, groups=["a", "a", "b"])
    # T6.4's 0.0995
    assert chosen.notes["score"].tolist() == pytest.approx([0.0995, 1.0, 1.0], abs=1e-4)
    assert chosen.notes["nearest_group"].tolist() == ["a", "a", "b"]


def test_lengths_of_pool_rows_do_not_count() -> None:
    pool, target = random_rows(20, 6, 7), random_rows(4, 6, 8)
    scaled = Stored(pool * torch.linspace(0.1, 9, 20)[:, None])
    assert (
        choose(make("gist"), scaled, target, 7).indices.tolist()
        == choose(make("gist"), pool, target, 7).indices.tolist()
    )


def test_one_direction_cannot_rank_and_a_warning_says_so() -> None:
    pool, target = random_rows(20, 5, 11), random_rows(1, 5, 12)
    chosen = choose(make("gist"), pool, target, 4)
    assert (
        np.allclose(np.abs(chosen.notes["score"]), 1, atol=1e-6)
        and "energy=true" in chosen.notes["note"]
    )
    weighted = choose(make("gist", {"energy": True}), pool, target, 4)
    cosine = torch.nn.functional.cosine_similarity(pool, target)
    assert (
        np.allclose(weighted.notes["score"], cosine * cosine.abs(), atol=1e-5)
        and "note" not in weighted.notes
    )


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        choose(Gist(rank=0), random_rows(4, 3, 9), random_rows(2, 3, 10), 1)
