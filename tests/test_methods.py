"""Known answers of single methods; what all share is in contracts/test_methods.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.methods import make
from gradsift.methods.gdig import _Part
from gradsift.rules import topk
from gradsift.types import Selector, Signal, Signals, Subset


def choose(selector: Selector, value: Tensor, budget: int, *, target_groups: list[str] | None = None, seed: int = 0) -> Subset:
    (signal,) = selector.needs()
    given = Signals({signal: value}, n=len(value), target_groups=target_groups or [])
    return selector.select(given, budget, rng=np.random.default_rng(seed))


def clustered(sizes: list[int], d: int = 24, spread: float = 0.05, seed: int = 0) -> Tensor:
    """Unit rows around well separated directions, one per cluster."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.eye(d)[c] + spread * torch.randn(size, d, generator=generator) for c, size in enumerate(sizes)]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def per_cluster(chosen: Subset, sizes: list[int]) -> list[int]:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owner[chosen.indices], minlength=len(sizes)).tolist()


def test_tagcos_budgets_by_largest_remainder_or_floored() -> None:  # T1.7
    sizes = [19, 20, 39, 41]
    assert topk.apportion(5, sizes) == [1, 1, 1, 2]
    rows = clustered(sizes)
    assert per_cluster(choose(make("tagcos", {"clusters": 4, "restarts": 3}), rows, 5), sizes) == [1, 1, 1, 2]
    released = choose(make("tagcos", {"clusters": 4, "restarts": 3, "preset": "released"}), rows, 6)
    assert per_cluster(released, sizes) == [0, 1, 1, 2]


def test_tagcos_in_tight_clusters_halves_the_error_of_random() -> None:  # T1.9
    generator = torch.Generator().manual_seed(3)
    centre = torch.nn.functional.normalize(torch.randn(256, generator=generator), dim=0)
    rows = torch.nn.functional.normalize(centre + 0.058 * torch.randn(1000, 256, generator=generator), dim=1)
    mean = rows.mean(0)
    assert mean.norm() >= 0.7
    chosen = choose(make("tagcos", {"clusters": 1}), rows, 50)
    error = float((rows[torch.as_tensor(chosen.indices)].mean(0) - mean).norm())
    rng = np.random.default_rng(0)
    random = np.mean([float((rows[torch.as_tensor(rng.permutation(1000)[:50])].mean(0) - mean).norm()) for _ in range(40)])
    assert error <= 0.6 * random


def test_tagcos_presets_set_ridge_and_repeats_and_options_override_them() -> None:
    rows = clustered([60], spread=0.4)
    paper, released = (choose(make("tagcos", {"clusters": 1, "preset": p}), rows, 12) for p in ("paper", "released"))
    assert paper.indices.tolist() != released.indices.tolist()
    as_released = choose(make("tagcos", {"clusters": 1, "ridge": 1.0, "on_repeat": "stop"}), rows, 12)
    assert as_released.indices.tolist() == released.indices.tolist()


def test_tagcos_notes_carry_the_clusters_and_each_rows_agreement() -> None:
    rows = clustered([30, 50])
    chosen = choose(make("tagcos", {"clusters": 2, "restarts": 3}), rows, 8)
    labels = chosen.notes["cluster"]
    assert sorted(np.bincount(labels).tolist()) == [30, 50]
    own = torch.stack([rows[labels == c].mean(0) for c in labels])
    assert np.allclose(chosen.notes["score"], (rows * own).sum(1), atol=1e-4)
    assert np.allclose(chosen.gains, chosen.notes["score"][chosen.indices], atol=1e-5)
    assert np.allclose(sorted(chosen.notes["centroid_norms"]), sorted(float(rows[labels == c].mean(0).norm()) for c in (0, 1)), atol=1e-4)


