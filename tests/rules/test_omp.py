from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.rules import blocks, omp

from .stores import Sliced


def solved(part, target, ridge):
    return np.linalg.solve(part @ part.T + ridge * np.eye(len(part)), part @ target)


def naive(atoms, target, budget, ridge=1.0, nonnegative=True, on_repeat="mask", tol=1e-4):
    """The same search in float64 with a fresh solve every time."""
    atoms, target = np.asarray(atoms, dtype=np.float64), np.asarray(target, dtype=np.float64)
    chosen, x, tried, norms = [], np.zeros(0), set(), []
    residual = target
    for turn in range(budget if on_repeat == "stop" else len(atoms)):
        if len(chosen) >= budget or np.linalg.norm(residual) < tol * np.linalg.norm(target):
            break
        fit = atoms @ residual if nonnegative else np.abs(atoms @ residual)
        if on_repeat == "mask":
            fit[list(tried)] = -np.inf
        j = int(fit.argmax())
        if fit[j] <= 1e-9 or (on_repeat == "stop" and j in chosen):
            break
        tried.add(j)
        damping = ridge if turn else 0
        before = chosen, x
        chosen = [*chosen, j]
        x = solved(atoms[chosen], target, damping)
        dropped = 0
        while nonnegative and len(x) and x.min() < 0:
            worst = int(x.argmin())
            chosen = chosen[:worst] + chosen[worst + 1 :]
            x = solved(atoms[chosen], target, ridge)
            dropped += 1
        removed = j not in chosen
        if removed and dropped == 1:
            chosen, x = before
        else:
            residual = target - x @ atoms[chosen]
            norms.append(np.linalg.norm(residual))
        if removed and on_repeat == "stop":
            break
    return chosen, x, norms


def problem(seed: int, n: int = 25, d: int = 8, mean: bool = True):
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n, d, generator=g, dtype=torch.float64)
    target = atoms.mean(0) if mean else torch.randn(d, generator=g, dtype=torch.float64)
    return atoms, target


def test_orthonormal_atoms_are_picked_by_size():
    """methods.md T1.1."""
    found = omp.match(torch.eye(4), torch.tensor([3.0, 0, 2, 0]), 4, ridge=0)
    assert found.indices.tolist() == [0, 2]
    assert found.coefficients.tolist() == pytest.approx([3, 2])
    assert found.residual_norms.tolist() == pytest.approx([2, 0])


def test_released_settings_stop_at_the_second_pick_of_an_atom():
    """methods.md T1.2."""
    found = omp.match(torch.eye(4), torch.tensor([3.0, 0, 2, 0]), 4, ridge=1, on_repeat="stop")
    assert found.indices.tolist() == [0, 2]
    assert found.coefficients.tolist() == pytest.approx([1.5, 1.0])
    assert found.residual_norms[-1].item() == pytest.approx(1.80278, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_combinations_are_recovered(dtype):
    """methods.md T1.3."""
    atoms = torch.zeros(20, 64, dtype=torch.float64)
    atoms[:19, :19] = torch.eye(19)
    atoms[19] = 1 / 8
    target = 0.5 * atoms[2] + 0.3 * atoms[7] + 0.2 * atoms[11]
    found = omp.match(atoms.to(dtype), target, 3, ridge=0)
    assert found.indices.tolist() == [2, 7, 11]
    assert found.coefficients.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=1e-12)
    assert found.residual_norms[-1] < 1e-10


def test_the_mean_of_orthonormal_atoms_takes_all_of_them():
    """methods.md T1.4."""
    found = omp.match(torch.eye(6), torch.full((6,), 1 / 6), 6, ridge=0)
    assert found.indices.tolist() == list(range(6))
    assert found.coefficients.tolist() == pytest.approx([1 / 6] * 6)
    assert found.residual_norms[-1] < 1e-7


