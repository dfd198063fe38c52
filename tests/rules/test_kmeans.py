from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from gradsift.rules import blocks, kmeans

from .stores import Sliced


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mixture(
    n: int, d: int, clusters: int, noise: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(clusters, d, generator=g), dim=1)
    labels = torch.randint(0, clusters, (n,), generator=g)
    rows = centres[labels] + noise * torch.randn(n, d, generator=g) / d**0.5
    return torch.nn.functional.normalize(rows, dim=1), labels


def naive_lloyd(rows: np.ndarray, centres: np.ndarray, cosine: bool) -> np.ndarray:
    """Lloyd steps to the end in float64, by plain loops; empty clusters take the farthest row."""
    if cosine:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    labels = np.full(len(rows), -1)
    for _ in range(25):
        distance = ((rows[:, None] - centres[None]) ** 2).sum(2)
        new = distance.argmin(1)
        far = distance[np.arange(len(rows)), new]
        for c in range(len(centres)):
            if not (new == c).any():
                counts = np.bincount(new, minlength=len(centres))
                row = int(np.where(counts[new] > 1, far, -1).argmax())
                new[row] = c
        centres = np.stack([rows[new == c].mean(0) for c in range(len(centres))])
        if cosine:
            norms = np.linalg.norm(centres, axis=1, keepdims=True)
            centres = centres / np.where(norms > 0, norms, 1)
        if (new == labels).all():
            break
        labels = new
    return labels


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 30),
    d=st.integers(1, 6),
    cosine=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_steps_from_given_centres_match_the_plain_loops(seed, n, d, cosine, data):
    d += cosine  # unit rows of one column would all tie
    clusters = data.draw(st.integers(1, min(n, 6)))
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = rows[:clusters] * 0.9
    found = kmeans.fit(rows, clusters, rng=rng(), cosine=cosine, init=start)
    assert found.labels.tolist() == naive_lloyd(rows.numpy(), start.numpy(), cosine).tolist()


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 30),
    cosine=st.booleans(),
    init=st.sampled_from(["greedy++", "random"]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_centres_are_means_objective_is_the_mean_distance_no_cluster_is_empty(
    seed, n, cosine, init, data
):
    clusters = data.draw(st.integers(1, n))
    rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    found = kmeans.fit(rows, clusters, rng=rng(seed), cosine=cosine, init=init)
    assert sorted(set(found.labels.tolist())) == list(range(clusters))
    points = torch.nn.functional.normalize(rows, dim=1) if cosine else rows
    means = torch.stack([points[found.labels == c].mean(0) for c in range(clusters)])
    if cosine:
        means = torch.nn.functional.normalize(means, dim=1)
    assert torch.allclose(found.centres, means, atol=1e-5)
    assert found.objective == pytest.approx(
        float((points - means[found.labels]).square().sum() / n), rel=1e-4, abs=1e-6
    )


def test_separated_clusters_are_found_and_labels_are_the_nearest_centres():
    rows, truth = mixture(600, 64, 12, 0.5)
    found = kmeans.fit(rows, 12, rng=rng())
    assert len({(a, b) for a, b in zip(found.labels.tolist(), truth.tolist(), strict=True)}) == 12
    assert torch.equal(torch.cdist(rows, found.centres).argmin(1), found.labels)
    far = kmeans.fit(rows + 1000, 12, rng=rng())  # distances are taken from the mean row
    assert len({(a, b) for a, b in zip(far.labels.tolist(), truth.tolist(), strict=True)}) == 12


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1.0, 2.5])
def test_no_worse_than_scikit_learn(noise):
    """Wider than the sketch, so that the rehearsal is tested too."""
    rows, _ = mixture(3000, 1200, 30, noise)
    ours = [kmeans.fit(rows, 30, rng=rng(seed)).objective for seed in range(3)]
    theirs = [
        KMeans(30, n_init=1, random_state=seed).fit(rows.numpy()).inertia_ / 3000
        for seed in range(3)
    ]
    assert np.mean(ours) <= 1.005 * np.mean(theirs)


