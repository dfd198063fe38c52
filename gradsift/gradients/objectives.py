"""What is differentiated: the output gradients of a batch's logits, by hand, for the mean loss of
an answer or for its margin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["cross-entropy", "margin"]

_LOGIT_CHUNK = 1 << 18  # logits handled at once on a CPU: they stay in its cache


def cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [l], gradient [l, v] of their weighted sum) for logits [l, v], which
    `in_place` overwrites.

    Written by hand because autograd keeps three copies of the logits; here there is one, in chunks
    that stay in the cache of a CPU.
    """
    source = logits.detach()
    grad = source if in_place else torch.empty_like(source)
    nll = torch.empty(len(targets), device=logits.device)
    for part in _chunks(logits):
        chunk, target, weight = source[part].float(), targets[part, None], weights[part, None]
        shifted = chunk - chunk.amax(1, keepdim=True)
        own = shifted.gather(1, target)
        mass = shifted.exp_().sum(1, keepdim=True)
        nll[part] = (mass.log() - own)[:, 0]
        grad[part] = shifted.mul_(weight / mass).scatter_add_(1, target, -weight)
    return nll, grad


def margin(
    logits: Tensor, targets: Tensor, weights: Tensor, *, in_place: bool
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood [l], gradient [l, v] of the weighted sum of minus the margins) for
    logits [l, v], which `in_place` overwrites.

    The margin of a token is its log-odds, log p - log(1 - p) = its logit - logsumexp of all others:
    TRAK's output function (arXiv 2303.14186, section 3.3), which unlike the loss has a gradient
    where the model is sure. Minus, so that like a loss it is to be lowered.
    """
    source = logits.detach()
    grad = source if in_place else torch.empty_like(source)
    nll = torch.empty(len(targets), device=logits.device)
    for part in _chunks(logits):
        chunk, target, weight = source[part].float(), targets[part, None], weights[part, None]
        own = chunk.gather(1, target)
        # the largest of the others is then 0 below: no probability near 1 loses its rest
        others = chunk.scatter(1, target, -torch.inf)
        top = others.amax(1, keepdim=True)
        mass = others.sub_(top).exp_().sum(1, keepdim=True)
        nll[part] = torch.nn.functional.softplus(mass.log() + top - own)[:, 0]
        grad[part] = others.mul_(weight / mass).scatter_(1, target, -weight)
    return nll, grad


OBJECTIVES: dict[Loss, Callable[..., tuple[Tensor, Tensor]]] = {
    "cross-entropy": cross_entropy,
    "margin": margin,
}


def _chunks(logits: Tensor) -> list[slice]:
    step = (
        max(1, _LOGIT_CHUNK // logits.shape[1])
        if logits.device.type == "cpu"
        else max(1, len(logits))
    )
    return [slice(start, start + step) for start in range(0, len(logits), step)]
