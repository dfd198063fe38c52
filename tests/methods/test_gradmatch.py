"""GRAD-MATCH: known solutions, weights that reproduce the mean, and what fills a budget that
matching leaves open.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradsift.methods import make
from gradsift.rules import omp
from gradsift.types import Subset
from tests.methods.vectors import Stored, choose, random_rows

RAW = {"normalise": "false"}
GOAL = torch.tensor([[3.0, 0.0, 2.0, 0.0]])


def weights(chosen: Subset) -> np.ndarray:
    assert chosen.weights is not None
    return chosen.weights


def test_orthonormal_rows_get_the_targets_own_coefficients() -> None:  # T1.1
    chosen = choose(make("gradmatch", RAW), torch.eye(4), GOAL, 4)
    assert chosen.indices.tolist()[:2] == [0, 2] and chosen.notes["matched"] == 2
    assert weights(chosen).tolist() == pytest.approx([3, 2, 0.25, 0.25])
    assert chosen.notes["residual"] == pytest.approx(0, abs=1e-12)
    assert "ended after 2 rows" in chosen.notes["note"]


def test_ridge_and_stop_are_the_released_routines() -> None:  # T1.2
    chosen = choose(make("gradmatch", {"preset": "released", "ridge": 1}), torch.eye(4), GOAL, 3)
    assert chosen.indices.tolist()[:2] == [0, 2] and chosen.notes["matched"] == 2
    assert weights(chosen)[:2].tolist() == pytest.approx([1.5, 1.0])
    assert chosen.notes["residual"] == pytest.approx(1.80278 / 13**0.5, abs=1e-5)


def test_without_a_target_the_weights_reproduce_the_pools_mean() -> None:  # T1.4
    assert np.allclose(weights(choose(make("gradmatch"), torch.eye(7), None, 7)), 1 / 7)
    pool = random_rows(200, 10, 1) * torch.linspace(0.2, 5, 200)[:, None] + 0.5
    chosen = choose(make("gradmatch", RAW), Stored(pool), None, 10)
    matched = chosen.notes["matched"]
    made = (
        torch.as_tensor(weights(chosen)[:matched])
        @ pool[torch.as_tensor(chosen.indices[:matched])].double()
    )
    mean = pool.double().mean(0)
    assert float((made - mean).norm() / mean.norm()) == pytest.approx(
        chosen.notes["residual"], abs=1e-5
    )
    assert chosen.notes["residual"] < 0.05 and (weights(chosen) >= 0).all()


def test_a_target_is_matched_by_its_raw_mean() -> None:
    pool, target = torch.eye(3), torch.tensor([[4.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    chosen = choose(make("gradmatch", RAW), pool, Stored(target), 2)
    assert chosen.indices.tolist() == [0, 1] and weights(chosen).tolist() == pytest.approx([2, 1])


def test_unit_rows_free_the_choice_from_lengths_on_both_sides() -> None:
    pool = Stored(torch.tensor([[5.0, 5.0], [0.1, 0.0], [0.0, 4.0]]))
    target = torch.tensor([[1.0, 0.0]])
    assert choose(make("gradmatch", RAW), pool, target, 1).indices.tolist() == [0]
    assert choose(make("gradmatch"), pool, target, 1).indices.tolist() == [1]
    rows, goal = random_rows(40, 8, 2), random_rows(3, 8, 3)
    plain = choose(make("gradmatch"), rows, goal, 6)
    scaled = choose(
        make("gradmatch"),
        Stored(rows * torch.linspace(0.1, 9, 40)[:, None]),
        goal * torch.tensor([[3.0], [0.2], [1.0]]),
        6,
    )
    assert plain.indices.tolist() == scaled.indices.tolist()
    assert np.allclose(weights(plain), weights(scaled), atol=1e-5)


def test_repeat_fills_with_the_next_best_and_random_draws() -> None:
    pool = torch.cat([torch.eye(4), 0.9 * torch.eye(4), -torch.eye(4)])
    repeat = choose(make("gradmatch", RAW), pool, GOAL, 6)
    # eye and 0.9 eye rows match 3 e0 + 2 e2; of the rest e1, e3 and so on have product 0, the
    # negative ones come last
    assert repeat.indices.tolist() == [0, 2, 4, 6, 1, 3]
    assert weights(repeat)[2:].tolist() == pytest.approx([1 / 12] * 4)
    draws = {
        tuple(
            choose(
                make("gradmatch", {**RAW, "refill": "random"}), pool, GOAL, 6, seed=s
            ).indices.tolist()
        )
        for s in range(6)
    }
    assert len(draws) > 1 and all(d[:2] == (0, 2) for d in draws)


def test_gains_are_products_with_the_mean() -> None:
    chosen = choose(make("gradmatch", RAW), torch.eye(4), GOAL, 2)
    assert chosen.gains is not None and chosen.gains.tolist() == pytest.approx([3, 2])


@pytest.mark.parametrize("options", [RAW, {**RAW, "refill": "random"}])
def test_a_first_matching_that_ended_early_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    firsts: list[int] = []

    class Counted(omp.Search):
        def run(self, budget: int, without: torch.Tensor | None = None) -> omp.Match:
            if without is None:
                firsts.append(budget)
            return super().run(budget, without)

    monkeypatch.setattr(omp, "Search", Counted)
    assert len(choose(make("gradmatch", options), torch.eye(4), GOAL, 4)) == 4 and firsts == [4]
