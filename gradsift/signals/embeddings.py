"""Embeddings: the hidden states that enter the output head, pooled over the whole templated row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.compute.batches import pad_batch, token_batches
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.memory import Halving

POOLING = "position-weighted mean of the last hidden states"
TOKEN_BUDGET = 4096  # padded tokens of a forward pass


def hidden_size(model: Any) -> int:
    """How many numbers an embedding of this model has: the inputs of its output head."""
    return int(model.get_output_embeddings().weight.shape[1])


@torch.no_grad()
def embed(
    model: Any,
    encoded: Sequence[Any],
    *,
    token_budget: int = TOKEN_BUDGET,
    pad_id: int = 0,
    advance: Callable[[int], None] | None = None,
    halving: Halving | None = None,
) -> Tensor:
    """Embeddings fp32 [n, hidden] on the CPU, not normalised, in the order given; the model runs in
    eval mode, its mode is restored.

    Row i is sum_t t h_t / sum_t t over all its tokens, prompt and answer, t = 1 for the first; h_t
    is what enters the output head (after the last norm), pooled in fp32. Source: RDS+ (arXiv
    2503.01807). The head itself runs on one position per row, and its result is not used.
    Independent of batch composition and padding up to float rounding. `advance` is called with the
    tokens of each batch. A row that does not fit in memory is NaN; `halving` learns which.
    """
    device = next(model.parameters()).device
    found = torch.empty(len(encoded), hidden_size(model))
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:])

    def work(batch: np.ndarray) -> Tensor:
        ids, attention, _ = pad_batch([encoded[int(i)] for i in batch], pad_id)
        ids, attention = ids.to(device), attention.to(device)
        seen.clear()  # of a batch that memory ran out for
        model(input_ids=ids, attention_mask=attention, use_cache=False)
        weights = (attention.cumsum(dim=1) * attention).float()
        states = seen.pop().float().to(device)  # from the last of the devices that a model spans
        # Zero weights alone would let a non-finite padding state through.
        states = states.masked_fill(attention[:, :, None] == 0, 0)
        return torch.einsum("bt,bth->bh", weights / weights.sum(dim=1, keepdim=True), states).cpu()

    lengths = np.array([len(row["input_ids"]) for row in encoded], np.int64)
    training = model.training
    model.eval()
    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with quick_layers(model.modules()):
            for batch, pooled, _ in (halving or Halving()).run(
                token_batches(lengths, token_budget), lengths, work
            ):
                found[torch.as_tensor(batch)] = torch.nan if pooled is None else pooled
                if advance:
                    advance(int(lengths[batch].sum()))
    finally:
        hook.remove()
        model.train(training)
    return found
