"""Learned difficulty: a linear net weighs the rows of every optimiser step while a model is
fine-tuned; hard rows get little weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsift.compute.cpu.matmul import quick_layers
from gradsift.model.losses import token_nats
from gradsift.rules.blocks import stream
from gradsift.types import IGNORE, Rows


def weights(scores: Tensor) -> Tensor:
    """rho [b] = b x softmax(scores [b]): they sum to b, equal scores give 1. Source: arXiv
    2402.12501, section 3.2.
    """
    return len(scores) * torch.softmax(scores, dim=0)


def weighted_loss(scores: Tensor, totals: Tensor, tokens: Tensor) -> Tensor:
    """Sum over rows of rho x summed loss [b], over the supervised tokens [b] of all: token-mean
    cross-entropy where scores are equal.
    """
    return (weights(scores) * totals).sum() / tokens.sum()


def train_score_net(
    model: Any,
    encoded: Sequence[Any],
    features: Tensor,
    steps: Sequence[Sequence[Sequence[int]]],
    *,
    lr: float,
    pad_id: int = 0,
    max_grad_norm: float = 1.0,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The score net w [d] after fine-tuning the trainable parameters of `model` (changed in place)
    together with it, from w = 0.

    encoded [r], features [r, d] unit rows. steps: for each optimiser step its micro-batches of
    positions; the softmax is over the whole step. AdamW without decay, learning rate falling
    linearly from `lr` to 0, for model and net alike. The net's gradient needs the rows' losses
    alone, so micro-batches leave it exact. `advance` is called with the tokens of each micro-batch.
    """
    net = torch.zeros(features.shape[1], requires_grad=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW([{"params": trained}, {"params": [net]}], lr=lr, weight_decay=0.0)
    training = model.training
    model.train()
    with quick_layers(model.modules()):
        for number, step in enumerate(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - number / len(steps))
            rows = [i for batch in step for i in batch]
            scores = features[rows].float() @ net
            fixed = weights(scores.detach())
            supervised = sum(
                sum(label != IGNORE for label in encoded[i]["labels"][1:]) for i in rows
            )
            totals, place = [], 0
            for batch in step:
                nats, owner = token_nats(model, [encoded[i] for i in batch], pad_id=pad_id)
                total = nats.new_zeros(len(batch)).index_add(0, owner, nats)
                (
                    (fixed[place : place + len(batch)].to(total.device) * total).sum() / supervised
                ).backward()
                totals.append(total.detach().cpu())
                place += len(batch)
                if advance:
                    advance(sum(len(encoded[i]["input_ids"]) for i in batch))
            weighted_loss(scores, torch.cat(totals), torch.tensor([supervised])).backward()
            torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    model.train(training)
    return net.detach()


def learned_difficulty(net: Tensor, features: Rows) -> Tensor:
    """d [n] = minus the score of each row, fp32; the net's raw output, no softmax."""
    return -torch.cat([block.float().cpu() @ net for _, _, block in stream(features)])
