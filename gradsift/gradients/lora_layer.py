"""A LoRA layer in one step: its base product, both adapter products and what is read from them.

peft computes base(x) + B(A(x)) * scaling with a pass over the activations for the scaling, one for
the sum, and as many on the way back, where the gradients of the two ways to x are added up as well.
Here the low-rank product goes on top of the base product inside the matrix products, forward and
backward; the scaling is applied to the few numbers between A and B. The same function up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from gradsift.compute.cpu import matmul

# (x, gradient of A's output, what B reads times the scaling, gradient of the layer's output)
Sink = Callable[[Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class LowRank:
    """A layer of peft whose two adapter matrices are tracked, by their names."""

    layer: LoraLinear
    a_name: str
    b_name: str
    base: nn.Linear
    a: nn.Linear
    b: nn.Linear
    scaling: float

    def takes(self, x: Any) -> bool:
        """Whether `run` may stand for the layer's own forward on x: plain tensors of one dtype,
        nobody else's hooks on what is passed over.
        """
        # with the hooks that are the engine's own
        parts = ((self.base, 0), (self.a, 1), (self.b, 1))
        return (
            type(x) is Tensor
            and x.dim() > 1
            and all(
                type(p.weight) is nn.Parameter
                and p.weight.dtype == x.dtype
                and p.weight.device == x.device
                for p, _ in parts
            )
            and not any(
                "forward" in p.__dict__
                or p._forward_pre_hooks
                or p._backward_hooks
                or p._backward_pre_hooks
                for p, _ in parts
            )
            and all(len(p._forward_hooks) == own for p, own in parts)
            and not torch.is_autocast_enabled(x.device.type)
        )

    def run(self, x: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        """The layer's output for x [..., i]; on the way back `sink` is called. `anchor` requires a
        gradient, so the output does too.
        """
        return _Step.apply(x, anchor, self, sink)  # type: ignore[return-value]


def low_rank_layers(model: nn.Module, tracked: Mapping[str, nn.Module]) -> list[LowRank]:
    """The LoRA layers that are just base(x) + B(A(x)) * scaling, with one adapter in force: no DoRA
    or other variant, no bias on B, not merged, a plain nn.Linear below.
    """
    found = []
    for name, layer in model.named_modules():
        if (
            type(layer) is not LoraLinear
            or layer.disable_adapters
            or layer.merged
            or type(layer.base_layer) is not nn.Linear
        ):
            continue
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if len(active) != 1 or active[0] in layer.lora_variant:
            continue
        names = [f"{name}.{part}.{active[0]}" for part in ("lora_A", "lora_B")]
        a, b = (tracked.get(n) for n in names)
        if type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None:
            found.append(
                LowRank(
                    layer,
                    names[0],
                    names[1],
                    layer.base_layer,
                    a,
                    b,
                    float(layer.scaling[active[0]]),
                )
            )
    return found


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, parts: LowRank, sink: Sink) -> Tensor:
        flat, base = x.flatten(0, -2), parts.base
        inner = matmul.linear(flat, parts.a.weight).mul_(parts.scaling)
        out = matmul.linear(x, base.weight, base.bias)
        # a view of `out`: what is returned may be changed in place
        out.view(-1, out.shape[-1]).addmm_(inner, parts.b.weight.t())
        ctx.save_for_backward(x, inner)
        ctx.parts, ctx.sink = parts, sink
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x, inner), parts, grad = ctx.saved_tensors, ctx.parts, grads[0]
        flat, to_x = grad.flatten(0, -2), None
        before = matmul.matmul(flat, parts.b.weight).mul_(parts.scaling)
        if ctx.needs_input_grad[0]:
            to_x = matmul.matmul(flat, parts.base.weight).addmm_(before, parts.a.weight).view_as(x)
        ctx.sink(x, before.view(*x.shape[:-1], -1), inner.view(*x.shape[:-1], -1), grad)
        return to_x, None, None, None
