"""Per-example gradients by hooks in one batched backward pass, projected as they appear.

What makes it cheaper than the training step whose gradients it reads:
- Everything is frozen, so no weight gradient of a batch is formed. The graph starts at the lowest tracked module and the backward pass
  ends there.
- A tap on each tracked module sees its input and its output gradient; the per-example gradient is transformed, projected and dropped
  inside the backward pass, so a batch holds the gradients of one module at a time.
- The head runs only on positions whose next token is supervised, and the cross-entropy turns its logits into their own gradient in place.
- Rows are cut after their last supervised token (under causal attention nothing later reaches the loss), sorted by length and padded on
  the right in batches of a token budget. Causal attention never looks right, so padding needs no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.compute.batches import count_tokens, plan_batches
from gradsift.compute.memory import Halving
from gradsift.errors import ConfigError, UnknownName
from gradsift.gradients.capture import Capture, Norms, Row
from gradsift.gradients.objectives import OBJECTIVES, Loss
from gradsift.gradients.projection import Projection
from gradsift.types import Encoded, Transform

Modules = Literal["linear"] | Sequence[str] | None


@dataclass(frozen=True)
class GradientBatch:
    """Some rows, in any order: `indices` [b] are their positions in `encoded`.

    rows [b, d] fp32, not normalised: projection(transform(gradient)). norms [b]: L2 norm of the gradient before transform and
    projection, over all tracked modules. losses [b]: mean negative log-likelihood per supervised token, nats. tokens [b] int32:
    supervised tokens (the first token of a row is never predicted, so never counts). All on the CPU.
    A row without supervised tokens is all zeros, tokens 0 included. A row that does not fit in memory alone is NaN (rows, norms,
    losses) and listed in `failed`. `halvings`: how often this batch had to be split for memory; above 0 the numbers are right but not
    bit-reproducible.
    """

    indices: np.ndarray
    rows: Tensor
    norms: Tensor
    losses: Tensor
    tokens: Tensor
    halvings: int = 0
    failed: tuple[int, ...] = ()


def extract(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    projection: Projection,
    transform: Transform | None = None,
    modules: Modules = None,
    token_budget: int = 1024,
    loss: Loss = "cross-entropy",
    norms: Norms = "exact",
    halving: Halving | None = None,
) -> Iterator[GradientBatch]:
    """Yields the projected gradient of every row of `encoded`, each row once, shortest batches last.

    The loss of a row is the mean over its supervised tokens (labels other than -100, each predicted from the tokens before it).
    loss="margin" differentiates minus the mean log-odds of these tokens instead (see `gradsift.gradients.objectives`); `losses` stay what they are.
    `modules`: None for the trainable LoRA layers, "linear" for all linear layers of the blocks, or names and globs; the gradient is of
    their weights, not their biases. `token_budget`: padded tokens per forward pass; a longer row goes alone. When a pass runs out of
    memory the batch is halved, and what follows keeps to the size that fits; a single row that never fits becomes NaN (see
    GradientBatch) and a warning in the log.
    norms="sketched": where a two-sided projection leaves a gradient unformed, its squared norm is that of its projection without the
    transform: right on average over maps, zero and non-finite when the gradient is. Exact norms of full linear layers are about a seventh of
    the work on a CPU; they are free wherever gradients are formed, and exact there in either case.
    `halving` counts the halved batches and keeps the size that fits from one call to the next.

    The model runs in evaluation mode (no dropout) in its own dtype, with products of bf16 gradients accumulated in fp32. Whenever a
    batch is handed out, and after an exception or an early close, hooks, requires_grad flags and training mode are what they were;
    gradients (`.grad`) are never touched. Gradient checkpointing, where it is enabled, is honoured.

    Raises ConfigError or UnknownName when there is nothing to track, MismatchError when the transform does not know a parameter,
    DataError for a malformed row. All but the last before the first batch.
    """
    if token_budget < 1:
        raise ConfigError(f"token_budget is {token_budget}", remedy="Pass a positive number of tokens.")
    if loss not in OBJECTIVES:
        raise UnknownName("loss", loss, OBJECTIVES)
    if norms not in get_args(Norms):
        raise UnknownName("norms", norms, get_args(Norms))
    engine = Capture(model, projection, transform, modules, loss, norms)
    return _stream(engine, encoded, token_budget, halving or Halving())


def output_dim(model: nn.Module, projection: Projection, modules: Modules = None) -> int:
    """The width d of the rows that `extract` makes."""
    return Capture(model, projection, None, modules).bound.width


def _stream(engine: Capture, encoded: Sequence[Encoded], token_budget: int, halving: Halving) -> Iterator[GradientBatch]:
    lengths, supervised = count_tokens(encoded)
    silent = np.flatnonzero(supervised == 0)
    if len(silent):
        zeros = torch.zeros(len(silent))
        yield GradientBatch(silent, torch.zeros(len(silent), engine.bound.width), zeros, zeros.clone(), zeros.int())

    def work(batch: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        return engine.run([_cut(encoded[int(i)], int(lengths[i])) for i in batch])

    for batch, made, halvings in halving.run(plan_batches(lengths, token_budget), lengths, work):
        tokens, failed = torch.from_numpy(supervised[batch]), ()
        if made is None:
            nan = torch.full((1,), torch.nan)
            made, failed = (torch.full((1, engine.bound.width), torch.nan), nan, nan.clone()), (int(batch[0]),)
        yield GradientBatch(batch, *made, tokens, halvings, failed)


def _cut(row: Encoded, length: int) -> Row:
    """(input ids, the label that each position predicts), both [length]."""
    return np.asarray(row["input_ids"][:length]), np.asarray(row["labels"][1 : length + 1])