def test_two_dimensions_by_hand():
    """methods.md T1.5."""
    atoms, target = torch.tensor([[1.0, 0], [0.6, 0.8]]), torch.tensor([1.0, 1.0])
    free = omp.match(atoms, target, 2, ridge=0)
    assert free.indices.tolist() == [1, 0]
    assert free.coefficients.tolist() == pytest.approx([1.25, 0.25], abs=1e-6)
    assert free.residual_norms.tolist() == pytest.approx([0.2, 0.0], abs=1e-6)
    ridged = omp.match(atoms, target, 2, ridge=1)
    assert ridged.coefficients.tolist() == pytest.approx([0.6044, 0.3187], abs=5e-5)
    assert ridged.residual_norms.tolist() == pytest.approx([0.2, 0.60689], abs=1e-5)
    assert omp.match(atoms, target, 1, ridge=1).coefficients.tolist() == pytest.approx(
        [1.4], abs=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_without_ridge_the_residual_is_orthogonal_to_the_chosen(seed):
    """methods.md T1.6, first part."""
    atoms, target = problem(seed, mean=False)
    for k in range(1, 7):
        found = omp.match(atoms, target, k, ridge=0)
        residual = target - found.coefficients @ atoms[found.indices]
        assert (atoms[found.indices] @ residual).abs().max() < 1e-9
        assert (found.coefficients >= 0).all()
        assert found.residual_norms[-1].item() == pytest.approx(float(residual.norm()), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_free_signs_never_raise_the_residual(seed):
    """methods.md T1.6, second part."""
    atoms, target = problem(seed, mean=False)
    norms = omp.match(atoms, target, 8, ridge=0, nonnegative=False).residual_norms
    assert len(norms) == 8
    assert (norms.diff() <= 1e-12).all()
    assert norms[-1] < 1e-9


def test_chosen_atoms_represent_a_tight_cluster_better_than_random_ones():
    """methods.md T1.9."""
    g = torch.Generator().manual_seed(1)
    centre = torch.nn.functional.normalize(torch.randn(256, generator=g), dim=0)
    rows = centre + 0.9 * torch.nn.functional.normalize(torch.randn(1000, 256, generator=g), dim=1)
    rows = torch.nn.functional.normalize(rows, dim=1)
    mean = rows.mean(0)
    assert mean.norm() >= 0.7
    chosen = omp.fill(rows, mean, 50, ridge=0)
    assert len(chosen) == 50
    draws = [rows[torch.randperm(1000, generator=g)[:50]].mean(0) for _ in range(40)]
    random = torch.stack([(draw - mean).norm() for draw in draws]).mean()
    assert (rows[chosen].mean(0) - mean).norm() <= 0.6 * random


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 30),
    d=st.integers(1, 12),
    ridge=st.sampled_from([0.0, 0.1, 1.0]),
    nonnegative=st.booleans(),
    on_repeat=st.sampled_from(["mask", "stop"]),
    mean=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_matches_the_plain_search(seed, n, d, ridge, nonnegative, on_repeat, mean):
    atoms, target = problem(seed, n, d, mean)
    options = {"ridge": ridge, "nonnegative": nonnegative, "on_repeat": on_repeat}
    budget = min(n, d)  # beyond that the plain solve is singular without ridge
    chosen, x, norms = naive(atoms, target, budget, **options)
    found = omp.match(atoms, target, budget, **options)
    assert found.indices.tolist() == chosen
    assert np.allclose(found.coefficients, x, atol=1e-7)
    assert np.allclose(found.residual_norms, norms, atol=1e-7)


def test_drops_happen_and_are_counted():
    solves = []
    for seed in range(40):
        atoms, target = problem(seed, 30, 6, mean=False)
        found = omp.match(atoms, target, 6, ridge=0)
        solves.append(len(found.residual_norms) - len(found))
    assert max(solves) > 0
    assert min(solves) >= 0


def test_permuting_the_atoms_permutes_the_picks():
    atoms, target = problem(3, 200, 40)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    plain, moved = (
        omp.match(atoms, target, 30, ridge=1),
        omp.match(atoms[order], target, 30, ridge=1),
    )
    assert order[moved.indices].tolist() == plain.indices.tolist()


def test_duplicates_tie_to_the_lowest_index_and_end_without_ridge():
    atoms = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)).repeat(4, 1)
    found = omp.match(atoms, atoms[:5].sum(0) / 3, 20, ridge=0)
    assert sorted(found.indices.tolist()) == [0, 1, 2, 3, 4]
    same = torch.ones(7, 3)
    assert omp.match(same, same[0], 7, ridge=0).indices.tolist() == [0]
    # one atom, not ridged, is exact
    assert omp.match(same, same[0] * 9, 7, ridge=1).indices.tolist() == [0]
    assert omp.fill(same, same[0], 7, ridge=1).tolist() == list(range(7))