def test_tagcos_says_where_one_cluster_holds_most_rows() -> None:
    even = choose(make("tagcos", {"clusters": 3, "restarts": 3}), clustered([30, 30, 30]), 6)
    uneven = choose(make("tagcos", {"clusters": 3, "restarts": 3}), clustered([80, 1, 9]), 6)
    assert "note" not in even.notes
    assert "holds 80 of 90 rows and 1 of 3 clusters a single row" in uneven.notes["note"]


SCORES = torch.tensor([[0.9, 0.0, -0.5], [0.8, 0.1, -0.4], [0.0, 0.3, 0.0], [-0.2, 0.2, 0.6], [0.1, 0.1, 0.1]])


def test_less_takes_the_best_group_of_each_row() -> None:
    chosen = choose(make("less", {"preset": "released"}), SCORES, 3, target_groups=["a", "b", "b"])
    # means within groups: a = .9 .8 0 -.2 .1; b = -.25 -.15 .15 .4 .1
    assert chosen.indices.tolist() == [0, 1, 3]
    assert np.allclose(chosen.gains, [0.9, 0.8, 0.4])
    assert chosen.notes["nearest_group"].tolist() == ["a", "a", "b", "b", "a"]


def test_less_by_turns_serves_every_target_row() -> None:
    chosen = choose(make("less", {"preset": "released", "aggregate": "round-robin"}), SCORES, 4, target_groups=["a", "b", "b"])
    assert chosen.indices.tolist() == [0, 2, 3, 1]


def test_less_by_turns_serves_every_group_in_the_papers_form() -> None:
    chosen = choose(make("less", {"aggregate": "round-robin"}), SCORES[:, :2], 3, target_groups=["a", "b", "b"])
    assert chosen.indices.tolist() == [0, 2, 1]


def test_less_asks_for_what_its_options_need() -> None:
    (signal,) = make("less", {"transform": "none", "preset": "released"}).needs()
    assert signal == Signal("influence", transform="none", checkpoints="mean", backend="less")


@pytest.mark.parametrize(("band", "picks"), [("low", [1, 3]), ("high", [4, 0]), ("middle", [2, 3])])
def test_perplexity_bands(band: str, picks: list[int]) -> None:
    losses = torch.tensor([3.0, 0.5, 2.0, 1.0, 9.0])
    assert choose(make("perplexity", {"band": band}), losses, 2).indices.tolist() == picks


def test_length_takes_the_longest_or_the_shortest_answers() -> None:
    given = Signals({}, n=4, tokens=np.array([5, 90, 7, 90]))
    rng = np.random.default_rng(0)
    assert make("length").select(given, 2, rng=rng).indices.tolist() == [1, 3]
    assert make("length", {"order": "shortest"}).select(given, 2, rng=rng).indices.tolist() == [0, 2]
    with pytest.raises(ValueError, match="tokens"):
        make("length").select(Signals({}, n=4), 2, rng=rng)


def test_gdig_clusters_rows_that_were_projected_once_more() -> None:
    sizes = [30, 20, 10]
    rows = clustered(sizes, d=900, spread=0.01)
    influence, labels = torch.ones(60, 3), {}
    for dim in (0, 400):
        method = make("gdig", {"clusters": 3, "restarts": 3, "dim": dim})
        given = Signals({s: influence if s.name == "influence" else rows for s in method.needs()}, n=60, target_groups=["a"] * 3)
        found = method.select(given, 9, rng=np.random.default_rng(0))
        labels[dim] = found.notes["cluster"]
        assert per_cluster(found, sizes) == [3, 3, 3]
    assert all(len(set(labels[0][labels[400] == c])) == 1 for c in range(3))
    part = _Part(rows, np.arange(60), raw=False, dim=400)
    assert part.shape == (60, 400) and torch.equal(part[0:60], _Part(rows, np.arange(60), raw=False, dim=400)[0:60])
    near, far = part[0:2] @ part[0:2].T, rows[0:2] @ rows[0:2].T
    assert (near - far).abs().max() < 6 / 400**0.5  # inner products are kept, as far as 400 signs keep them
    assert _Part(rows, np.arange(60), raw=False, dim=900).signs is None
