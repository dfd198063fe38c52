"""Influence scores against one-by-one products, and the cases of LESS (methods.md section 6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gradsift.errors import UnknownName, UserError
from gradsift.rules import topk
from gradsift.signals.backends import BACKENDS
from gradsift.signals.influence import score
from gradsift.store.rows import RowView
from gradsift.types import checkpoint_weights


class Stored:
    """Unit rows with scales, as a store gives them."""

    def __init__(self, raw: Tensor) -> None:
        self.scales = raw.norm(dim=1)
        self.rows = torch.nn.functional.normalize(raw, dim=1)
        self.shape = tuple(raw.shape)

    def __getitem__(self, where: slice) -> Tensor:
        return self.rows[where]


def raw(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.rand(n, 1, generator=generator).add(0.1)


def naive(
    pool: list[Tensor], target: list[Tensor], weights: list[float], name: str, groups: list[str]
) -> np.ndarray:
    """Row by row, column by column, checkpoint by checkpoint."""
    backend, names = BACKENDS[name], list(dict.fromkeys(groups))
    columns = (
        [[j for j, g in enumerate(groups) if g == name] for name in names]
        if backend.merge
        else [[j] for j in range(len(groups))]
    )
    out = np.zeros((len(pool[0]), len(columns)))
    for p, q, weight in zip(pool, target, weights, strict=True):
        if backend.whiten:
            gram = p.double().T @ p.double()
            inverse = torch.linalg.inv(
                gram + 0.1 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
            )
            q = q.double() @ inverse
        for i in range(len(p)):
            for c, members in enumerate(columns):
                b = q[members].double().mean(0)
                a = p[i].double()
                a = a / a.norm() if backend.pool == "unit" else a
                b = b / b.norm() if backend.target == "unit" else b
                out[i, c] += weight / sum(weights) * float(a @ b)
    return out


@pytest.mark.parametrize(
    "name", sorted(name for name, backend in BACKENDS.items() if backend.curvature is None)
)
def test_streaming_scores_equal_one_by_one_products(name: str) -> None:
    pool, target, groups = (
        [raw(20, 12, 1), raw(20, 12, 2)],
        [raw(5, 12, 3), raw(5, 12, 4)],
        ["a", "b", "a", "c", "b"],
    )
    weights = [2e-4, 5e-5]
    got = score(
        [Stored(p) for p in pool], [Stored(t) for t in target], weights, name, groups=groups
    )
    assert np.allclose(got.numpy(), naive(pool, target, weights, name, groups), atol=1e-6)


def test_plain_tensors_and_stores_agree() -> None:
    pool, target = raw(30, 8, 5), raw(4, 8, 6)
    for name in ("dot", "cosine"):
        assert torch.allclose(
            score([pool], [target], [1.0], name),
            score([Stored(pool)], [Stored(target)], [1.0], name),
            atol=1e-6,
        )


# narrow and wide sides are multiplied in slices of different height
@pytest.mark.parametrize("m", [3, 200])
def test_cutting_the_pool_into_blocks_changes_no_bit(m: int) -> None:
    pool, target = Stored(raw(5000, 16, 7)), Stored(raw(m, 16, 8))
    exact = pool.rows.double() @ target.rows.double().T
    for name, wanted in (("cosine", exact), ("dot", exact * pool.scales[:, None] * target.scales)):
        whole = score([pool], [target], [1.0], name)
        parts = [
            score([RowView(pool, range(a, min(a + 2048, 5000)))], [target], [1.0], name)
            for a in range(0, 5000, 2048)
        ]
        assert torch.equal(whole, torch.cat(parts))
        assert torch.allclose(whole.double(), wanted, atol=1e-5)


def test_scores_lie_between_minus_one_and_one_and_ignore_positive_scales() -> None:  # T6.2
    pool, target = [raw(15, 6, 1), raw(15, 6, 2)], [raw(4, 6, 3), raw(4, 6, 4)]
    plain = score([Stored(p) for p in pool], [Stored(t) for t in target], [3.0, 1.0], "less")
    assert plain.abs().max() <= 1 + 1e-6
    scaled = score(
        [Stored(p * 7) for p in pool], [Stored(t * 0.01) for t in target], [30.0, 10.0], "less"
    )
    assert torch.allclose(plain, scaled, atol=1e-6)


@pytest.mark.parametrize(
    ("rates", "weights"),
    [
        ((2.1569e-6, 6.0784e-6, 1e-5), (0.11828, 0.33333, 0.54839)),  # TAGCOS, steps 10, 20, 30
        # LESS, four epochs
        ((1.6877e-5, 1.2859e-5, 7.703e-6, 2.5616e-6), (0.4219, 0.3215, 0.1926, 0.0640)),
    ],
)
# T1.8
def test_checkpoints_count_by_their_mean_learning_rate(
    rates: tuple[float, ...], weights: tuple[float, ...]
) -> None:
    east, north = torch.eye(2)
    for chosen, weight in enumerate(weights):
        # the row points the target's way at one checkpoint and across it at the others
        pool = [(east if c == chosen else north)[None] for c in range(len(rates))]
        assert float(score(pool, [east[None]] * len(rates), list(rates), "less")) == pytest.approx(
            weight, abs=5e-5
        )


def test_groups_of_cosines() -> None:  # T6.3
    rows = torch.eye(2)
    target = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, 1]])
    scores = topk.group_scores(score([rows], [target], [1.0], "less"), ["s", "s", "t", "t"])
    assert torch.allclose(scores, torch.tensor([[0.5, -0.5], [0.5, 0.5]]))
    assert scores.max(dim=1).values.tolist() == [0.5, 0.5]


def test_mean_of_cosines_is_not_the_cosine_of_the_mean() -> None:  # T6.4
    target, train = Stored(torch.tensor([[10.0, 0], [0, 1]])), Stored(torch.tensor([[0.0, 1]]))
    mean_of_cosines = topk.group_scores(score([train], [target], [1.0], "less"), ["s", "s"])
    assert float(mean_of_cosines) == pytest.approx(0.5)
    assert float(score([train], [target], [1.0], "less-mean", groups=["s", "s"])) == pytest.approx(
        0.0995, abs=5e-5
    )


def test_duplicated_groups_and_examples_change_nothing() -> None:  # T6.6
    pool, target, groups = raw(9, 5, 1), raw(4, 5, 2), ["a", "a", "b", "b"]
    for name in ("less", "less-mean"):

        def best(target: Tensor, groups: list[str], name: str = name) -> Tensor:
            scores = score([pool], [target], [1.0], name, groups=groups)
            return (
                (scores if name == "less-mean" else topk.group_scores(scores, groups))
                .max(dim=1)
                .values
            )

        plain = best(target, groups)
        block_twice = best(torch.cat([target, target[:2]]), [*groups, "c", "c"])
        examples_twice = best(torch.cat([target, target]), groups + groups)
        assert torch.allclose(plain, block_twice, atol=1e-6)
        assert torch.allclose(plain, examples_twice, atol=1e-6)


def test_what_does_not_pair_up_is_refused() -> None:
    with pytest.raises(UserError, match="same projection"):
        score([torch.randn(3, 4)], [torch.randn(2, 5)], [1.0], "dot")
    with pytest.raises(UserError, match="do not pair up"):
        score([torch.randn(3, 4)], [torch.randn(2, 4)], [1.0, 2.0], "dot")
    with pytest.raises(UnknownName, match="'cosine'"):
        score([torch.randn(3, 4)], [torch.randn(2, 4)], [1.0], "cosin")


def test_a_backend_of_whole_gradients_is_not_applied_to_stored_rows() -> None:
    with pytest.raises(UserError, match="ekfac reads whole gradients"):
        score([raw(4, 3, 1)], [raw(2, 3, 2)], [1.0], "ekfac")


def test_checkpoints_weigh_in_proportion_to_their_learning_rates() -> None:
    assert checkpoint_weights([3e-4, 1e-4]) == pytest.approx([0.75, 0.25])
    assert checkpoint_weights([0.0]) == [1.0]  # alone, whatever its rate
    assert checkpoint_weights([]) == []
