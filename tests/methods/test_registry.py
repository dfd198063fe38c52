"""Known answers of single methods; what all share is in contracts/test_methods.py."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.errors import ConfigError
from gradsift.methods import make
from gradsift.methods.gdig import PickedRows
from gradsift.rules import kmeans, omp, topk
from gradsift.types import Selector, Signal, Signals, Subset


def choose(
    selector: Selector,
    value: Tensor,
    budget: int,
    *,
    target_groups: list[str] | None = None,
    seed: int = 0,
) -> Subset:
    (signal,) = selector.needs()
    given = Signals({signal: value}, n=value.shape[0], target_groups=target_groups or [])
    return selector.select(given, budget, rng=np.random.default_rng(seed))


def clustered(sizes: list[int], d: int = 24, spread: float = 0.05, seed: int = 0) -> Tensor:
    """Unit rows around well separated directions, one per cluster."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.eye(d)[c] + spread * torch.randn(size, d, generator=generator)
        for c, size in enumerate(sizes)
    ]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1)


def per_cluster(chosen: Subset, sizes: list[int]) -> list[int]:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owner[chosen.indices], minlength=len(sizes)).tolist()


def test_tagcos_budgets_by_largest_remainder_or_floored() -> None:  # T1.7
    sizes = [19, 20, 39, 41]
    assert topk.apportion(5, sizes) == [1, 1, 1, 2]
    rows = clustered(sizes)
    assert per_cluster(choose(make("tagcos", {"clusters": 4, "restarts": 3}), rows, 5), sizes) == [
        1,
        1,
        1,
        2,
    ]
    released = choose(make("tagcos", {"clusters": 4, "restarts": 3, "preset": "released"}), rows, 6)
    assert per_cluster(released, sizes) == [0, 1, 1, 2]


def test_tagcos_floors_are_of_the_share_where_the_budget_is_one() -> None:
    sizes = [20] * 7 + [19]  # 159 rows: 5 % is 7.95, and each cluster but the last has a whole seat
    selector = make("tagcos", {"clusters": 8, "restarts": 3, "preset": "released"})
    rows = clustered(sizes)
    values = {signal: rows for signal in selector.needs()}

    def seats(budget: int, share: Fraction | None) -> list[int]:
        given = Signals(values, n=len(rows), share=share)
        found = selector.select(given, budget, rng=np.random.default_rng(0))
        return per_cluster(found, sizes)

    assert seats(8, Fraction("0.05")) == seats(7, Fraction("0.05")) == [1] * 7 + [0]
    assert seats(7, None) == [0] * 8  # seven of 159 rows are below a twentieth


def test_tagcos_makes_no_more_clusters_than_rows_and_budget_can_fill() -> None:
    rows = clustered([10] * 8)
    for options, budget, count in (
        ({}, 20, 20),  # not 100: one for every four rows, and no more than rows to choose
        ({}, 12, 12),
        ({"clusters": 6}, 12, 6),
        ({"preset": "released"}, 12, 80),  # as asked, as far as there are rows
    ):
        chosen = choose(make("tagcos", {"restarts": 1, **options}), rows, budget)
        assert chosen.notes["cluster"].max() + 1 == count
        said = f"{count} clusters in place of 100"
        assert (said in str(chosen.notes.get("note"))) == (options == {})
    unbound = make("tagcos")
    assert unbound.settled(4_000, 100) == 100 and not unbound.notices(4_000, 100)  # type: ignore[attr-defined]
    (few,) = unbound.notices(40, 30)  # type: ignore[attr-defined]
    assert few == "10 clusters in place of 100: 40 rows fill no more, 4 in each on average"


def test_tagcos_in_tight_clusters_halves_the_error_of_random() -> None:  # T1.9
    generator = torch.Generator().manual_seed(3)
    centre = torch.nn.functional.normalize(torch.randn(256, generator=generator), dim=0)
    rows = torch.nn.functional.normalize(
        centre + 0.058 * torch.randn(1000, 256, generator=generator), dim=1
    )
    mean = rows.mean(0)
    assert mean.norm() >= 0.7
    chosen = choose(make("tagcos", {"clusters": 1}), rows, 50)
    error = float((rows[torch.as_tensor(chosen.indices)].mean(0) - mean).norm())
    rng = np.random.default_rng(0)
    random = np.mean(
        [
            float((rows[torch.as_tensor(rng.permutation(1000)[:50])].mean(0) - mean).norm())
            for _ in range(40)
        ]
    )
    assert error <= 0.6 * random


