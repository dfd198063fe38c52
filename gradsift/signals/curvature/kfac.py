"""K-FAC and EK-FAC: Kronecker-factored curvature of linear layers, and its damped inverse.

A parameter is a matrix of r rows and c columns in its own layout (nn.Linear: outputs x inputs;
transformers' Conv1D: inputs x outputs). Its gradient for one example is sum_t left_t right_t^T, and
its curvature, for gradients flattened row by row, is approximated by left (x) right: a Kronecker
product of an r x r and a c x c matrix. For nn.Linear left is G = E[delta delta^T] of output
gradients and right is A = E[a a^T] of inputs, so this is the A (x) G of the literature, which
stacks columns. Biases are left out, as everywhere in gradient rows.

K-FAC: Martens & Grosse (arXiv 1503.05671). EK-FAC, the diagonal re-estimated in the Kronecker
eigenbasis: George et al. (arXiv 1806.03884), for influence on language models Grosse et al. (arXiv
2308.03296, section 3.1 and appendix).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from gradsift.compute.cpu import matmul
from gradsift.errors import ConfigError, DataError, MismatchError

HEURISTIC_SCALE = 0.1  # of the mean eigenvalue: the damping of Grosse et al.
_CHUNK = {"cpu": 1 << 18}  # gradient numbers held at once; on a CPU what a core's cache takes
_GPU_CHUNK = 1 << 27


# --- what a fit adds up


def add_gram(total: Tensor, x: Tensor) -> None:
    """total [i, i] += x^T x for x [n, i], in the dtype of `total`. Only the upper block triangle is
    multiplied out; `symmetrise` copies it down.
    """
    x = x.to(total.dtype)
    for a, b in _blocks(total.shape[0]):
        matmul.add_matmul(total[a:b, a:], x[:, a:b].t(), x[:, a:])


def symmetrise(total: Tensor) -> Tensor:
    """The whole matrix of one that `add_gram` filled, exactly symmetric, in place."""
    upper = total.triu(1)
    return total.triu_().add_(upper.t())


def _blocks(n: int) -> list[tuple[int, int]]:
    """Row blocks of a symmetric product: large enough for a fast matrix product, several of them so
    that the lower triangle is skipped.
    """
    count = max(1, min(4, n // 128))
    edges = [n * k // count for k in range(count + 1)]
    return list(itertools.pairwise(edges))


def add_second_moments(
    values: Tensor,
    left: Tensor,
    right: Tensor,
    lengths: Sequence[int],
    basis: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """values [r, c] += sum over examples of (U_l^T g U_r)^2, element by element, g = sum_t left[b,
    t, :, None] right[b, t, None, :].

    left [b, t, r], right [b, t, c]; `basis` (U_l, U_r), None for a side that is rotated already:
    U_l^T left_t costs t r^2 products, U_l^T g r^2 c, so the caller knows best. `lengths` [b]:
    tokens of each example, what follows is padding. Longest first costs least.
    """
    b, (r, c) = len(left), values.shape
    step = max(1, _CHUNK.get(left.device.type, _GPU_CHUNK) // (r * c))
    for start in range(0, b, step):
        rows = slice(start, min(start + step, b))
        t, k = max(lengths[rows]), rows.stop - rows.start
        grad = matmul.bmm(left[rows, :t].transpose(1, 2), right[rows, :t])
        if basis[1] is not None:
            grad = matmul.matmul(grad.view(k * r, c), basis[1]).view(k, r, c)
        if basis[0] is not None:
            grad = (
                matmul.matmul(basis[0].t(), grad.transpose(0, 1).reshape(r, k * c))
                .view(r, k, c)
                .transpose(0, 1)
            )
        if k == 1 and values.dtype == grad.dtype:
            values.addcmul_(grad[0], grad[0])
        else:
            values += grad.square().sum(0, dtype=values.dtype)


# --- the eigenbasis and the inverse


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors [d, d] as columns, values [d] ascending) of a symmetric positive semi-definite
    matrix, in fp64 whatever it came in.

    Values below zero, which rounding makes, become zero. Raises DataError for numbers that are not
    finite.
    """
    if not bool(torch.isfinite(factor).all()):
        raise DataError(
            "a curvature factor holds numbers that are not finite",
            remedy="Look for rows whose loss is not finite.",
        )
    values, vectors = torch.linalg.eigh(factor.double())
    return vectors, values.clamp_min_(0)


