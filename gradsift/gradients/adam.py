"""The direction Adam would take for one example, from the optimizer's moments: the pool side of
LESS (arXiv 2402.04333, section 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from gradsift.errors import ConfigError, MismatchError

_REMEDY = "Use the moments of the checkpoint that the model was loaded from."


class Adam:
    """Gradient -> virtual Adam update, element-wise, for each example alone. Implements the
    Transform protocol; never factors.

    m, v: first and second moments by parameter name, with or without ".weight", each of the
    parameter's shape. step: how many updates the moments have seen; the virtual update is number
    step + 1.

    form="released": m' / sqrt(v' + eps) with m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2,
    as the code published with LESS computes it (`obtain_gradients_with_adam`): eps inside the root,
    no bias correction. form="paper": (m' / (1 - b1^(step+1))) / (sqrt(v' / (1 - b2^(step+1))) +
    eps): the Adam update of Kingma & Ba (arXiv 1412.6980, algorithm 1), which LESS's definition of
    Gamma follows: bias correction, eps outside the root.

    betas=(0, b2): without momentum. m' is then the example's gradient, so that no part is shared by
    all examples of a checkpoint. Weight decay and the learning rate are left out: neither depends
    on the example. Raises MismatchError, naming the parameter, when m or v lacks it or has another
    shape; ConfigError when m is not finite or v is negative or not finite.
    """

    def __init__(
        self,
        m: Mapping[str, Tensor],
        v: Mapping[str, Tensor],
        step: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        form: Literal["released", "paper"] = "released",
    ) -> None:
        if form not in ("released", "paper"):
            raise ConfigError(f"Adam form is {form!r}", remedy="Known: released, paper.")
        if step < 0 or not all(0 <= b < 1 for b in betas) or eps < 0:
            raise ConfigError(
                f"Adam settings step={step}, betas={betas}, eps={eps}",
                remedy="step >= 0, betas in [0, 1), eps >= 0.",
            )
        self.step, self.betas, self.eps, self.form = step, betas, eps, form
        self._m = {n.removesuffix(".weight"): t for n, t in m.items()}
        self._v = {n.removesuffix(".weight"): t for n, t in v.items()}
        self._ready: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises MismatchError unless there are moments of this shape for each of these
        parameters.
        """
        for name, shape in shapes.items():
            for which, moments in (("first", self._m), ("second", self._v)):
                _moment(moments, which, name, shape)

    def materialised(self, name: str, grad: Tensor) -> Tensor:
        """grad [b, o, i] -> the update direction, same shape and device, fp32. `grad` is left as it
        is.
        """
        m, v = self._moments(name, grad)
        b1, b2 = self.betas
        if self.form == "released":
            first, second = m.add(grad, alpha=1 - b1), v.addcmul(grad, grad, value=1 - b2)
            return first.mul_(second.rsqrt_())
        c1, c2 = 1 - b1 ** (self.step + 1), 1 - b2 ** (self.step + 1)
        first, second = m.add(grad, alpha=(1 - b1) / c1), v.addcmul(grad, grad, value=(1 - b2) / c2)
        return first.div_(second.sqrt_().add_(self.eps))

    def factors(self, name: str) -> None:
        return None

    def _moments(self, name: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What does not depend on the example, fp32: (b1 m, b2 v + eps) in the released form, (b1 m
        / c1, b2 v / c2) in the paper's.
        """
        name = name.removesuffix(".weight")
        kept = self._ready.get((name, grad.device))
        if kept is None or kept[0].shape != grad.shape[1:]:
            self.check({name: tuple(grad.shape[1:])})
            if not bool(torch.isfinite(self._m[name]).all()):
                raise ConfigError(f"the first moment of {name} is not finite", remedy=_REMEDY)
            _check_second(name, self._v[name])
            m = self._m[name].to(grad.device, torch.float32) * self.betas[0]
            v = self._v[name].to(grad.device, torch.float32) * self.betas[1]
            if self.form == "released":
                v += self.eps
            else:
                m /= 1 - self.betas[0] ** (self.step + 1)
                v /= 1 - self.betas[1] ** (self.step + 1)
            kept = self._ready[name, grad.device] = (m, v)
        return kept


class FactoredAdam:
    """Gradient / sqrt(second moment), with the second moment kept as the product of its row and
    column sums. Implements Transform.

    v ~ (row sums) (column sums)^T / sum, the rank-1 form of Adafactor (Shazeer & Stern, arXiv
    1804.04235, algorithm 1), whose row and column sums are those of v. So the transform is a factor
    per output and one per input of a layer, and a two-sided projection takes it without forming a
    gradient: at no cost, where `Adam` of all linear layers costs more than the backward pass. What
    Adam adds besides, the first moment and the example's own square, has no such factors and is
    left out.

    v: second moments by parameter name, with or without ".weight", in the parameter's shape (o, i).
    step: how many updates they have seen; v / (1 - b2^step) is taken, as it stands for step 0.
    eps^2 is added to every entry before the sums, so that a dead row stays finite.

    `used`: parameter -> "factored" or "materialised", as the engine took it last. Both are the same
    numbers up to rounding; `str()` counts them. Raises MismatchError, naming the parameter, when v
    lacks it or has another shape; ConfigError for a v that is negative or not finite.
    """

    def __init__(
        self, v: Mapping[str, Tensor], step: int, *, beta: float = 0.999, eps: float = 1e-8
    ) -> None:
        if step < 0 or not 0 <= beta < 1 or eps <= 0:
            raise ConfigError(
                f"FactoredAdam settings step={step}, beta={beta}, eps={eps}",
                remedy="step >= 0, beta in [0, 1), eps > 0.",
            )
        self.step, self.beta, self.eps = step, beta, eps
        self.used: dict[str, Literal["factored", "materialised"]] = {}
        self._v = {n.removesuffix(".weight"): t for n, t in v.items()}
        self._ready: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises MismatchError unless there is a second moment of this shape for each of these
        parameters.
        """
        for name, shape in shapes.items():
            _moment(self._v, "second", name, shape)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(row [o], col [i]), fp32: the transform is grad * row[:, None] * col[None, :]. Noted in
        `used` as the factored path.
        """
        self.used[name] = "factored"
        return self._factors(name)

    def materialised(self, name: str, grad: Tensor) -> Tensor:
        """grad [b, o, i] -> the same shape and device, fp32. `grad` is left as it is. Noted in
        `used`.
        """
        self.check({name: tuple(grad.shape[1:])})
        self.used[name] = "materialised"
        row, col = (part.to(grad.device) for part in self._factors(name))
        return grad * row[:, None] * col

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        key = name.removesuffix(".weight")
        if key not in self._ready:
            if key not in self._v:
                raise MismatchError(f"no second moment for parameter {name}", remedy=_REMEDY)
            _check_second(name, self._v[key])
            v = self._v[key].double()
            v = v / (1 - self.beta**self.step if self.step else 1.0) + self.eps**2
            # half of it in each factor, so that neither leaves the range of fp32
            root = v.sum().sqrt()
            self._ready[key] = (
                (v.sum(1) / root).rsqrt().float(),
                (v.sum(0) / root).rsqrt().float(),
            )
        return self._ready[key]

    def __str__(self) -> str:
        count = Counter(self.used.values())
        return (
            f"FactoredAdam: {count['factored']} parameters factored, {count['materialised']}"
            " materialised"
        )


def _check_second(name: str, v: Tensor) -> None:
    """A mean of squares, or its root is no number and every row of the pool is lost."""
    if not bool(torch.isfinite(v).all()) or bool((v < 0).any()):
        raise ConfigError(f"the second moment of {name} is negative or not finite", remedy=_REMEDY)


def _moment(moments: Mapping[str, Tensor], which: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """The moment of a parameter. Raises MismatchError where there is none of that shape."""
    moment = moments.get(name.removesuffix(".weight"))
    if moment is None:
        raise MismatchError(f"no {which} moment for parameter {name}", remedy=_REMEDY)
    if tuple(moment.shape) != tuple(shape):
        what = (
            f"the {which} moment of {name} has shape {tuple(moment.shape)}, the parameter"
            f" {tuple(shape)}"
        )
        raise MismatchError(what, remedy=_REMEDY)
    return moment