def test_tagcos_presets_set_ridge_and_repeats_and_options_override_them() -> None:
    rows = clustered([60], spread=0.4)
    paper, released = (
        choose(make("tagcos", {"clusters": 1, "preset": p}), rows, 12)
        for p in ("paper", "released")
    )
    assert paper.indices.tolist() != released.indices.tolist()
    as_released = choose(
        make("tagcos", {"clusters": 1, "ridge": 1.0, "on_repeat": "stop"}), rows, 12
    )
    assert as_released.indices.tolist() == released.indices.tolist()


def test_tagcos_notes_carry_the_clusters_and_each_rows_agreement() -> None:
    rows = clustered([30, 50])
    chosen = choose(make("tagcos", {"clusters": 2, "restarts": 3}), rows, 8)
    labels = chosen.notes["cluster"]
    assert sorted(np.bincount(labels).tolist()) == [30, 50]
    own = torch.stack([rows[labels == c].mean(0) for c in labels])
    assert np.allclose(chosen.notes["score"], (rows * own).sum(1), atol=1e-4)
    assert np.allclose(chosen.gains, chosen.notes["score"][chosen.indices], atol=1e-5)
    assert np.allclose(
        sorted(chosen.notes["centroid_norms"]),
        sorted(float(rows[labels == c].mean(0).norm()) for c in (0, 1)),
        atol=1e-4,
    )


def test_tagcos_says_where_one_cluster_holds_most_rows() -> None:
    even = choose(make("tagcos", {"clusters": 3, "restarts": 3}), clustered([30, 30, 30]), 6)
    uneven = choose(make("tagcos", {"clusters": 3, "restarts": 3}), clustered([80, 1, 9]), 6)
    assert "note" not in even.notes
    assert "holds 80 of 90 rows and 1 of 3 clusters a single row" in uneven.notes["note"]


