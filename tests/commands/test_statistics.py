"""The intervals of a comparison against known answers, and how often they cover the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gradsift.commands.compare.results import ArmResult
from gradsift.commands.compare.statistics import DRAWS, Measured, compare_measured


def compared(
    a: np.ndarray,
    b: np.ndarray,
    tokens: np.ndarray,
    *,
    seed: int = 0,
    level: float = 0.95,
    draws: int = DRAWS,
) -> tuple[float, float, float]:
    """The difference of arm a to the control b and its interval. a [seeds a, m], b [seeds b, m]:
    nats per test row.
    """
    arms = {"a": Measured(a, tokens, 1), "b": Measured(b, tokens, 1)}
    tables = compare_measured(
        {"test": arms},
        control="b",
        level=level,
        measure="loss",
        equal="steps",
        seed=seed,
        draws=draws,
    )
    assert len(tables) == 1
    control: ArmResult = tables[0].line("b")
    assert (control.difference, control.low, control.high) == (None, None, None)
    result = tables[0].line("a")
    assert result.difference is not None and result.low is not None and result.high is not None
    return result.difference, result.low, result.high


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, size=20)
    b = np.tile(rng.random(20), (3, 1))
    assert compared(b - 0.25 * tokens, b, tokens) == pytest.approx((-0.25, -0.25, -0.25))


def test_the_interval_is_that_of_all_resamples() -> None:
    """Three rows and seeds 2 against 1: every resample can be listed."""
    a = np.array([[1.0, 4.0, 2.0], [3.0, 5.0, 1.0]])
    b = np.array([[2.0, 2.0, 6.0]])
    tokens = np.array([1, 2, 4])
    values = []
    for seeds in itertools.product(range(2), repeat=2):
        mean = a.mean(axis=0)
        side = mean + np.sqrt(2) * (a[list(seeds)].mean(axis=0) - mean)
        for rows in itertools.product(range(3), repeat=3):
            r = list(rows)
            values.append((side[r] - b[0, r]).sum() / tokens[r].sum())
    for level in (0.5, 0.8):
        difference, low, high = compared(a, b, tokens, seed=1, level=level, draws=60_000)
        # The list is discrete: the quantile of the draws must lie between those of slightly lower
        # and higher probability.
        for at, end in (((1 - level) / 2, low), ((1 + level) / 2, high)):
            assert (
                np.quantile(values, at - 0.01) - 1e-9
                <= end
                <= np.quantile(values, at + 0.01) + 1e-9
            )
        assert difference == pytest.approx((a.mean(axis=0) - b[0]).sum() / 7)


def test_the_interval_knows_the_luck_of_seeds() -> None:
    """Seeds shift all rows alike, so the variance is var / k of each side, without the (k - 1) / k
    that plain resampling gives.
    """
    shifts, rows = np.array([-0.3, 0.1, 0.2]), np.full(50, 2.0)
    a, b = rows + shifts[:, None], np.stack([rows, rows])
    _, low, high = compared(a, b, np.ones(50), level=0.6827, draws=20_000)
    assert (high - low) / 2 == pytest.approx(np.sqrt(shifts.var(ddof=1) / 3), rel=0.15)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits, trials = np.random.default_rng(7), 0, 150
    for trial in range(trials):
        hard = rng.normal(3, 1, size=60)  # shared by both sides: pairing takes it out
        a = hard + rng.normal(-0.2, 0.4, size=60) + np.zeros((1, 60))
        _, low, high = compared(a, hard[None], np.ones(60), seed=trial, level=0.9, draws=400)
        hits += low <= -0.2 <= high
    assert 0.82 <= hits / trials <= 0.96


def test_shapes_and_levels_are_checked() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        compared(np.ones((2, 3)), np.ones((2, 4)), np.ones(4))
    with pytest.raises(ValueError, match="level"):
        compared(np.ones((2, 3)), np.ones((2, 3)), np.ones(3), level=95)
