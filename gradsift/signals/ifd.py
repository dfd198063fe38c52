"""Instruction-following difficulty: the answer's loss after its instruction, against its loss
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gradsift.compute.memory import Halving
from gradsift.model.losses import row_losses
from gradsift.types import IGNORE

if TYPE_CHECKING:
    from torch import Tensor


def alone(row: Any) -> dict[str, list[int]]:
    """A row's supervised tokens with nothing before them but the row's first token (which begins a
    text under most tokenizers).
    """
    answer = [
        token
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if label != IGNORE
    ]
    return {"input_ids": [row["input_ids"][0], *answer], "labels": [IGNORE, *answer]}


def perplexity_ratio(
    model: Any,
    encoded: Sequence[Any],
    *,
    token_budget: int = 4096,
    pad_id: int = 0,
    advance: Callable[[int], None] | None = None,
    halving: Halving | None = None,
) -> Tensor:
    """exp(mean loss of the answer after its prompt - mean loss of the answer alone), fp64 [n];
    below 1 where the prompt helps.

    Source: arXiv 2308.12032, equation 3. Several answers in a row count as one text. NaN where
    nothing is supervised or a row does not fit in memory. Other arguments as `row_losses`.
    """
    halving = halving or Halving()
    given = row_losses(
        model, encoded, token_budget=token_budget, pad_id=pad_id, advance=advance, halving=halving
    )
    without = row_losses(
        model,
        [alone(row) for row in encoded],
        token_budget=token_budget,
        pad_id=pad_id,
        advance=advance,
        halving=halving,
    )
    return (given.mean - without.mean).exp()
