"""Matrix products in fp32 on CPUs where torch's usual library runs at half their speed.

torch multiplies fp32 matrices with MKL, which gives processors other than Intel's its kernels for
AVX2. On an AMD processor with AVX-512, oneDNN, which torch carries as well and takes for bf16, does
the same products, in the same precision, twice as fast. Here they go to it there, and to torch's
usual library everywhere else. Which it is depends on the processor, as `machine.cpu_kind` says, and
on the size of the product: the last bits of a sum differ between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.compute.cpu.swap import swapped
from gradsift.compute.machine import prefers_onednn

# multiply-adds below which the detour, and a kernel compiled for a new shape, costs more than it
# saves
LEAST = 1 << 23


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] times weight [n, k], transposed, plus bias [n]: torch's own where a gradient is
    wanted, see `quick_layers`.
    """
    if not _applies(x, weight) or _wants_gradient(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    out = torch.ops.mkldnn._linear_pointwise(
        contiguous(x.flatten(0, -2)), contiguous(weight), bias, "none", [], ""
    )
    # no view, as what torch's own gives: it may be changed in place
    return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], len(weight)))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., k] times b [k, n]."""
    return linear(a, b.t())


def bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a [b, m, k] times b [b, k, n], matrix by matrix."""
    if not len(a) or not _applies(a[0], b[0].t()) or _wants_gradient(a, b):
        return torch.bmm(a, b, out=out)
    if len(a) == 1 and out is None:
        return matmul(a[0], b[0])[None]
    out = a.new_empty(len(a), a.shape[1], b.shape[2]) if out is None else out
    for to, left, right in zip(out, a, b, strict=True):
        to.copy_(matmul(left, right))
    return out


def add_matmul(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """total [m, n] += alpha a [m, k] b [k, n], all of one dtype."""
    if total.dtype == a.dtype and _applies(a, b.t()) and not _wants_gradient(total, a, b):
        total.add_(matmul(a, b), alpha=alpha)
    else:
        total.addmm_(a, b, alpha=alpha)


@contextmanager
def quick_layers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it is entered, plain nn.Linear layers among `modules` multiply with `linear`, forward
    and backward; nothing happens on a machine where that changes nothing. Backward passes belong
    inside: a checkpointed block runs again in them.
    """
    with swapped(layer_forwards(modules)):
        yield


def layer_forwards(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The layers that `quick_layers` means, each with what stands for its forward."""
    if not prefers_onednn():
        return []
    modules = list(modules)
    if any(type(m).__name__ == "OptimizedModule" for m in modules):
        # a compiled model would be compiled again
        return []
    layers = [
        m
        for m in modules
        if type(m) is nn.Linear and m.weight.device.type == "cpu" and "forward" not in m.__dict__
    ]
    return [(m, _forward(m, m.forward)) for m in layers]


def _forward(layer: nn.Linear, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if (
            args
            or kwargs
            or type(layer.weight) is not nn.Parameter
            or not _applies(x, layer.weight)
        ):
            return own(x, *args, **kwargs)
        return _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[return-value]

    return forward


def _applies(x: Any, weight: Tensor) -> bool:
    """Whether the product of x [..., k] and weight [n, k] is worth oneDNN's way."""
    return (
        prefers_onednn()
        and type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.dim() > 1
        and weight.dim() == 2
        and x.numel() * weight.shape[0] >= LEAST
        and not torch.is_autocast_enabled("cpu")
    )


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def contiguous(a: Tensor) -> Tensor:
    """A matrix that is contiguous, by rows or by columns: with part of a larger one oneDNN takes a
    thousand times as long.
    """
    if a.is_contiguous() or a.t().is_contiguous():
        return a
    return a.t().contiguous().t() if a.stride(0) == 1 else a.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grads[0]
        flat = grad.flatten(0, -2)
        to_x = matmul(grad, weight) if ctx.needs_input_grad[0] else None
        to_weight = matmul(flat.t(), x.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
