"""Instruction-following difficulty: the answer's loss after its instruction, against its loss
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsift.compute.memory import Halving
from gradsift.model.losses import row_losses
from gradsift.types import IGNORE


def alone(row: Any, begin: int | None = None) -> dict[str, list[int]]:
    """A row's supervised tokens with nothing before them but `begin`, the token that begins a text;
    where there is none, the first of them is read and not scored.
    """
    answer = [
        token
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != IGNORE
    ]
    if begin is None:
        return {"input_ids": answer, "labels": answer}
    return {"input_ids": [begin, *answer], "labels": [IGNORE, *answer]}


def answer_losses(
    model: Any,
    encoded: Sequence[Any],
    *,
    begin: int | None = None,
    token_budget: int = 4096,
    pad_id: int = 0,
    advance: Callable[[int], None] | None = None,
    halving: Halving | None = None,
) -> Tensor:
    """Mean loss of every answer after its prompt, and alone: nats a token, fp64 [n, 2].

    Several answers in a row count as one text; the end of a turn is part of the answer. NaN where
    no token is scored (alone and without `begin`, answers of one token too) or a row does not fit
    in memory.

    Source: arXiv 2308.12032, equations 3 to 5.

    Args:
        model: a causal language model.
        encoded: rows with input_ids and labels.
        begin: the token that the tokenizer puts before a text (BOS); None = it puts none.
        token_budget, pad_id, advance, halving: as `row_losses`.
    """
    halving = halving or Halving()
    columns = [
        row_losses(
            model,
            rows,
            token_budget=token_budget,
            pad_id=pad_id,
            advance=advance,
            halving=halving,
        ).mean
        for rows in (encoded, [alone(row, begin) for row in encoded])
    ]
    return torch.stack(columns, dim=1)
