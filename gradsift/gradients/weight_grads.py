"""Per-example weight gradients sum_t g_t x_t^T of a linear layer and their norms, from its inputs x
[b, t, i] and output gradients g [b, t, o].

The squared norm of such a sum is that of the t x t products, sum_{s,t} (x_s . x_t)(g_s . g_t): for
short rows cheaper than forming it. Both are symmetric, so they are formed by blocks of rows up to
the diagonal, and what is left of the diagonal's block counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gradsift.compute.cpu import matmul

# rows of the t x t products formed at once; what lies above the diagonal's blocks is never formed
_BLOCK = 64


def product(x: Tensor, g: Tensor, transposed: bool = False) -> Tensor:
    """The gradients [b, o, i], or [b, i, o] when transposed, fp32."""
    left, right = (x.float(), g.float()) if transposed else (g.float(), x.float())
    if left.shape[2] > right.shape[2]:  # the narrow side first: four times faster for LoRA's
        return matmul.bmm(right.transpose(1, 2), left).transpose(1, 2)
    return matmul.bmm(left.transpose(1, 2), right)


def gram_is_cheaper(x: Tensor, g: Tensor, readers: int = 1) -> bool:
    """Whether the t x t products cost less than the gradient itself, where `readers` layers share
    those of x.
    """
    t, o, i = g.shape[1], g.shape[2], x.shape[2]
    return t * (o + i / readers) * 0.5 <= o * i


def doubled_gram(x: Tensor) -> list[Tensor]:
    """The blocks of x x^T, fp32, each entry that has a mirror image above the diagonal's blocks
    twice.
    """
    blocks = [block.float() for block in _gram(x)]
    for k, block in enumerate(blocks):
        block[:, :, : k * _BLOCK] *= 2
    return blocks


def squares(x: Tensor, g: Tensor, gram: list[Tensor] | None) -> Tensor:
    """Squared norms [b] of the gradients: from `gram`, the `doubled_gram` of x, or where that is
    None from the gradients.
    """
    if gram is None:
        return torch.linalg.vector_norm(product(x, g), dim=(1, 2)).square_()
    total = torch.zeros(len(g), device=g.device)
    for ours, theirs in zip(gram, _gram(g), strict=True):
        total += torch.linalg.vecdot(ours.flatten(1), theirs.float().flatten(1))
    return total.clamp_(min=0)


def _gram(a: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of a a^T for a [b, t, f], each up to the diagonal."""
    for start in range(0, a.shape[1], _BLOCK):
        end = min(start + _BLOCK, a.shape[1])
        yield torch.bmm(a[:, start:end], a[:, :end].transpose(1, 2))
