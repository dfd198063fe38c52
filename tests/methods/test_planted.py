"""Pools in which the right rows are known: what a method is for, it finds, and its controls do
not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gradsift.methods import make
from gradsift.types import Selector, Signals, Subset
from tests.methods.vectors import choose, random_rows

SEEDS = range(4)


def planted(
    seed: int, n: int = 200, helpful: int = 20, d: int = 48
) -> tuple[Tensor, Tensor, set[int]]:
    """Pool rows, target rows, and the places of the pool's rows that lie around the target's
    direction; the others lie anywhere.
    """
    places = np.random.default_rng(seed).permutation(n)[:helpful]
    pool, target = random_rows(n, d, seed), random_rows(6, d, seed + 100) * 0.1
    target[:, 0] += 1
    pool[torch.as_tensor(places)] = torch.eye(d)[0] + 0.1 * random_rows(helpful, d, seed + 200)
    return normalize(pool, dim=1), normalize(target, dim=1), set(places.tolist())


def given(selector: Selector, values: dict[str, Tensor], budget: int, seed: int) -> Subset:
    """Runs a method on values for its signals of the pool, by the signals' names."""
    signals = Signals(
        {signal: values[signal.name] for signal in selector.needs()}, n=len(values["rows"])
    )
    return selector.select(signals, budget, rng=np.random.default_rng(seed))


def share(chosen: Subset, places: set[int]) -> float:
    return len(places & set(chosen.indices.tolist())) / len(places)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["less", "g2is", "gist", "rds"])
def test_a_helpful_cluster_is_found(name: str, seed: int) -> None:
    pool, target, places = planted(seed)
    values = pool @ normalize(target.mean(dim=0, keepdim=True), dim=1).T if name == "less" else pool
    chosen = choose(
        make(name),
        values,
        None if name == "less" else target,
        len(places),
        groups=["t"] * len(target),
    )
    assert len(chosen) == len(places) and share(chosen, places) >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_gradmatch_finds_the_rows_whose_sum_is_the_targets_mean(seed: int) -> None:
    """Twenty rows, each near a direction of its own; rows that all point one way would explain the
    mean with the first of them.
    """
    places = np.random.default_rng(seed).permutation(200)[:20]
    pool = normalize(random_rows(200, 256, seed), dim=1)
    pool[torch.as_tensor(places)] = normalize(
        torch.eye(256)[:20] + 0.02 * random_rows(20, 256, seed + 200), dim=1
    )
    chosen = choose(make("gradmatch"), pool, torch.eye(256)[:20], 20)
    assert share(chosen, set(places.tolist())) >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_gradmatch_takes_few_of_the_rows_that_all_point_the_targets_way(seed: int) -> None:
    """One of them explains most of the mean, and rows of other directions what noise is left of it:
    matching is not a search for helpful rows.
    """
    pool, target, places = planted(seed)
    chosen = choose(make("gradmatch"), pool, target, len(places))
    assert chosen.indices[0] in places and share(chosen, places) < 0.5


def test_random_does_not_find_it() -> None:
    pool, _, places = planted(0)
    drawn = [
        share(choose(make("random"), pool, None, len(places), seed=1000 + seed), places)
        for seed in range(50)
    ]
    assert np.mean(drawn) == pytest.approx(0.1, abs=0.04) and max(drawn) < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_task_of_large_scores_takes_all_only_where_nothing_balances(seed: int) -> None:
    """40 rows help the first task, 40 the second by a twentieth of it, 120 neither. How many of
    either kind are chosen.
    """
    kind = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [40, 40, 120]))
    scores = random_rows(200, 2, seed) * torch.tensor([0.1, 0.005])
    for task, helps in enumerate((1.0, 0.05)):
        scores[torch.as_tensor(kind == task), task] += helps

    def coverage(name: str, **options: Any) -> list[int]:
        chosen = choose(make(name, options), scores, None, 20, groups=["large", "small"])
        return np.bincount(kind[chosen.indices], minlength=3).tolist()

    assert coverage("less", aggregate="max") == [20, 0, 0]
    assert coverage("less") == [10, 10, 0]
    large, small, neither = coverage("bids")
    assert large + small == 20 and neither == 0 and min(large, small) >= 8
    assert coverage("bids", standardise=False)[1] < small


@pytest.mark.parametrize("seed", SEEDS)
def test_mislabelled_rows_are_left_out_where_a_row_has_to_help_every_trusted_example(
    seed: int,
) -> None:
    """50 of 200 rows hurt a quarter of the trusted examples, and help the others so much that their
    mean is among the highest.
    """
    wrong = set(np.random.default_rng(seed).permutation(200)[:50].tolist())
    scores = random_rows(200, 8, seed).abs() + 0.1
    for row in wrong:
        scores[row, 2:] *= 3
        scores[row, :2] *= -1
    values = {"influence": scores, "rows": normalize(random_rows(200, 16, seed + 100), dim=1)}

    def mistakes(name: str, **options: Any) -> int:
        chosen = given(make(name, options), values, 40, seed)
        assert len(chosen) == 40
        return len(wrong & set(chosen.indices.tolist()))

    assert mistakes("gdig", clusters=8) == 0
    assert mistakes("gdig", preset="released") > 30
    assert mistakes("random") > 0