@pytest.mark.parametrize("spread", [0.1, 0.3])
def test_clusters_are_found_though_norms_differ(spread):
    rows, labels = mixture(4000, 256, 20, noise=2.0)
    rows = rows * (
        1 + spread * torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(1))
    )
    planted = torch.stack([rows[labels == c].mean(0) for c in range(20)])
    best = float((rows - planted[labels]).square().sum(1).mean())
    found = kmeans.fit(rows, 20, rng=rng()).objective
    theirs = KMeans(20, n_init=1, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    assert found <= 1.01 * best
    assert found <= 1.005 * theirs


def test_more_restarts_and_seeding_help_and_the_same_rng_gives_the_same():
    rows, _ = mixture(1500, 40, 25, 1.0)
    one = [kmeans.fit(rows, 25, rng=rng(seed), init="random") for seed in range(4)]
    five = [kmeans.fit(rows, 25, rng=rng(seed), init="random", restarts=5) for seed in range(4)]
    assert sum(f.objective for f in five) < sum(o.objective for o in one)
    assert kmeans.fit(rows, 25, rng=rng()).objective < np.mean([o.objective for o in one])
    a, b = kmeans.fit(rows, 25, rng=rng(3)), kmeans.fit(rows, 25, rng=rng(3))
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.centres, b.centres)
    assert a.objective == b.objective


def test_a_store_and_a_parallel_map_give_the_same_bytes():
    rows, _ = mixture(9000, 1100, 10, 1.0)
    rows = rows.half()
    plain = kmeans.fit(rows, 10, rng=rng(), cosine=True)
    store = Sliced(rows)
    with ThreadPoolExecutor(3) as pool:
        parallel = kmeans.fit(store, 10, rng=rng(), cosine=True, map=pool.map)
    assert store.widest <= blocks.BLOCK
    assert torch.equal(plain.labels, parallel.labels)
    assert torch.equal(plain.centres, parallel.centres)
    assert plain.objective == parallel.objective


def test_only_a_sample_is_rehearsed(monkeypatch):
    monkeypatch.setattr(kmeans, "SAMPLE_LEAST", 100)
    monkeypatch.setattr(kmeans, "SAMPLE", 20)
    rows, truth = mixture(4000, 32, 8, 0.5)
    found = kmeans.fit(rows, 8, rng=rng())
    assert len({(a, b) for a, b in zip(found.labels.tolist(), truth.tolist(), strict=True)}) == 8


@pytest.mark.parametrize("cosine", [False, True])
def test_scale_of_a_row_matters_only_without_cosine(cosine):
    rows, _ = mixture(300, 16, 4, 1.0)
    scaled = rows * torch.logspace(-1, 1, 300)[:, None]
    start = rows[:4]
    same = torch.equal(
        kmeans.fit(rows, 4, rng=rng(), cosine=cosine, init=start).labels,
        kmeans.fit(scaled, 4, rng=rng(), cosine=cosine, init=start).labels,
    )
    assert same is cosine


@pytest.mark.parametrize("cosine", [False, True])
def test_equal_rows_and_few_distinct_ones(cosine):
    same = kmeans.fit(torch.ones(7, 3), 3, rng=rng(), cosine=cosine)
    assert sorted(torch.bincount(same.labels).tolist()) == [1, 1, 5]
    assert same.objective == pytest.approx(0, abs=1e-9)
    two = kmeans.fit(torch.eye(2).repeat(10, 1), 2, rng=rng(), cosine=cosine)
    assert two.objective == pytest.approx(0, abs=1e-9)
    assert kmeans.fit(torch.randn(5, 2), 5, rng=rng()).objective == pytest.approx(0, abs=1e-9)
    zero = kmeans.fit(torch.zeros(4, 2), 2, rng=rng(), cosine=cosine)
    assert torch.isfinite(zero.centres).all()


@pytest.mark.parametrize(
    "change",
    [
        {"clusters": 0},
        {"clusters": 5},
        {"clusters": 1.5},
        {"rng": None},
        {"init": "kmeans++"},
        {"init": torch.zeros(3, 2)},
        {"restarts": 0},
        {"iterations": 0},
        {"rows": torch.tensor([[1.0, float("nan")], [0, 1]])},
        {"rows": torch.zeros(4)},
    ],
)
def test_bad_arguments_are_value_errors(change):
    with pytest.raises(ValueError, match=r"must|hold|entries|sums to|no columns"):
        kmeans.fit(**{"rows": torch.randn(4, 2), "clusters": 2, "rng": rng(), **change})
