"""K-FAC and EK-FAC on matrices small enough to write down, named after methods.md section 2.6, and
the fast sums against plain ones.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gradsift.errors import ConfigError, DataError, MismatchError
from gradsift.signals.curvature.kfac import (
    Eigen,
    Inverse,
    add_gram,
    add_second_moments,
    eigen_inverse,
    eigenbasis,
    pi_inverse,
    symmetrise,
)
from gradsift.types import Transform


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)
    add_gram(total, x)
    return symmetrise(total)


def fisher(grads: Tensor) -> Tensor:
    """sum of vec(g) vec(g)^T, gradients flattened by row."""
    flat = grads.flatten(1)
    return flat.t() @ flat


def kfac(a: Tensor, d: Tensor) -> Tensor:
    """G (x) A of inputs a [n, i] and output gradients d [n, o], for gradients flattened by row."""
    return torch.kron(gram(d), gram(a))


def eigen(left: Tensor, right: Tensor, grads: Tensor | None = None) -> Eigen:
    """The eigenbasis of two factors; with `grads` [n, r, c] corrected eigenvalues, as means over
    them.
    """
    (ul, el), (ur, er) = eigenbasis(left), eigenbasis(right)
    values = torch.outer(el, er)
    if grads is not None:
        values = (ul.t() @ grads @ ur).square().mean(0)
    return Eigen(ul, ur, values)


def dense(e: Eigen) -> Tensor:
    basis = torch.kron(e.left, e.right)
    return basis @ torch.diag(e.values.flatten()) @ basis.t()


# --- methods.md 2.6


def test_t21_one_token_kfac_is_the_fisher() -> None:
    # whole numbers: no rounding
    a, d = torch.tensor([[2.0, -1, 3, 5]]).double(), torch.tensor([[4.0, 7, -2]]).double()
    grad = d.t() @ a
    assert torch.equal(kfac(a, d), fisher(grad[None]))
    by_column = grad.t().flatten()
    assert torch.equal(torch.kron(gram(a), gram(d)), torch.outer(by_column, by_column))


def test_t22_two_tokens_tell_the_forms_apart() -> None:
    a = d = torch.eye(2, dtype=torch.float64)
    grad = d.t() @ a
    reduce, expand_sum, true = kfac(a.sum(0)[None], d.sum(0)[None]), kfac(a, d), fisher(grad[None])
    expand = torch.kron(gram(d) / 2, gram(a) / 2)
    assert torch.equal(grad, torch.eye(2, dtype=torch.float64))
    assert torch.equal(reduce, torch.ones(4, 4, dtype=torch.float64))
    assert torch.equal(expand_sum, torch.eye(4, dtype=torch.float64))
    assert torch.equal(expand, torch.eye(4, dtype=torch.float64) / 4)
    assert [float(m.trace()) for m in (reduce, expand_sum, expand, true)] == [4, 4, 1, 2]


def test_t23_factored_damping_is_not_additive() -> None:
    a, g, ones = (
        4 * torch.eye(2, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64),
        torch.ones(3, 2, dtype=torch.float64),
    )
    factored, damped = pi_inverse("w", g, a, 0.25, absolute=True)
    # G damped to 1.25 I
    assert torch.allclose(factored.left, torch.eye(3, dtype=torch.float64) / 1.25)
    # A damped to 5 I: pi = 2
    assert torch.allclose(factored.right, torch.eye(2, dtype=torch.float64) / 5)
    assert torch.allclose(factored.apply(ones), torch.full((3, 2), 0.16, dtype=torch.float64))
    additive, _ = eigen_inverse("w", eigen(g, a), 0.25, absolute=True)
    assert torch.allclose(
        additive.apply(ones), torch.full((3, 2), 0.235294, dtype=torch.float64), atol=1e-6
    )
    # each factor is damped by sqrt(lambda / (mean A x mean G)) = 0.25 of its own mean eigenvalue
    assert damped.ratio == pytest.approx(0.25**2)
    assert damped.mean_eigenvalue == 4


def test_t24_corrected_eigenvalues_keep_the_trace_and_lower_the_error() -> None:
    a = torch.tensor([[1, 2], [2, -1], [1, 1]], dtype=torch.float64)
    d = torch.tensor([[3, -1, 2], [0, 1, 1], [1, 0, -1]], dtype=torch.float64)
    grads = d[:, :, None] * a[:, None, :]
    factor_a, factor_g, true = gram(a) / 3, gram(d) / 3, fisher(grads) / 3
    product, corrected = dense(eigen(factor_g, factor_a)), dense(eigen(factor_g, factor_a, grads))
    assert torch.allclose(
        eigenbasis(factor_a)[1], torch.tensor([1.6667, 2.3333], dtype=torch.float64), atol=1e-4
    )
    assert torch.allclose(
        eigenbasis(factor_g)[1], torch.tensor([0.2826, 1, 4.7174], dtype=torch.float64), atol=1e-4
    )
    assert [float(m.trace()) for m in (true, product, corrected)] == pytest.approx([28, 24, 28])
    assert float((true - product).norm()) == pytest.approx(15.3285, abs=1e-4)
    assert float((true - corrected).norm()) == pytest.approx(10.1568, abs=1e-4)


def test_t24_holds_on_random_gradients() -> None:
    for seed in range(5):
        a, d = random(20, 5, 4, seed=seed), random(20, 5, 3, seed=seed + 100)
        grads = d.transpose(1, 2) @ a
        left, right, true = (
            gram(d.flatten(0, 1)) / 20,
            gram(a.flatten(0, 1)) / 100,
            fisher(grads) / 20,
        )
        product, corrected = dense(eigen(left, right)), dense(eigen(left, right, grads))
        assert float((true - corrected).norm()) <= float((true - product).norm())
        assert float(corrected.trace()) == pytest.approx(float(true.trace()))


@pytest.mark.parametrize("style", ["eigen", "pi"])
def test_t25_large_damping_ranks_as_the_dot_product(style: str) -> None:
    left, right = gram(random(50, 3)) / 50, gram(random(50, 4, seed=1)) / 50
    target, pool = random(3, 4, seed=2), random(30, 3, 4, seed=3)
    damping = 1e9
    part = (
        eigen_inverse("w", eigen(left, right), damping)
        if style == "eigen"
        else pi_inverse("w", left, right, damping)
    )[0]
    scores, dots = (pool * part.apply(target)).sum((1, 2)), (pool * target).sum((1, 2))
    assert torch.equal(scores.argsort(), dots.argsort())
    mean = float(torch.outer(*(eigenbasis(f)[1] for f in (left, right))).mean())
    assert torch.allclose(scores * damping * mean, dots, rtol=1e-3, atol=1e-3)


def test_t25_without_damping_inputs_may_be_reparameterised() -> None:
    a, d, mix = random(40, 4), random(40, 3, seed=1), random(4, 4, seed=2)
    target, pool = random(3, 4, seed=3), random(10, 3, 4, seed=4)
    scores = []
    for m in (torch.eye(4, dtype=torch.float64), mix):  # inputs a M^T: gradients g M^T
        part, _ = eigen_inverse("w", eigen(gram(d), gram(a @ m.t())), 0.0)
        scores.append(((pool @ m.t()) * part.apply(target @ m.t())).sum((1, 2)))
    assert torch.allclose(scores[0], scores[1], rtol=1e-6)


def test_t26_self_influence_is_not_negative() -> None:
    left, right = gram(random(10, 3)), gram(random(10, 4, seed=1))
    grads = random(50, 3, 4, seed=2)
    for part in (
        eigen_inverse("w", eigen(left, right, grads), 0.1)[0],
        pi_inverse("w", left, right, 0.1)[0],
    ):
        assert bool(((grads * part.apply(grads)).sum((1, 2)) > 0).all())


# --- inverses


@pytest.mark.parametrize("absolute", [False, True])
def test_the_eigen_inverse_is_the_dense_inverse(absolute: bool) -> None:
    grads = random(30, 3, 5, seed=2)
    e = eigen(gram(random(30, 3)), gram(random(30, 5, seed=1)), grads)
    part, damped = eigen_inverse("w", e, 0.3, absolute=absolute)
    added = 0.3 if absolute else 0.3 * float(e.values.mean())
    expected = grads.flatten(1) @ torch.linalg.inv(
        dense(e) + added * torch.eye(15, dtype=torch.float64)
    )
    assert torch.allclose(part.apply(grads).flatten(1), expected, rtol=1e-9)
    assert damped.damping == pytest.approx(added)
    assert damped.ratio == pytest.approx(added / float(e.values.mean()))


def test_the_factored_inverse_is_the_dense_inverse_of_the_damped_product() -> None:
    left, right, grad = gram(random(30, 3)), gram(random(30, 5, seed=1)), random(3, 5, seed=2)
    part, damped = pi_inverse("w", left, right, 0.2)
    means = float(left.trace()) / 3, float(right.trace()) / 5
    pi, root = (means[0] / means[1]) ** 0.5, (0.2 * means[0] * means[1]) ** 0.5
    product = torch.kron(left + root * pi * torch.eye(3), right + root / pi * torch.eye(5))
    assert torch.allclose(
        part.apply(grad).flatten(), torch.linalg.solve(product, grad.flatten()), rtol=1e-9
    )
    assert damped.ratio == pytest.approx(0.2)


def test_an_inverse_is_a_transform_that_knows_its_parameters() -> None:
    part, damped = eigen_inverse("layer", eigen(torch.eye(2), torch.eye(3)), 1.0)
    inverse = Inverse({"layer": part}, [damped])
    assert isinstance(inverse, Transform)
    assert inverse.factors("layer") is None
    grad = random(4, 2, 3)
    assert torch.allclose(inverse.materialised("layer.weight", grad), grad / 2)
    assert inverse.apply_inverse("layer", grad.bfloat16()).dtype == torch.float32
    inverse.check({"layer": (2, 3)})
    with pytest.raises(MismatchError, match="other has no curvature"):
        inverse.check({"other": (2, 3)})
    with pytest.raises(MismatchError, match=r"shape \(3, 2\)"):
        inverse.apply_inverse("layer", grad.transpose(1, 2))


def test_what_cannot_be_inverted_says_so() -> None:
    singular, zero = torch.diag(torch.tensor([1.0, 0.0])), torch.zeros(2, 2)
    with pytest.raises(ConfigError, match="eigenvalues of zero"):
        eigen_inverse("w", eigen(singular, singular), 0.0)
    with pytest.raises(ConfigError, match="not invertible"):
        pi_inverse("w", singular, singular, 0.0)
    with pytest.raises(ConfigError, match="damping is -1"):
        eigen_inverse("w", eigen(singular, singular), -1.0)
    with pytest.raises(DataError, match="every gradient of the fit is zero"):
        eigen_inverse("w", eigen(zero, singular), 0.1)
    with pytest.raises(DataError, match="pi undefined"):
        pi_inverse("w", zero, singular, 0.1, absolute=True)
    with pytest.raises(DataError, match="not finite"):
        eigenbasis(torch.full((2, 2), torch.nan))
    part, damped = eigen_inverse("w", eigen(zero, singular), 2.0, absolute=True)
    assert torch.allclose(
        part.apply(torch.ones(2, 2, dtype=torch.float64)),
        torch.full((2, 2), 0.5, dtype=torch.float64),
    )
    assert damped.ratio == torch.inf


# --- fast sums and their plain twins


@pytest.mark.parametrize("width", [1, 100, 257, 600])
def test_gram_is_the_plain_product(width: int) -> None:
    x, more = random(70, width), random(30, width, seed=1)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_gram(total, x)
    add_gram(total, more)
    expected = x.t() @ x + more.t() @ more
    assert torch.allclose(symmetrise(total), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(total, total.t())


def test_gram_adds_up_in_the_type_of_the_sum() -> None:
    x = random(100, 8).float()
    total = torch.zeros(8, 8, dtype=torch.float64)
    add_gram(total, x)
    assert torch.allclose(total, x.double().t() @ x.double(), rtol=1e-14)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (600, 500)])
@pytest.mark.parametrize("sides", list(itertools.product([False, True], repeat=2)))
def test_second_moments_are_those_of_rotated_gradients(
    shape: tuple[int, int], sides: tuple[bool, bool]
) -> None:
    (r, c), lengths = shape, [6, 4, 1]
    left, right = random(3, 7, r).float(), random(3, 7, c, seed=1).float()
    for k, n in enumerate(lengths):
        left[k, n:] = 0  # padding: output gradients are zero there, inputs anything
    ul, ur = (torch.linalg.qr(random(d, d, seed=2)).Q.float() for d in (r, c))
    expected = (ul.t() @ (left.transpose(1, 2) @ right) @ ur).square().sum(0)
    for dtype in (torch.float32, torch.float64):
        values = torch.zeros(r, c, dtype=dtype)
        early = (left @ ul if sides[0] else left, right @ ur if sides[1] else right)
        add_second_moments(
            values, *early, lengths, (None if sides[0] else ul, None if sides[1] else ur)
        )
        assert torch.allclose(
            values.float(), expected, rtol=1e-4, atol=1e-4 * float(expected.max())
        )
