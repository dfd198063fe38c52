"""G-DIG, Self-Filter, DSIR and IFD on cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradsift import methods
from gradsift.methods.gdig import resample, threshold
from gradsift.types import Signal, Signals, Subset


def choose(name: str, values: dict[str, Any], budget: int, seed: int = 0, **options: Any) -> Subset:
    selector = methods.make(name, options)
    given = {signal: values[signal.name] for signal in selector.needs()}
    n = len(next(iter(values.values())))
    return selector.select(
        Signals(given, n, target_groups=["t"] * 3), budget, rng=np.random.default_rng(seed)
    )


SCORES = torch.tensor(
    [[1, 2, 3], [1, -1, 9], [5, 5, -0.1], [0.1, 0.1, 0.1], [-1, -1, -1], [0, 1, 1], [2, 2, 2]],
    dtype=torch.float32,
)
ROWS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0.9, 0.1], [3, 3], [2, 2], [0, 1]])


def test_gdig_keeps_only_what_helps_every_target_row() -> None:
    found = choose("gdig", {"influence": SCORES, "rows": ROWS}, 3, clusters=2)
    assert sorted(found.indices.tolist()) == [0, 3, 6]
    assert (
        found.notes["helps_every_target"],
        found.notes["survivors"],
        found.notes["quantile"],
    ) == (3, 3, 1.0)
    assert found.notes["cluster"].tolist()[1:3] == [-1, -1] and "note" not in found.notes
    assert found.notes["cluster"][0] == found.notes["cluster"][3] != found.notes["cluster"][6]


def test_gdig_takes_evenly_from_clusters() -> None:
    for seed in range(5):
        found = choose("gdig", {"influence": SCORES, "rows": ROWS}, 2, seed, clusters=2)
        assert 6 in found.indices.tolist()  # alone in its cluster


def test_gdig_lowers_the_share_as_little_as_it_can_and_says_so() -> None:
    found = choose("gdig", {"influence": SCORES, "rows": ROWS}, 5, clusters=2)
    assert set(found.indices.tolist()) <= {0, 1, 2, 3, 5, 6} and len(found) == 5
    assert found.notes["survivors"] == 6 and found.notes["quantile"] == pytest.approx(2 / 3)
    assert "3 rows help all 3" in found.notes["note"]
    assert sorted(
        choose(
            "gdig", {"influence": SCORES, "rows": ROWS}, 5, clusters=2, fill="none"
        ).indices.tolist()
    ) == [0, 3, 6]
    with pytest.raises(
        ValueError, match=r"no row helps all 3 target rows \(the most that one helps is 2\)"
    ):
        choose(
            "gdig",
            {"influence": SCORES.abs() * torch.tensor([1, 1, -1]), "rows": ROWS},
            2,
            fill="none",
        )


def test_t26_a_repeated_target_changes_nothing_and_a_further_one_only_takes_away() -> None:
    helped = {
        m: set(np.flatnonzero((SCORES[:, :m] > 0).all(dim=1).numpy()).tolist()) for m in (1, 2, 3)
    }
    assert helped[3] <= helped[2] <= helped[1]
    twice = torch.cat([SCORES, SCORES[:, :1]], dim=1)
    assert threshold((twice > 0).sum(1).numpy(), 4, 3) == 4
    assert np.flatnonzero((twice > 0).all(1).numpy()).tolist() == [0, 3, 6]


def test_gdig_as_released_ranks_by_the_mean() -> None:
    found = choose("gdig", {"influence": SCORES}, 3, preset="released")
    # means 3.3, 3, 2 (and 2 for row 6: the lower row first)
    assert found.indices.tolist() == [2, 1, 0]
    (signal,) = methods.make("gdig", {"preset": "released"}).needs()
    assert signal.backend == "kfac-released"


def test_even_resampling_shares_what_small_clusters_cannot_give() -> None:
    labels = np.array([0] * 10 + [1] * 2 + [2] * 5 + [-1] * 4)
    found = resample(labels, 9, np.random.default_rng(0))
    assert np.bincount(labels[found]).tolist() == [4, 2, 3]
    assert len(set(found.tolist())) == 9 and labels[found].min() == 0
    assert len(resample(labels, 17, np.random.default_rng(0))) == 17


def test_t51_and_t52_self_filter_lowers_its_neighbours() -> None:
    embeddings = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]])
    values = {
        "difficulty": torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64),
        "embeddings": embeddings,
    }
    found = choose("selffilter", values, 3, neighbours=2)
    assert found.indices.tolist() == [0, 2, 1]
    assert found.gains is not None and np.allclose(found.gains, [1, 0.8, -0.028], atol=1e-6)
    assert choose("selffilter", values, 2, gamma=0.0).indices.tolist() == [0, 1]


@pytest.mark.slow
def test_dsir_draws_by_weight_and_takes_the_heaviest_where_asked() -> None:
    weights = torch.tensor([0.0, 3, -2, 1, 40])
    assert choose("dsir", {"ngrams": weights}, 3, draw="top").indices.tolist() == [4, 1, 3]
    drawn = [choose("dsir", {"ngrams": weights[:4]}, 1, seed).indices[0] for seed in range(2000)]
    share = np.exp(weights[:4].numpy()) / np.exp(weights[:4].numpy()).sum()
    assert np.allclose(np.bincount(drawn, minlength=4) / 2000, share, atol=0.04)
    few, many = (choose("dsir", {"ngrams": weights}, k, 7).indices.tolist() for k in (2, 4))
    assert many[:2] == few


def test_ifd_discards_rows_whose_prompt_does_not_help() -> None:
    values = {"ifd": torch.tensor([[0.5, 1.2, 0.99, 0.2, 1.0], [1.0] * 5]).T}
    assert choose("ifd", values, 2).indices.tolist() == [2, 0]
    assert choose("ifd", values, 5, fill="none").indices.tolist() == [2, 0, 3]
    with pytest.raises(ValueError, match=r"below 0.1 \(the lowest is 0.2\)"):
        choose("ifd", values, 5, fill="none", most=0.1)
    filled = choose("ifd", values, 5)
    assert filled.indices.tolist() == [2, 0, 3, 4, 1] and "3 rows" in filled.notes["note"]
    assert Signal("ifd") in methods.make("ifd").needs()


def test_an_answer_known_by_heart_is_discarded_and_stops_nothing() -> None:
    values = {"ifd": torch.tensor([[0.1, 0.0], [0.5, 1.0], [0.9, 1.0]])}
    found = choose("ifd", values, 3)
    assert found.indices.tolist() == [2, 1, 0] and found.notes["below_most"] == 2


def test_ifd_divides_losses_or_perplexities() -> None:
    # By the ratio of losses the second row is the harder, by their difference the first.
    values = {"ifd": torch.tensor([[0.4, 0.5], [3.0, 3.2], [2.0, 1.0]])}
    losses, perplexities = (choose("ifd", values, 1, ratio=r) for r in ("loss", "perplexity"))
    assert (losses.indices.tolist(), perplexities.indices.tolist()) == ([1], [0])
    assert losses.notes["score"] == pytest.approx([0.8, 3.0 / 3.2, 2.0])
    assert perplexities.notes["score"] == pytest.approx(np.exp([-0.1, -0.2, 1.0]))
    assert losses.notes["below_most"] == perplexities.notes["below_most"] == 2


def test_gdig_says_how_many_survivors_help_nothing() -> None:
    found = choose("gdig", {"influence": -SCORES.abs() - 1, "rows": ROWS}, 4, clusters=2)
    assert len(found) == 4 and found.notes["quantile"] == 0
    assert (
        "the 7 rows that help at least 0 of them (0.0%) were clustered; 7 of these help none"
        in found.notes["note"]
    )
    mixed = choose("gdig", {"influence": SCORES, "rows": ROWS}, 7, clusters=2)
    assert len(mixed) == 7 and "; 1 of these help none" in mixed.notes["note"]
    assert (
        "help none"
        not in choose("gdig", {"influence": SCORES, "rows": ROWS}, 5, clusters=2).notes["note"]
    )


@pytest.mark.parametrize("n", [9, 10])
def test_the_middle_of_perplexity_does_not_depend_on_the_order_of_rows(n: int) -> None:
    losses = torch.arange(n) * 0.5 + 1
    for budget in range(1, n + 1):
        plain = choose("perplexity", {"loss": losses}, budget).indices.tolist()
        for seed in range(50):
            order = np.random.default_rng(seed).permutation(n)
            assert (
                order[
                    choose("perplexity", {"loss": losses[torch.as_tensor(order)]}, budget).indices
                ].tolist()
                == plain
            )
    assert plain[:3] == ([4, 3, 5] if n == 9 else [4, 5, 3])
