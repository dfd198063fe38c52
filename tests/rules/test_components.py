from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA

from gradsift.rules import blocks, components

from .stores import Sliced


def target(m: int, d: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=g) * torch.linspace(3, 0.5, d) + 0.3


@pytest.mark.parametrize(("m", "d"), [(20, 7), (12, 40), (9, 9)])
@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_matches_principal_component_analysis(m, d, keep):
    rows = target(m, d)
    found = components.principal(rows, keep)
    full = PCA().fit(rows.numpy())
    shares = torch.from_numpy(full.explained_variance_ratio_).double()
    count = min(1 + int((shares.cumsum(0) < keep - 1e-6).sum()), min(m - 1, d))
    assert len(found) == count
    assert torch.allclose(found.weights, shares[:count] / shares[:count].sum(), atol=1e-4)
    assert found.weights.sum().item() == pytest.approx(1)
    cosines = (found.directions * torch.from_numpy(full.components_[:count]).float()).sum(1).abs()
    assert torch.allclose(cosines, torch.ones(count), atol=1e-3)


@pytest.mark.parametrize(("m", "d"), [(20, 7), (12, 40)])
def test_directions_are_orthonormal_and_face_the_mean(m, d):
    rows = target(m, d, 1)
    found = components.principal(rows, 0.95)
    assert torch.allclose(found.directions @ found.directions.T, torch.eye(len(found)), atol=1e-5)
    assert ((rows @ found.directions.T).mean(0) >= -1e-5).all()
    assert torch.allclose(
        components.principal(rows[torch.randperm(m)], 0.95).directions, found.directions, atol=1e-4
    )


def test_uncentred_keeps_the_mean_direction():
    rows = torch.tensor([[5.0, 1, 0], [5, -1, 0], [5, 0, 0.5]])
    assert components.principal(rows, 0.5, centred=False).directions[0].tolist() == pytest.approx(
        [1, 0, 0], abs=0.05
    )
    assert abs(components.principal(rows, 0.5).directions[0, 0]) < 1e-6


def test_count_takes_a_share_of_the_directions_there_are():
    rows = target(9, 40)
    # 8 directions of variance in 9 rows
    assert len(components.principal(rows, 0.5, by="count")) == 4
    assert len(components.principal(rows, 0.01, by="count")) == 1
    assert len(components.principal(rows, 1.0, by="count")) == 8


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rows_all_alike_are_refused_and_the_mean_can_be_asked_for(scale):
    """methods.md T3.6."""
    rows = scale * torch.tensor([[0.1, 0.7, 0.3]]).repeat(5, 1)
    with pytest.raises(ValueError, match="all alike"):
        components.principal(rows)
    found = components.principal(rows, centred=False)
    assert found.weights.tolist() == [1.0]
    assert torch.allclose(found.directions, torch.nn.functional.normalize(rows[:1], dim=1))


def test_without_orientation_the_largest_entry_is_positive():
    rows = -target(10, 6).abs()
    free = components.principal(rows, 1.0, orient=False).directions
    assert (free.gather(1, free.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("m", "d"), [(150, 6), (150, 160)])
def test_a_store_is_read_in_blocks(m, d, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(components, "BLOCK", 64)
    rows = torch.randn(m, 12, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        12, d, generator=torch.Generator().manual_seed(1)
    )
    rows = rows.half()
    plain = components.principal(rows, 0.5)
    assert torch.equal(components.principal(Sliced(rows), 0.5).directions, plain.directions)
    exact = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False).Vh[0]
    assert abs(float(exact @ plain.directions[0].double())) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"keep": 0.0},
        {"keep": 1.5},
        {"by": "energy"},
        {"rows": torch.zeros(3, 2)},
        {"rows": torch.tensor([[1.0, float("nan")]])},
    ],
)
def test_bad_arguments_are_value_errors(change):
    with pytest.raises(ValueError, match=r"must|hold|all zero"):
        components.principal(**{"rows": target(4, 3), **change})
