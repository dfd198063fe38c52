"""RDS+: whose turn it is, by target row and by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradsift.methods import make
from tests.methods.vectors import at_angles, choose, random_rows

POOL, TARGET = at_angles(10, 12, 20, 91, 100, 180), at_angles(0, 90, 14)


def test_target_rows_take_turns() -> None:
    chosen = choose(make("rds", {"taken": "next"}), POOL, TARGET, 6, groups=["a", "b", "a"])
    # 0 degrees takes 10, 90 takes 91, 14 takes 12; then 20, 100, and what is left
    assert chosen.indices.tolist() == [0, 3, 1, 2, 4, 5]


def test_a_target_row_whose_nearest_is_taken_loses_its_turn() -> None:
    chosen = choose(make("rds"), POOL, TARGET, 6, groups=["a", "b", "a"])
    # 10, 91, 12; then 0 names 12 (lost), 90 names 100, 14 names 10 (lost); then 20
    assert chosen.indices.tolist() == [0, 3, 1, 4, 2, 5]
    assert chosen.notes["nearest_group"].tolist()[:5] == ["a", "a", "a", "b", "b"]


def test_groups_take_turns_with_the_best_of_their_rows() -> None:
    chosen = choose(make("rds", {"aggregate": "groups"}), POOL, TARGET, 4, groups=["a", "b", "a"])
    # group a: nearest of 0 and 14 degrees: 12 (2 away), then 10 (4), 20 (6); group b: 91, then 100
    assert chosen.indices.tolist() == [1, 3, 0, 4]
    assert chosen.notes["nearest_group"].tolist() == ["a", "a", "a", "b", "b", "b"]


def test_max_takes_the_highest_whoever_they_serve() -> None:
    chosen = choose(make("rds", {"aggregate": "max"}), POOL, TARGET, 3)
    assert chosen.indices.tolist() == [3, 1, 0]
    assert chosen.gains is not None and chosen.gains.tolist() == pytest.approx(
        np.cos(np.deg2rad([1, 2, 4])).tolist(), abs=1e-6
    )


def test_scores_are_cosines_with_the_nearest_target_row() -> None:
    pool, target = random_rows(30, 7, 1) * 4, random_rows(5, 7, 2)
    chosen = choose(make("rds"), pool, target, 8)
    expected = torch.nn.functional.cosine_similarity(pool[:, None], target[None], dim=2).amax(dim=1)
    assert np.allclose(chosen.notes["score"], expected, atol=1e-6)
