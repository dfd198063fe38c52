"""Loss per row: one forward pass, the output head on supervised positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsift.encode import pad_batch, token_batches


class RowLosses(NamedTuple):
    """`total` fp64 [n]: summed negative log-likelihood of the supervised tokens, nats; `tokens` int64 [n]: how many they are."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """fp64 [n], nats per supervised token; NaN where a row has none."""
        return self.total / self.tokens


@torch.no_grad()
def row_losses(
    model: Any, encoded: Sequence[Any], *, token_budget: int = 4096, pad_id: int = 0, advance: Callable[[int], None] | None = None
) -> RowLosses:
    """Losses of `encoded` under `model` in eval mode, in the order given; independent of batch composition up to float rounding.

    `advance` is called with the tokens of each finished batch. The model's mode is what it was afterwards.
    """
    total, count = torch.zeros(len(encoded), dtype=torch.float64), torch.zeros(len(encoded), dtype=torch.int64)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    kept: dict[str, Tensor] = {}
    # Gathering inside the head's own call works for every architecture, whatever it does to the logits afterwards.
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0][kept["mask"].to(args[0].device)].unsqueeze(0), *args[1:])
    )
    try:
        for batch in token_batches([len(row["input_ids"]) for row in encoded], token_budget):
            ids, attention, labels = pad_batch([encoded[int(i)] for i in batch], pad_id)
            ids, attention, labels = ids.to(device), attention.to(device), labels.to(device)
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            kept["mask"] = following != -100
            where = torch.as_tensor(batch)
            count[where] = kept["mask"].sum(dim=1).cpu()
            if kept["mask"].any():
                logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[0].float()
                nats = torch.nn.functional.cross_entropy(logits, following[kept["mask"]].to(logits.device), reduction="none").double().cpu()
                owner = kept["mask"].cpu().nonzero()[:, 0]
                total[where] = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, owner, nats)
            if advance:
                advance(int(attention.sum()))
    finally:
        hook.remove()
        model.train(training)
    return RowLosses(total, count)
