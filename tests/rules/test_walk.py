from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsift.rules import blocks, components, knn, walk

from .stores import Sliced


def angles(*degrees: float) -> torch.Tensor:
    return torch.tensor(
        [[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees],
        dtype=torch.float64,
    )


def naive(rows, directions, budgets, neighbours, consistency, redistribute):
    """Plain loops over the same definition."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    used, picks, origin = set(), [], []
    sets: list[list[int]] = [[] for _ in budgets]
    ended = [b == 0 for b in budgets]

    def passes(c, j):
        total = rows[sets[c]].sum(0)
        align = lambda v: abs(v @ directions[c]) / max(np.linalg.norm(v), 1e-300)  # noqa: E731
        agrees = all(rows[j] @ rows[s] >= -1e-6 for s in sets[c])
        return (
            j not in used and agrees and align(total + rows[j]) >= consistency * align(total) - 1e-6
        )

    def step(c):
        ranked = sorted(range(len(rows)), key=lambda j: (-(rows[j] @ directions[c]), j))
        if not sets[c]:
            return next((j for j in ranked if j not in used), None)
        near = [j for j in neighbours[sets[c][-1]] if passes(c, j)]
        return next(iter(near + [j for j in ranked if passes(c, j)]), None)

    def advance(c, seats):
        for _ in range(seats):
            j = None if ended[c] else step(c)
            if j is None:
                ended[c] = True
                return
            used.add(j)
            sets[c].append(j)
            picks.append(j)
            origin.append(c)

    for c, seats in enumerate(budgets):
        advance(c, seats)
    goal = min(len(rows), sum(budgets))
    while redistribute and len(picks) < goal and not all(ended):
        weight = [0 if e else b for e, b in zip(ended, budgets, strict=True)]
        left = goal - len(picks)
        exact = [left * w / sum(weight) for w in weight]
        shares = [int(e + 1e-9) for e in exact]
        for c in sorted(range(len(exact)), key=lambda c: (round(shares[c] - exact[c], 9), c))[
            : left - sum(shares)
        ]:
            shares[c] += 1
        for c, share in enumerate(shares):
            advance(c, share)
    return picks, origin


@pytest.mark.parametrize(("budget", "expected"), [(3, [0, 1, 3]), (4, [0, 1, 3])])
def test_a_conflicting_row_is_never_taken(budget, expected):
    """methods.md T3.1."""
    rows = angles(0, 20, 100, -36.87)
    found = walk.gradient_walk(rows, angles(0), [budget], knn.graph(rows, 3)[0])
    assert found.indices.tolist() == expected
    assert found.component.tolist() == [0] * 3


@pytest.mark.parametrize(("consistency", "expected"), [(0.8, [0, 2]), (0.7, [0, 1])])
def test_consistency_decides_between_neighbours(consistency, expected):
    """methods.md T3.1b."""
    found = walk.gradient_walk(
        angles(0, 85, 30), angles(0), [2], [[1, 2], [2, 0], [0, 1]], consistency=consistency
    )
    assert found.indices.tolist() == expected


def test_the_anchor_is_signed():
    """methods.md T3.1c."""
    rows = angles(0, 20, 100, -36.87)
    assert walk.gradient_walk(
        rows, torch.tensor([[-1.0, 0]]), [2], knn.graph(rows, 3)[0]
    ).indices.tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("off", "taken"), [(0.0, True), (-1e-4, True), (1e-4, False)])
def test_at_a_right_angle_rounding_decides_nothing(dtype, off, taken):
    """Two rows 90 degrees + `off` radians apart, turned at random in 40 dimensions, whose product
    rounds to either side of 0.
    """
    signs = set()
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(40, 2, generator=g, dtype=torch.float64)).Q.T
        rows = torch.stack(
            [basis[0], -math.sin(off) * basis[0] + math.cos(off) * basis[1]]
        ) * torch.tensor([[3.0], [7.0]])
        rows = rows.to(dtype)
        signs.add(bool(torch.nn.functional.normalize(rows.double(), dim=1).prod(0).sum() >= 0))
        for order in ([0, 1], [1, 0]):
            given, anchor = rows[order], order.index(0)
            found = walk.gradient_walk(given, basis[:1], [2], [[1], [0]], consistency=0.0)
            assert found.indices.tolist() == ([anchor, 1 - anchor] if taken else [anchor]), (
                seed,
                order,
            )
    assert signs == ({True, False} if off == 0 else {taken})


def test_an_equal_alignment_is_kept_whatever_its_last_digit():
    for seed in range(40):
        direction = torch.randn(
            1, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        # all along the direction: no pick loses any of the alignment
        rows = (direction * torch.tensor([[1.0], [0.3], [0.7]])).float()
        assert (
            len(walk.gradient_walk(rows, direction, [3], [[1, 2], [2, 0], [0, 1]], consistency=1.0))
            == 3
        )


def problem(seed: int, n: int, d: int, c: int, k: int):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=g, dtype=torch.float64)
    return rows, torch.randn(c, d, generator=g, dtype=torch.float64), knn.graph(rows, k)[0]


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(3, 30),
    d=st.integers(2, 5),
    budgets=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    consistency=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    redistribute=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_matches_the_plain_loops_and_keeps_its_promises(
    seed, n, d, budgets, consistency, redistribute, data
):
    rows, directions, graph = problem(seed, n, d, len(budgets), data.draw(st.integers(1, n - 1)))
    found = walk.gradient_walk(
        rows, directions, budgets, graph, consistency=consistency, redistribute=redistribute
    )
    picks, origin = naive(
        rows.numpy(), directions.numpy(), budgets, graph.tolist(), consistency, redistribute
    )
    assert found.indices.tolist() == picks
    assert found.component.tolist() == origin
    # methods.md T3.3
    assert len(set(picks)) == len(picks) <= min(n, sum(budgets))
    unit = torch.nn.functional.normalize(rows, dim=1)
    for c in range(len(budgets)):
        members = unit[found.indices[found.component == c]]
        assert (members @ members.T >= -1e-6).all()
        prefix = torch.nn.functional.normalize(
            members.cumsum(0), dim=1
        ) @ torch.nn.functional.normalize(directions[c], dim=0)
        assert (prefix[1:].abs() >= consistency * prefix[:-1].abs() - 1.1e-6).all()


def test_without_consistency_and_conflicts_it_chains_nearest_neighbours():
    """methods.md T3.4."""
    rows = torch.rand(25, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.nn.functional.normalize(rows, dim=1)
    chain = [int((unit @ torch.ones(6, dtype=torch.float64)).argmax())]
    while len(chain) < 25:
        similarity = unit @ unit[chain[-1]]
        similarity[chain] = -2
        chain.append(int(similarity.argmax()))
    assert (
        walk.gradient_walk(
            rows, torch.ones(1, 6), [25], knn.graph(rows, 24)[0], consistency=0
        ).indices.tolist()
        == chain
    )


def test_row_scale_component_scale_and_row_order_do_not_matter():
    """methods.md T3.5, first part."""
    rows, directions, graph = problem(4, 30, 5, 3, 8)
    plain = walk.gradient_walk(rows, directions, [6, 5, 4], graph)
    g = torch.Generator().manual_seed(1)
    scaled = walk.gradient_walk(
        rows * torch.rand(30, 1, generator=g) * 9 + 0, directions * 7, [6, 5, 4], graph
    )
    assert torch.equal(plain.indices, scaled.indices)
    order = torch.randperm(30, generator=g)
    moved = walk.gradient_walk(rows[order], directions, [6, 5, 4], knn.graph(rows[order], 8)[0])
    assert torch.equal(order[moved.indices], plain.indices)


def test_oriented_components_give_the_same_walk_whatever_their_sign():
    """methods.md T3.5, second part: orientation undoes a sign that the eigenvectors leave open."""
    rows, _, graph = problem(5, 30, 6, 1, 8)
    target = torch.randn(12, 6, generator=torch.Generator().manual_seed(2)) + 0.5
    found = components.principal(target)
    flipped = components.oriented(-found.directions.double(), target.double().mean(0))
    assert torch.allclose(flipped.float(), found.directions)
    assert ((target.mean(0) @ found.directions.T) >= 0).all()
    budgets = [4] * len(found)
    a, b = (
        walk.gradient_walk(rows, directions, budgets, graph).indices
        for directions in (found.directions, flipped)
    )
    assert torch.equal(a, b)


def test_seats_of_ended_walks_go_to_the_others():
    rows = angles(0, 180, 175, 185, 170, 190)
    graph = knn.graph(rows, 5)[0]
    directions = angles(0, 180)
    short = walk.gradient_walk(rows, directions, [3, 3], graph)
    full = walk.gradient_walk(rows, directions, [3, 3], graph, redistribute=True)
    assert short.component.tolist() == [0, 1, 1, 1]
    assert full.component.tolist() == [0, 1, 1, 1, 1, 1]
    assert full.indices.tolist()[:4] == short.indices.tolist()


def test_a_store_is_walked_by_slices():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(2500, 8, generator=g).half()
    graph = knn.graph(rows, 5)[0]
    directions = torch.randn(2, 8, generator=g)
    store = Sliced(rows)
    plain = walk.gradient_walk(rows, directions, [40, 30], graph)
    assert torch.equal(
        walk.gradient_walk(store, directions, [40, 30], graph).indices, plain.indices
    )
    assert store.widest <= blocks.BLOCK


@pytest.mark.parametrize(
    "change",
    [
        {"budgets": [1, 2]},
        {"budgets": [-1]},
        {"components": torch.ones(1, 3)},
        {"components": torch.tensor([[float("nan"), 1]])},
        {"rows": torch.tensor([[float("nan"), 1], [1, 0]])},
        {"neighbours": [[1], [2]]},
        {"neighbours": [[1]]},
        {"neighbours": [[1.0], [0.0]]},
        {"consistency": -0.1},
    ],
)
def test_bad_arguments_are_value_errors(change):
    good = {
        "rows": torch.eye(2),
        "components": torch.ones(1, 2),
        "budgets": [1],
        "neighbours": [[1], [0]],
    }
    with pytest.raises(ValueError, match=r"must|hold"):
        walk.gradient_walk(**{**good, **change})
