"""Causal attention over short rows in bf16 on a CPU, by the model's type or by autocast, row by
row.

torch's kernel for a CPU is at its slowest there: its backward pass takes twice the time of the same
in fp32, and forms all t x t products of rows up to 512 tokens, masked or not. Here each row is
taken alone, so that what is in hand stays in the cache, by blocks of queries that see no key after
their last one; probabilities are kept, which for rows of at most four times the width of a head is
less than what the rest of a layer keeps. Products and softmax are fp32. Longer rows, other types,
masks and devices are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_WIDTHS = 4  # rows of at most so many times the width of a head
_BLOCK = 64  # queries, about


@contextmanager
def short_rows(wanted: bool) -> Iterator[None]:
    """While it is entered, and `wanted`, the function that transformers' models look up as torch's
    attention is `causal_attention` where that applies, and what it was elsewhere. The models'
    configs stay as they are: some architectures decide by them what to compute.
    """
    if not wanted:
        yield
        return
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_forward, usual)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not usual:  # somebody's own, not transformers'
            ALL_ATTENTION_FUNCTIONS["sdpa"] = usual


def is_helped(modules: Iterable[nn.Module]) -> bool:
    """Whether a model has layers in bf16 on a CPU, and is not compiled: it would be compiled
    again.
    """
    kinds = {(p.dtype, p.device.type) for m in modules for p in m.parameters(recurse=False)}
    return (torch.bfloat16, "cpu") in kinds and all(
        type(m).__name__ != "OptimizedModule" for m in modules
    )


def _is_mixed() -> bool:
    """Whether products on a CPU are in bf16 just now because autocast makes them so."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _forward(
    usual: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if _is_mixed() and query.device.type == "cpu":  # as autocast itself would
        query, key, value = (
            a.bfloat16() if a.dtype == torch.float32 else a for a in (query, key, value)
        )
    special = dropout or any(
        rest.get(name) is not None for name in ("position_bias", "cache", "softcap")
    )
    if attention_mask is not None or not causal or special or not _applies(query, key, value):
        return usual(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **rest,
        )
    with torch.autocast("cpu", enabled=False):
        out = causal_attention(
            query, key, value, 1 / sqrt(query.shape[-1]) if scaling is None else scaling
        )
    return out.transpose(1, 2).contiguous(), None


def _applies(query: Tensor, key: Tensor, value: Tensor) -> bool:
    (b, h, t, d), (groups, keys) = query.shape, key.shape[1:3]
    of_a_kind = query.dtype == key.dtype == value.dtype == torch.bfloat16
    return (
        query.device.type == "cpu"
        and keys == t <= _WIDTHS * d
        and h % groups == 0
        and value.shape[:3] == (b, groups, t)
        and of_a_kind
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v under the causal mask for query [b, h, t, d], key [b, g, t, d], value
    [b, g, t, e] with g a divisor of h: the same as torch's to rounding, in their dtype; [b, h, t,
    e], where the rows of all heads of a token lie side by side.
    """
    return _Causal.apply(query, key, value, scale)  # type: ignore[return-value]


def _blocks(t: int) -> list[tuple[int, int]]:
    count = max(1, round(t / _BLOCK))
    return [(t * k // count, t * (k + 1) // count) for k in range(count)]


def _grouped(a: Tensor, groups: int) -> Tensor:
    """[h, q, d] -> [g, h / g * q, d]: the heads that read the same keys one below the other."""
    return a if len(a) == groups else a.reshape(groups, -1, a.shape[2])


def _beside(b: int, h: int, t: int, d: int, like: Tensor) -> Tensor:
    """[b, h, t, d] where the heads of a token lie side by side, as layers write and read them."""
    return like.new_empty(b, t, h, d).transpose(1, 2)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (b, h, t, _), groups = query.shape, key.shape[1]
        out, kept, blocks = _beside(b, h, t, value.shape[3], query), [], _blocks(t)
        later = [torch.full((e - s, e - s), -torch.inf).triu_(1) for s, e in blocks]
        for row, q, k, v in _rows(out, query, key, value):
            for (s, e), mask in zip(blocks, later, strict=True):
                scores = torch.bmm(_grouped(q[:, s:e], groups) * scale, k[:, :e].transpose(1, 2))
                scores.view(h, e - s, e)[:, :, s:] += mask
                chances = scores.softmax(-1)
                row[:, s:e] = torch.bmm(chances, v[:, :e]).view(h, e - s, -1)
                kept.append(chances)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        (b, h, t, d), groups, scale, blocks = (
            query.shape,
            key.shape[1],
            ctx.scale,
            _blocks(query.shape[2]),
        )
        made = [_beside(b, a.shape[1], t, a.shape[3], a) for a in (query, key, value)]
        chances = iter(kept)
        for grad, q, k, v, to_q, to_k, to_v in _rows(grads[0], query, key, value, *made):
            all_k, all_v = torch.zeros(groups, t, d), torch.zeros(groups, t, value.shape[3])
            for s, e in blocks:
                p, g = next(chances), _grouped(grad[:, s:e], groups)
                all_v[:, :e] += torch.bmm(p.transpose(1, 2), g)
                inner = torch.ops.aten._softmax_backward_data(
                    torch.bmm(g, v[:, :e].transpose(1, 2)), p, -1, p.dtype
                ).mul_(scale)
                to_q[:, s:e] = torch.bmm(inner, k[:, :e]).view(h, e - s, d)
                all_k[:, :e] += torch.bmm(inner.transpose(1, 2), _grouped(q[:, s:e], groups))
            to_k.copy_(all_k)
            to_v.copy_(all_v)
        return made[0], made[1], made[2], None


def _rows(
    first: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Row by row; what is read is fp32."""
    for n, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        one = first[n] if not rest else first[n].float()
        yield (one, q.float(), k.float(), v.float(), *(a[n] for a in rest))
