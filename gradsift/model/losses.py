"""Loss per row: one forward pass, the output head on supervised positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.compute.batches import pad_batch, token_batches
from gradsift.compute.cpu.matmul import quick_layers
from gradsift.compute.memory import Halving
from gradsift.types import IGNORE


class RowLosses(NamedTuple):
    """`total` fp64 [n]: summed negative log-likelihood of the supervised tokens, nats; `tokens`
    int64 [n]: how many they are. The total of a row that does not fit in memory is NaN.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """fp64 [n], nats per supervised token; NaN where a row has none."""
        return self.total / self.tokens


def token_nats(model: Any, rows: Sequence[Any], *, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """(nats fp32 [k] of the k supervised tokens of `rows`, row by row; owner int64 [k]: which row
    each belongs to), on the model's device.

    One pass over all rows together, in the mode that the model is in; the nats carry their graph
    where gradients are on. Causal attention never looks to the right, so the padding there needs no
    mask. A vocabulary is wide: the head runs where a supervised token is predicted, and gathering
    inside the head's own call works for every architecture, whatever it does to the logits
    afterwards.
    """
    device = next(model.parameters()).device
    ids, _, labels = (tensor.to(device) for tensor in pad_batch(rows, pad_id))
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    kept = following != IGNORE
    owner = kept.nonzero()[:, 0]
    if not len(owner):
        return torch.zeros(0, device=device), owner
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0][kept.to(args[0].device)].unsqueeze(0), *args[1:])
    )
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    return (
        torch.nn.functional.cross_entropy(
            logits, following[kept].to(logits.device), reduction="none"
        ).to(device),
        owner,
    )


@torch.no_grad()
def row_losses(
    model: Any,
    encoded: Sequence[Any],
    *,
    token_budget: int = 4096,
    pad_id: int = 0,
    advance: Callable[[int], None] | None = None,
    halving: Halving | None = None,
) -> RowLosses:
    """Losses of `encoded` under `model` in eval mode, in the order given; independent of batch
    composition up to float rounding.

    `advance` is called with the tokens of each finished batch. `halving` learns what memory had no
    room for. The model's modes are what they were afterwards.
    """
    total, count = (
        torch.zeros(len(encoded), dtype=torch.float64),
        torch.zeros(len(encoded), dtype=torch.int64),
    )
    lengths = np.array([len(row["input_ids"]) for row in encoded], np.int64)

    def work(batch: np.ndarray) -> list[Tensor]:
        return [
            tensor.cpu()
            for tensor in token_nats(model, [encoded[int(i)] for i in batch], pad_id=pad_id)
        ]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with quick_layers(model.modules()):
            for batch, found, _ in (halving or Halving()).run(
                token_batches(lengths, token_budget), lengths, work
            ):
                where = torch.as_tensor(batch)
                if found is None:
                    total[where], count[where] = (
                        torch.nan,
                        sum(label != IGNORE for label in encoded[int(batch[0])]["labels"][1:]),
                    )
                else:
                    nats, owner = found
                    count[where] = torch.bincount(owner, minlength=len(batch))
                    total[where] = torch.zeros(len(batch), dtype=torch.float64).index_add_(
                        0, owner, nats.double()
                    )
                if advance:
                    advance(int(lengths[batch].sum()))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return RowLosses(total, count)