def test_nothing_fits():
    for target in (torch.zeros(3), torch.tensor([-1.0, -1, -1])):
        found = omp.match(torch.eye(3), target, 2, ridge=1)
        assert (len(found), len(found.coefficients), len(found.residual_norms)) == (0, 0, 0)
        assert omp.fill(torch.eye(3), target, 2, ridge=1).tolist() == []
    assert omp.match(
        torch.eye(3), torch.tensor([-1.0, -2, 0]), 2, ridge=0, nonnegative=False
    ).indices.tolist() == [1, 0]
    assert len(omp.match(torch.eye(3), torch.ones(3), 0, ridge=1)) == 0


def test_fill_repeats_the_search_among_the_rest():
    atoms, target = problem(5, 30, 6)
    one = omp.match(atoms, target, 20, ridge=0).indices.tolist()
    chosen = omp.fill(atoms, target, 20, ridge=0).tolist()
    assert len(one) < 20 == len(set(chosen))
    rest = [i for i in range(30) if i not in one]
    again = [
        rest[i] for i in omp.match(atoms[rest], target, 20 - len(one), ridge=0).indices.tolist()
    ]
    assert chosen[: len(one) + len(again)] == one + again
    assert omp.fill(atoms, target, 20, ridge=0, refill="none").tolist() == one


def test_fill_at_random_takes_the_rest_from_rng():
    atoms, target = problem(5, 30, 6)
    first = omp.fill(
        atoms, target, 20, refill="random", rng=np.random.default_rng(1), ridge=0
    ).tolist()
    again = omp.fill(
        atoms, target, 20, refill="random", rng=np.random.default_rng(1), ridge=0
    ).tolist()
    assert first == again
    assert len(set(first)) == 20
    assert (
        first[: len(omp.match(atoms, target, 20, ridge=0))]
        == omp.match(atoms, target, 20, ridge=0).indices.tolist()
    )


def test_a_store_read_in_blocks_gives_the_same_as_a_tensor(monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5000, 16, generator=g), dim=1).half()
    target = rows.float().mean(0)
    plain = omp.match(rows, target, 40, ridge=1)
    store = Sliced(rows)
    assert omp.match(store, target, 40, ridge=1).indices.tolist() == plain.indices.tolist()
    monkeypatch.setattr(omp, "RESIDENT", 0)
    again = omp.match(store, target, 40, ridge=1)
    assert torch.equal(again.coefficients, plain.coefficients)
    assert store.widest <= blocks.BLOCK


@pytest.mark.parametrize(
    "change",
    [
        {"target": torch.ones(3)},
        {"target": torch.tensor([1.0, float("nan")])},
        {"atoms": torch.tensor([[1.0, float("inf")], [0, 1]])},
        {"atoms": torch.ones(4)},
        {"budget": 3},
        {"budget": -1},
        {"ridge": -1.0},
        {"ridge": float("nan")},
        {"on_repeat": "break"},
    ],
)
def test_bad_arguments_are_value_errors(change):
    good = {"atoms": torch.eye(2), "target": torch.ones(2), "budget": 2, "ridge": 1.0}
    with pytest.raises(ValueError, match=r"must|hold|entries|sums to|no columns"):
        omp.match(**{**good, **change})
    with pytest.raises(ValueError, match=r"must|hold|entries|sums to|no columns"):
        omp.fill(**{**good, **change})
    with pytest.raises(ValueError, match="rng"):
        omp.fill(**good, refill="random")
    with pytest.raises(ValueError, match="refill"):
        omp.fill(**good, refill="again")


def test_the_ridge_is_always_said():
    for rule in (omp.match, omp.fill):
        with pytest.raises(TypeError, match="ridge"):
            rule(torch.eye(2), torch.ones(2), 2)