@dataclass(frozen=True)
class Eigen:
    """One parameter's curvature in the basis left (x) right: `values` [r, c], corrected or products
    of eigenvalues; left [r, r], right [c, c].
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def apply(self, grad: Tensor) -> Tensor:
        """U_l ((U_l^T grad U_r) * values) U_r^T for grad [..., r, c]: `values` are those to
        multiply by, so the inverses of an inverse.
        """
        rotated = _between(self.left.t(), grad, self.right) * self.values
        return _between(self.left, rotated, self.right.t())


def _between(left: Tensor, grad: Tensor, right: Tensor) -> Tensor:
    """left @ grad @ right for grad [..., r, c]."""
    return (
        matmul.matmul(matmul.matmul(left, grad), right) if grad.dim() == 2 else left @ grad @ right
    )


@dataclass(frozen=True)
class Factored:
    """left [r, r] and right [c, c], to be multiplied on either side."""

    left: Tensor
    right: Tensor

    def apply(self, grad: Tensor) -> Tensor:
        return _between(self.left, grad, self.right)


@dataclass(frozen=True)
class Damped:
    """What damping did to one parameter: `ratio` = damping / mean_eigenvalue. Far above 1 the
    inverse is almost a multiple of the identity and the score almost a plain dot product. Factored
    damping adds sqrt(ratio) of each factor's mean eigenvalue to that factor.
    """

    name: str
    shape: tuple[int, int]
    mean_eigenvalue: float
    damping: float
    ratio: float


class Inverse:
    """A damped inverse curvature, one block per parameter. `damped` says what the damping was. A
    Transform: `materialised` is `apply_inverse`.
    """

    def __init__(self, parts: Mapping[str, Eigen | Factored], damped: Sequence[Damped]) -> None:
        self._parts = dict(parts)
        self.damped = tuple(damped)
        self.shapes = {d.name: d.shape for d in damped}

    def apply_inverse(self, name: str, grad: Tensor) -> Tensor:
        """grad [..., r, c] of parameter `name` (with or without ".weight") -> (H + damping)^-1
        grad, same shape and device, fp32 or fp64.

        Raises MismatchError for a parameter that was not fitted, or of another shape.
        """
        name = name.removesuffix(".weight")
        self.check({name: tuple(grad.shape[-2:])})
        part = self._parts[name]
        wide = grad if grad.dtype == torch.float64 else grad.float()
        if part.left.device != wide.device or part.left.dtype != wide.dtype:
            part = type(part)(
                **{key: value.to(wide.device, wide.dtype) for key, value in vars(part).items()}
            )
            if wide.dtype == torch.float32:
                self._parts[name] = part
        return part.apply(wide)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises MismatchError unless each of these parameters was fitted, at this shape."""
        for name, shape in shapes.items():
            fitted = self.shapes.get(name.removesuffix(".weight"))
            if fitted != tuple(shape):
                what = (
                    "has no curvature"
                    if fitted is None
                    else f"has shape {tuple(shape)}, its curvature was fitted for {fitted}"
                )
                raise MismatchError(
                    f"parameter {name} {what}",
                    remedy="Fit the curvature on the same model and modules.",
                )

    def materialised(self, name: str, grad: Tensor) -> Tensor:
        return self.apply_inverse(name, grad)

    def factors(self, name: str) -> None:
        return None


def eigen_inverse(
    name: str, curvature: Eigen, damping: float, *, absolute: bool = False
) -> tuple[Eigen, Damped]:
    """(H + lambda I)^-1 with lambda = damping x mean eigenvalue of this parameter, or `damping`
    itself when absolute.

    Raises ConfigError when that is not invertible: a negative damping, or none where an eigenvalue
    is zero; DataError when no row of the fit had a gradient here, which leaves nothing to be
    relative to.
    """
    mean = float(curvature.values.double().mean())
    added = _damping(name, mean, damping, absolute)
    values = curvature.values.double() + added
    if not bool((values > 0).all()):
        raise ConfigError(
            f"the curvature of {name} has eigenvalues of zero", remedy="Pass a damping above 0."
        )
    part = Eigen(curvature.left, curvature.right, (1 / values).to(curvature.left.dtype))
    return part, Damped(
        name, (values.shape[0], values.shape[1]), mean, added, added / mean if mean else torch.inf
    )


def pi_inverse(
    name: str, left: Tensor, right: Tensor, damping: float, *, absolute: bool = False
) -> tuple[Factored, Damped]:
    """(left + sqrt(lambda) pi' I)^-1 and (right + sqrt(lambda) / pi' I)^-1 with pi' = sqrt((tr left
    / r) / (tr right / c)): the factored Tikhonov damping of Martens & Grosse (arXiv 1503.05671,
    section 6.3) that the released G-DIG code uses with lambda = 0.5, absolute.

    Not additive damping of the product: (left (x) right + lambda I)^-1 is `eigen_inverse`.
    Relative: lambda = damping x mean left x mean right eigenvalue. Errors as `eigen_inverse`.
    """
    means = [float(f.double().trace()) / len(f) for f in (left, right)]
    added = _damping(name, means[0] * means[1], damping, absolute)
    if not all(means):
        remedy = "Leave the module out, or use eigenvalue damping."
        raise DataError(
            f"{name}: every gradient of the fit is zero, and pi undefined", remedy=remedy
        )
    pi = sqrt(means[0] / means[1])
    parts = []
    for factor, extra in ((left, sqrt(added) * pi), (right, sqrt(added) / pi)):
        padded = factor.double()
        lower, failed = torch.linalg.cholesky_ex(
            padded + extra * torch.eye(len(factor), dtype=padded.dtype, device=factor.device)
        )
        if bool(failed):
            raise ConfigError(
                f"a curvature factor of {name} is not invertible", remedy="Pass a larger damping."
            )
        parts.append(torch.cholesky_inverse(lower).to(factor.dtype))
    mean = means[0] * means[1]
    return Factored(parts[0], parts[1]), Damped(
        name, (len(left), len(right)), mean, added, added / mean
    )


def _damping(name: str, mean: float, damping: float, absolute: bool) -> float:
    if not 0 <= damping < torch.inf:
        raise ConfigError(f"damping is {damping}", remedy="Pass a number of 0 or more.")
    if mean == 0 and not absolute:
        raise DataError(
            f"{name}: every gradient of the fit is zero, so damping has nothing to be relative to",
            remedy="Leave the module out, fit on a trained adapter, or pass absolute damping.",
        )
    return damping if absolute else damping * mean
