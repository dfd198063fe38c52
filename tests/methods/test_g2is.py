"""G2IS on hand-made rows; the walk itself is tested with its rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradsift.errors import ConfigError
from gradsift.methods import make
from gradsift.rules import components, walk
from gradsift.types import Signal
from tests.methods.vectors import Stored, at_angles, choose, random_rows

AS_IT_IS = {"preset": "uncentred", "remove_mean": False}
EAST = torch.tensor([[1.0, 0.0]])
FOUR = at_angles(0, 20, 100, -36.87)


def test_three_rows_agree_and_the_fourth_is_topped_up_and_noted() -> None:  # T3.1
    assert choose(make("g2is", AS_IT_IS), FOUR, EAST, 3).indices.tolist() == [0, 1, 3]
    four = choose(make("g2is", AS_IT_IS), FOUR, EAST, 4)
    assert four.indices.tolist() == [0, 1, 3, 2]
    assert four.notes["walked"] == 3 and four.notes["component"].tolist() == [0, 0, -1, 0]
    assert "ended after 3 rows" in four.notes["note"]


@pytest.mark.parametrize(("consistency", "expected"), [(0.8, [0, 2]), (0.6, [0, 1])])
# T3.1b with neighbours as they are
def test_consistency_decides_who_may_follow(consistency: float, expected: list[int]) -> None:
    # From 30 degrees the nearest row is at 85; their sum points to 57.5 and keeps 0.62 of the
    # alignment with east. -40 keeps all.
    chosen = choose(
        make("g2is", {**AS_IT_IS, "consistency": consistency}), at_angles(30, 85, -40), EAST, 2
    )
    assert chosen.indices.tolist() == expected and chosen.notes["walked"] == 2


def test_the_start_is_the_row_of_highest_signed_product() -> None:  # T3.1c
    assert choose(make("g2is", AS_IT_IS), FOUR, -EAST, 2).indices.tolist() == [2, 1]


def test_seats_follow_the_shares_of_the_directions() -> None:  # T3.2
    target = torch.diag(torch.tensor([0.46, 0.29, 0.25]).sqrt())
    pool = torch.eye(3).repeat_interleave(12, dim=0) + 0.02 * random_rows(36, 3, 1).abs()
    chosen = choose(make("g2is", {**AS_IT_IS, "keep": 1.0}), pool, target, 10)
    assert np.bincount(chosen.notes["component"][chosen.indices]).tolist() == [5, 3, 2]
    assert np.allclose(chosen.notes["component_weights"], [0.46, 0.29, 0.25], atol=1e-6)


def test_every_walk_is_free_of_conflict_and_stays_consistent() -> None:  # T3.3
    pool, target = random_rows(80, 6, 2), random_rows(9, 6, 3) + 0.5
    chosen = choose(make("g2is", {**AS_IT_IS, "keep": 0.9, "neighbours": 10}), pool, target, 24)
    unit = torch.nn.functional.normalize(pool.double(), dim=1)
    core = components.principal(target, 0.9, centred=False)
    origin = chosen.notes["component"][chosen.indices]
    assert len(set(chosen.indices.tolist())) == 24 and len(core) > 1
    for c in range(len(core)):
        members = unit[torch.as_tensor(chosen.indices[origin == c])]
        assert bool((members @ members.T >= 0).all())
        sums = torch.nn.functional.normalize(members.cumsum(0), dim=1) @ core.directions[c].double()
        assert bool((sums.abs()[1:] >= 0.8 * sums.abs()[:-1] - 1e-12).all())


def test_without_tests_the_walk_goes_to_the_nearest_unused_neighbour() -> None:  # T3.4
    pool = random_rows(20, 5, 4).abs()
    chosen = choose(
        make("g2is", {**AS_IT_IS, "consistency": 0, "neighbours": 19}), pool, torch.ones(1, 5), 20
    )
    unit = torch.nn.functional.normalize(pool, dim=1)
    expected = [int((unit @ torch.ones(5)).argmax())]
    while len(expected) < 20:
        near = unit @ unit[expected[-1]]
        near[expected] = -2
        expected.append(int(near.argmax()))
    assert chosen.indices.tolist() == expected and chosen.notes["walked"] == 20


def test_lengths_of_pool_rows_do_not_count() -> None:  # T3.5
    pool, target = random_rows(50, 8, 5), random_rows(6, 8, 6)
    scaled = pool * torch.linspace(0.01, 30, 50)[:, None]
    plain = choose(make("g2is", AS_IT_IS), pool, target, 15).indices.tolist()
    assert choose(make("g2is", AS_IT_IS), scaled, target, 15).indices.tolist() == plain
    assert (
        choose(make("g2is", AS_IT_IS), Stored(scaled), Stored(target), 15).indices.tolist() == plain
    )


def test_lengths_of_target_rows_do() -> None:
    pool, long = random_rows(50, 8, 5), random_rows(6, 8, 6)
    long[0] *= 20
    (first,) = components.principal(long, 0.5, centred=False).directions
    assert abs(float(first @ long[0]) / float(long[0].norm())) > 0.99
    stored = choose(make("g2is", AS_IT_IS), pool, Stored(long), 10)
    assert (
        stored.indices.tolist() == choose(make("g2is", AS_IT_IS), pool, long, 10).indices.tolist()
    )
    assert (
        stored.indices.tolist()
        != choose(
            make("g2is", AS_IT_IS), pool, torch.nn.functional.normalize(long, dim=1), 10
        ).indices.tolist()
    )


def test_released_centres_does_not_orient_and_leaves_the_pool_as_it_is() -> None:
    pool, target = random_rows(60, 6, 7), random_rows(7, 6, 8) + 1.0
    released = choose(make("g2is", {"preset": "released"}), pool, target, 20)
    spelled = choose(
        make("g2is", {**AS_IT_IS, "centred": True, "orient": False, "redistribute": False}),
        pool,
        target,
        20,
    )
    assert released.indices.tolist() == spelled.indices.tolist()
    assert (
        released.indices.tolist()
        != choose(make("g2is", AS_IT_IS), pool, target, 20).indices.tolist()
    )
    paper = choose(make("g2is", {"preset": "paper"}), pool, target, 20)
    assert paper.indices.tolist() == released.indices.tolist()  # on the same rows


def test_what_all_pool_rows_share_is_taken_out() -> None:
    pool, target, shared = random_rows(60, 8, 11), random_rows(6, 8, 12), 5 * random_rows(1, 8, 13)
    unit = torch.nn.functional.normalize(pool + shared, dim=1)
    removed = choose(make("g2is", {"preset": "uncentred"}), pool + shared, target, 20)
    by_hand = choose(make("g2is", AS_IT_IS), unit - unit.mean(0), target, 20)
    assert removed.indices.tolist() == by_hand.indices.tolist()
    assert bool((unit @ unit.T > 0).all())  # with the shared part no two rows are in conflict
    assert (
        removed.indices.tolist()
        != choose(make("g2is", AS_IT_IS), unit, target, 20).indices.tolist()
    )


def test_a_target_of_equal_rows_has_a_direction_only_when_uncentred() -> None:  # T3.6
    same = torch.ones(4, 2)
    assert len(choose(make("g2is", AS_IT_IS), FOUR, same, 2)) == 2
    with pytest.raises(ValueError, match="no principal direction"):
        choose(make("g2is", {"preset": "released"}), FOUR, same, 2)


def test_redistribution_fills_seats_of_walks_that_ended() -> None:
    east, north = at_angles(0, 2, 4), at_angles(90)
    pool, target = torch.cat([east, north]), torch.tensor([[1.0, 0.0], [0.0, 1.1]])
    moved = choose(make("g2is", {**AS_IT_IS, "keep": 1.0, "consistency": 0.95}), pool, target, 4)
    assert moved.notes["walked"] == 4
    ended = choose(
        make("g2is", {**AS_IT_IS, "keep": 1.0, "consistency": 0.95, "redistribute": False}),
        pool,
        target,
        4,
    )
    assert ended.notes["walked"] < 4 and len(ended) == 4


def test_approximate_neighbours_find_the_same_rows() -> None:
    pool, target = random_rows(70, 8, 9), random_rows(5, 8, 10)
    exact, fast = (
        choose(
            make("g2is", {**AS_IT_IS, "exact": e, "neighbours": 12}), pool, target, 12
        ).indices.tolist()
        for e in (True, False)
    )
    assert exact == fast


def test_a_pool_of_one_row_is_chosen() -> None:
    assert choose(
        make("g2is", AS_IT_IS), torch.ones(1, 3), torch.ones(2, 3), 1
    ).indices.tolist() == [0]


def test_the_default_walks_toward_the_mean_unit_row_of_each_group() -> None:
    pool, target = (
        random_rows(60, 8, 14),
        random_rows(10, 8, 15) * torch.linspace(0.1, 40, 10)[:, None],
    )
    groups = ["a"] * 7 + ["b"] * 3
    unit = torch.nn.functional.normalize(target, dim=1)
    directions = torch.nn.functional.normalize(
        torch.stack([unit[:7].mean(0), unit[7:].mean(0)]), dim=1
    )
    near = torch.nn.functional.normalize(pool, dim=1)
    graph = (near @ near.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :50]
    expected = walk.gradient_walk(
        pool, directions, [11, 10], graph, consistency=0.8, redistribute=True
    )
    chosen = choose(make("g2is"), pool, target, 21, groups=groups)
    assert chosen.notes["walked"] == len(expected)
    assert chosen.indices[: len(expected)].tolist() == expected.indices.tolist()
    assert chosen.notes["component_weights"].tolist() == [0.5, 0.5]
    spelled = {"preset": "uncentred", "core": "mean", "remove_mean": False, "transform": "none"}
    assert (
        choose(make("g2is", spelled), pool, target, 21, groups=groups).indices.tolist()
        == chosen.indices.tolist()
    )
    back, ours = {"core": "principal", "remove_mean": True}, {"preset": "uncentred"}
    assert (
        choose(make("g2is", back), pool, target, 21).indices.tolist()
        == choose(make("g2is", ours), pool, target, 21).indices.tolist()
    )


def test_target_rows_that_cancel_or_are_no_numbers_have_no_mean_direction() -> None:
    with pytest.raises(ValueError, match="target group 'b' are zero or cancel"):
        choose(make("g2is"), FOUR, torch.cat([EAST, EAST, -EAST]), 2, groups=["a", "b", "b"])
    with pytest.raises(ValueError, match="target group 'a' are zero or cancel"):
        choose(make("g2is"), FOUR, torch.cat([0 * EAST, EAST]), 2, groups=["a", "b"])
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose(make("g2is"), FOUR, torch.cat([torch.nan * EAST, EAST]), 2, groups=["a", "b"])


def test_each_preset_reads_its_rows_of_the_pool() -> None:
    target = Signal("rows", side="target")
    assert make("g2is").needs() == {Signal("rows"), target}
    assert make("g2is", {"preset": "uncentred"}).needs() == {
        Signal("rows", transform="adam"),
        target,
    }
    assert make("g2is", {"preset": "paper"}).needs() == {Signal("rows", transform="adam"), target}
    assert make("g2is", {"preset": "released"}).needs() == {
        Signal("rows", transform="adam", adam_form="released"),
        target,
    }
    assert make("g2is", {"preset": "uncentred", "transform": "none"}).needs() == {
        Signal("rows"),
        target,
    }


@pytest.mark.parametrize("option", [{"keep": 0.9}, {"centred": True}, {"orient": False}])
def test_options_of_the_principal_directions_are_refused_without_them(
    option: dict[str, Any],
) -> None:
    with pytest.raises(
        ConfigError, match=f"options of g2is: {next(iter(option))} is of the principal directions"
    ):
        make("g2is", option)
    assert make("g2is", {**option, "core": "principal"}) and make(
        "g2is", {**option, "preset": "uncentred"}
    )


def test_groups_whose_walks_ended_are_topped_up_to_the_same_number() -> None:
    # Every pair of rows is in conflict or at a right angle: each walk ends at once. Group a has the
    # larger cosines.
    pool = torch.eye(8, 10)
    pool[:4, 8], pool[4:, 9] = (
        torch.tensor([4.0, 3.0, 2.0, 1.0]),
        torch.tensor([0.4, 0.3, 0.2, 0.1]),
    )
    pool = torch.cat([pool, -pool[:2]])
    target = torch.zeros(2, 10)
    target[0, 8] = target[1, 9] = 1.0
    chosen = choose(make("g2is", {"consistency": 1.5}), pool, target, 7, groups=["a", "b"])
    assert chosen.notes["walked"] == 2 and chosen.indices.tolist() == [0, 4, 1, 5, 2, 6, 3]
    assert "cosine with the mean of a target group" in chosen.notes["note"]
    assert (
        chosen.gains is not None
        and chosen.gains.tolist() == chosen.notes["score"][chosen.indices].tolist()
    )
