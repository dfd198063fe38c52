"""The feed-forward layer of the last block: after it nothing mixes positions, so it need only run
where a supervised token is predicted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradsift.model.layers import is_linear

# of the largest hidden value; 0.05 in 16 bit
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def find_tail(model: nn.Module) -> nn.Module | None:
    """The last child of the last block that is built of linear layers (two at least) and
    activations alone, if any.
    """
    stacks = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(block) for block in m}) == 1
    ]
    if not stacks:
        return None
    found = [child for child in max(stacks, key=_size)[-1].children() if _position_wise(child)]
    return found[-1] if found else None


def same_without(model: nn.Module, tail: nn.Module, head: nn.Module, ids: Tensor) -> bool:
    """True when the model's hidden states at the last positions of `ids` [1, t] do not change when
    `tail` sees those positions alone.

    The structure says they cannot; this catches the architecture whose structure says less than it
    does. One pass over a few tokens.
    """
    t = ids.shape[1]
    kept = torch.arange(t // 2, t, device=ids.device)
    seen: list[Tensor] = []
    shapes: list[bool] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        shapes.append(
            len(args) == 1 and isinstance(args[0], Tensor) and args[0].shape[:2] == ids.shape
        )
        return (args[0][:, kept],) if shapes[-1] else None

    def scatter(module: nn.Module, args: tuple[Any, ...], out: Any) -> Tensor | None:
        shapes.append(shapes[-1] and isinstance(out, Tensor) and out.shape[:2] == (1, len(kept)))
        return (
            torch.zeros(1, t, out.shape[-1], dtype=out.dtype, device=out.device).index_copy_(
                1, kept, out
            )
            if shapes[-1]
            else None
        )

    handles = [head.register_forward_pre_hook(note)]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
            handles += [tail.register_forward_pre_hook(gather), tail.register_forward_hook(scatter)]
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if (
        len(shapes) != 2
        or not all(shapes)
        or len(seen) != 2
        or seen[0].shape[:2] != ids.shape
        or seen[1].shape != seen[0].shape
    ):
        return False
    whole, part = (s[:, kept].float() for s in seen)
    return bool(
        (whole - part).abs().max() <= _TOLERANCE.get(seen[0].dtype, 0.05) * whole.abs().max()
    )


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _position_wise(module: nn.Module) -> bool:
    linear = activations = 0
    for child in module.modules():
        if is_linear(child):
            linear += 1
        elif type(child).__module__.startswith(
            ("torch.nn.modules.activation", "transformers.activations")
        ):
            activations += 1
        else:
            leaf = next(child.children(), None) is None
            known = isinstance(child, nn.ModuleDict | nn.ParameterDict | nn.Dropout | nn.Identity)
            if any(True for _ in child.parameters(recurse=False)) or (leaf and not known):
                return False
    return linear >= 2 and activations >= 1
