"""Rank correlation against scipy's, with ties and gaps."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradsift.rules.ranks import spearman


@pytest.mark.parametrize("kinds", [4, 1000])
def test_it_is_scipys_over_the_finite_pairs(kinds: int) -> None:
    rng = np.random.default_rng(kinds)
    a = rng.integers(0, kinds, 200).astype(float)
    b = a + rng.integers(0, kinds, 200)
    whole = np.flatnonzero(np.arange(200) % 7 != 3)
    expected = spearmanr(a[whole], b[whole])[0]
    a[3::14], b[10::14] = np.nan, np.inf
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_where_nothing_is_ordered_there_is_no_correlation() -> None:
    assert np.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert np.isnan(spearman(np.array([1.0, np.nan]), np.array([1.0, 2.0])))
    assert spearman(np.arange(3.0), -np.arange(3.0)) == pytest.approx(-1)
