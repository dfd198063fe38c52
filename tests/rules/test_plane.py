"""The axes of a map against a principal component analysis, and the nearest row against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from gradsift.rules import plane
from gradsift.rules.blocks import unit

from .stores import Sliced


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g) * torch.linspace(4, 0.5, d) + 0.5


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("n", "d"), [(60, 9), (20, 300), (300, 2)])
@pytest.mark.parametrize("at_length_one", [True, False])
def test_few_rows_are_placed_as_by_principal_component_analysis(
    n: int, d: int, at_length_one: bool
) -> None:
    given = rows(n, d)
    found = plane.fit(Sliced(given), np.arange(n), rng=rng(), unit=at_length_one)
    assert found is not None
    used = unit(given) if at_length_one else given
    full = PCA(2).fit(used.numpy().astype(np.float64))
    assert found.shares == pytest.approx(full.explained_variance_ratio_, abs=1e-5)
    expected = full.transform(used.numpy().astype(np.float64))
    placed = found.place(Sliced(given), np.arange(n))
    signs = np.sign((placed * expected).sum(axis=0))
    assert placed == pytest.approx(expected * signs, abs=1e-4)
    largest = found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_axes_of_many_rows_come_from_a_sample_that_is_the_same_every_time() -> None:
    given = rows(3 * plane.SAMPLE, 40)
    given[:, 7] *= 4
    first, again = (plane.fit(given, np.arange(len(given)), rng=rng()) for _ in range(2))
    assert first is not None and again is not None
    assert torch.equal(first.directions, again.directions)
    exact = PCA(1).fit(unit(given).numpy()).components_[0]
    assert abs(float(first.directions[0] @ torch.from_numpy(exact))) > 0.99
    assert len(plane.sample(np.arange(9), 4, rng())) == 4
    assert plane.sample(np.array([5, 2]), 4, rng()).tolist() == [2, 5]


def test_the_sample_of_wide_rows_fits_in_the_memory_that_is_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    real = plane.gather

    def watched(some: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        asked.append(len(indices))
        return real(some, indices)

    monkeypatch.setattr(plane, "gather", watched)
    monkeypatch.setattr(plane, "BYTES", 100 * 4 * 64)
    assert plane.fit(rows(500, 64), np.arange(500), rng=rng()) is not None
    assert asked == [100]


def test_rows_that_are_all_alike_have_no_axes_and_one_direction_is_no_plane() -> None:
    alike = torch.ones(5, 8)
    assert plane.fit(alike, np.arange(5), rng=rng()) is None
    assert plane.fit(rows(9, 4), np.array([3]), rng=rng()) is None
    line = torch.outer(torch.arange(6.0), torch.tensor([1.0, -2.0, 0.5]))
    found = plane.fit(line, np.arange(6), rng=rng(), unit=False)
    assert found is not None and found.shares == pytest.approx((1, 0))
    assert (found.place(line, np.arange(6))[:, 1] == 0).all()


def test_the_nearest_row_is_that_of_a_loop() -> None:
    mine, others = rows(30, 12), rows(700, 12, seed=4)
    others[17] = others[600] = mine[4]
    among = np.arange(5, 700)
    which, value = plane.nearest(Sliced(mine), np.array([4, 9, 2]), Sliced(others), among)
    cosines = (unit(mine).double() @ unit(others).double().T).numpy()
    for row, at, cosine in zip((4, 9, 2), which, value, strict=True):
        assert at == among[cosines[row, among].argmax()]
        assert cosine == pytest.approx(cosines[row, at], abs=1e-6)
    assert which[0] == 17  # of two alike, the lower one