def mixed(seed: int = 0) -> Tensor:
    """Two loose clusters of unit rows and one whose rows go both ways, so that most of it points
    away from its centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    axis = torch.eye(24)[23] * torch.where(torch.arange(40) % 2 == 0, 1.0, -0.9)[:, None]
    return torch.cat(
        [
            clustered([33, 28], spread=0.3, seed=seed),
            axis + 0.02 * torch.randn(40, 24, generator=generator),
        ]
    )


def test_tagcos_released_leaves_seats_open_and_says_how_many() -> None:
    rows, options = mixed(), {"clusters": 3, "restarts": 5, "preset": "released"}
    chosen = choose(make("tagcos", options), rows, 70)
    sizes = np.bincount(chosen.notes["cluster"])
    seats = np.floor(70 / 101 * sizes).astype(int)
    assert chosen.notes["seats"] == seats.sum() < 70 and len(chosen) <= seats.sum()
    told = chosen.notes["note"]
    assert (
        f"rounded down, ask for {seats.sum()} of 70 rows" in told
        and "-o fill=nearest meets the budget" in told
    )
    if len(chosen) < seats.sum():
        assert f"left {seats.sum() - len(chosen)} of {seats.sum()} seats open" in told
    exact = choose(make("tagcos", {**options, "fill": "nearest"}), rows, 70)
    got = np.bincount(exact.notes["cluster"][exact.indices], minlength=3).tolist()
    assert got == topk.apportion(70, sizes, capacity=sizes) and "note" not in exact.notes
    assert set(chosen.indices.tolist()) <= set(exact.indices.tolist())


def test_tagcos_open_seats_are_those_that_no_row_fits() -> None:
    # mean (0.25, 0): two rows point its way, two away
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-0.5, 0.0], [-0.5, 0.0]])
    for preset in ("paper", "released"):
        few = choose(make("tagcos", {"clusters": 1, "preset": preset, "fill": "none"}), rows, 4)
        assert sorted(few.indices.tolist()) == [0, 1]
        assert (
            few.notes["note"] == "matching left 2 of 4 seats open: -o fill=nearest meets the budget"
        )
        assert (
            len(
                choose(
                    make("tagcos", {"clusters": 1, "preset": preset, "fill": "nearest"}), rows, 4
                )
            )
            == 4
        )


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_tagcos_weights_are_each_clusters_coefficients_by_its_share(preset: str) -> None:
    rows = mixed(3)
    options = {"clusters": 3, "restarts": 5, "preset": preset}
    chosen = choose(make("tagcos", {**options, "weights": True}), rows, 60)
    plain = choose(make("tagcos", options), rows, 60)
    assert (
        plain.weights is None
        and plain.indices.tolist() == chosen.indices.tolist()
        and chosen.weights is not None
    )
    labels, weight = (
        chosen.notes["cluster"],
        dict(zip(chosen.indices.tolist(), chosen.weights.tolist(), strict=True)),
    )
    matched = 0
    for c in range(3):
        members = np.flatnonzero(labels == c)
        seats = int(np.isin(chosen.indices, members).sum())
        ridge, repeat = (0.0, "mask") if preset == "paper" else (1.0, "stop")
        found = omp.match(
            rows[members], rows[members].mean(0), seats, ridge=ridge, on_repeat=repeat
        )  # type: ignore[arg-type]
        matched += len(found)
        for i, x in zip(members[found.indices.numpy()], found.coefficients.tolist(), strict=True):
            assert weight.pop(int(i)) == pytest.approx(x * len(members) / 101, rel=1e-4, abs=1e-6)
    assert weight and set(weight.values()) == {1 / 101} and chosen.notes["matched"] == matched
    assert (
        f"{len(weight)} of {len(chosen)} rows are no atom of a cluster's first match and weigh 1/n"
        in chosen.notes["note"]
    )


def test_tagcos_weighted_rows_sum_to_the_pools_mean() -> None:
    rows = clustered([20, 30, 40], spread=0.2)
    chosen = choose(make("tagcos", {"clusters": 3, "restarts": 3, "weights": True}), rows, 60)
    assert chosen.weights is not None
    total = (torch.as_tensor(chosen.weights)[:, None] * rows[chosen.indices].double()).sum(0)
    first = chosen.notes["matched"]
    assert first < 60
    extra = 1 / 90 * rows[chosen.indices[chosen.weights == 1 / 90]].double().sum(0)
    assert torch.allclose(total - extra, rows.double().mean(0), atol=5e-3)


class Counted:
    """Rows that count how often each is read."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shape, self.reads = (
            rows,
            tuple(rows.shape),
            np.zeros(len(rows), dtype=np.int64),
        )

    def __getitem__(self, where: slice) -> Tensor:
        self.reads[where] += 1
        return self.rows[where].clone()


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_tagcos_reads_a_row_twice_after_clustering_however_many_clusters(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5000, 12, generator=generator), dim=1)
    clustering, counted = Counted(rows), Counted(rows)
    kmeans.fit(clustering, 50, rng=np.random.default_rng(0), iterations=3)
    selector = make("tagcos", {"clusters": 50, "iterations": 3, "preset": preset})
    stored = choose(selector, counted, 500)  # type: ignore[arg-type]
    assert (counted.reads - clustering.reads).max() == 2 and (
        counted.reads - clustering.reads
    ).min() >= 1
    held = choose(selector, rows, 500)
    assert (
        stored.indices.tolist() == held.indices.tolist()
        and stored.gains is not None
        and held.gains is not None
    )
    assert stored.gains.tolist() == held.gains.tolist() and np.array_equal(
        stored.notes["score"], held.notes["score"]
    )


SCORES = torch.tensor(
    [[0.9, 0.0, -0.5], [0.8, 0.1, -0.4], [0.0, 0.3, 0.0], [-0.2, 0.2, 0.6], [0.1, 0.1, 0.1]]
)


def test_less_takes_the_best_group_of_each_row() -> None:
    chosen = choose(make("less", {"preset": "released"}), SCORES, 3, target_groups=["a", "b", "b"])
    # means within groups: a = .9 .8 0 -.2 .1; b = -.25 -.15 .15 .4 .1
    assert chosen.indices.tolist() == [0, 1, 3]
    assert np.allclose(chosen.gains, [0.9, 0.8, 0.4])
    assert chosen.notes["nearest_group"].tolist() == ["a", "a", "b", "b", "a"]


def test_less_by_turns_serves_every_target_row() -> None:
    chosen = choose(
        make("less", {"preset": "released", "aggregate": "rows"}),
        SCORES,
        4,
        target_groups=["a", "b", "b"],
    )
    assert chosen.indices.tolist() == [0, 2, 3, 1]


def test_less_by_turns_serves_every_group_in_the_papers_form() -> None:
    every: list[dict[str, str]] = [{}, {"aggregate": "groups"}]
    for options in every:
        chosen = choose(make("less", options), SCORES[:, :2], 3, target_groups=["a", "b", "b"])
        assert chosen.indices.tolist() == [0, 2, 1]
        # A pick stands with the group whose turn it was, and with its score for that one.
        assert np.allclose(chosen.gains, [0.9, 0.3, 0.8]) and chosen.notes["nearest_group"][
            chosen.indices
        ].tolist() == ["a", "b", "a"]
    assert choose(
        make("less", {"aggregate": "max"}), SCORES[:, :2], 3, target_groups=["a", "b", "b"]
    ).indices.tolist() == [0, 1, 2]


def test_less_by_rows_needs_a_score_with_every_row() -> None:
    with pytest.raises(ConfigError, match="aggregate=rows needs a score with every target row"):
        make("less", {"aggregate": "rows"})
    assert make("less", {"aggregate": "rows", "backend": "cosine"})


def test_less_groups_take_turns_over_a_backend_that_scores_target_rows() -> None:
    # means within groups: a = .9 .8 0 -.2 .1; b = -.25 -.15 .15 .4 .1
    both: list[dict[str, str]] = [
        {"backend": "ekfac"},
        {"preset": "released", "aggregate": "groups"},
    ]
    for options in both:
        chosen = choose(make("less", options), SCORES, 4, target_groups=["a", "b", "b"])
        assert chosen.indices.tolist() == [0, 3, 1, 2]
    one = choose(make("less", {"backend": "ekfac"}), SCORES, 3, target_groups=["a", "a", "a"])
    assert one.indices.tolist() == SCORES.mean(dim=1).topk(3).indices.tolist()


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
    assert make("length", {"order": "shortest"}).select(given, 2, rng=rng).indices.tolist() == [
        0,
        2,
    ]
    with pytest.raises(ValueError, match="tokens"):
        make("length").select(Signals({}, n=4), 2, rng=rng)


def test_gdig_clusters_rows_that_were_projected_once_more() -> None:
    sizes = [30, 20, 10]
    rows = clustered(sizes, d=900, spread=0.01)
    influence, labels = torch.ones(60, 3), {}
    for dim in (0, 400):
        method = make("gdig", {"clusters": 3, "restarts": 3, "dim": dim})
        given = Signals(
            {s: influence if s.name == "influence" else rows for s in method.needs()},
            n=60,
            target_groups=["a"] * 3,
        )
        found = method.select(given, 9, rng=np.random.default_rng(0))
        labels[dim] = found.notes["cluster"]
        assert per_cluster(found, sizes) == [3, 3, 3]
    assert all(len(set(labels[0][labels[400] == c])) == 1 for c in range(3))
    part = PickedRows(rows, np.arange(60), raw=False, dim=400)
    assert part.shape == (60, 400) and torch.equal(
        part[0:60], PickedRows(rows, np.arange(60), raw=False, dim=400)[0:60]
    )
    near, far = part[0:2] @ part[0:2].T, rows[0:2] @ rows[0:2].T
    # inner products are kept, as far as 400 signs keep them
    assert (near - far).abs().max() < 6 / 400**0.5
    assert PickedRows(rows, np.arange(60), raw=False, dim=900).signs is None
