"""IFD: rows whose instruction helps the model little in writing the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from gradsift import rules
from gradsift.types import Signal, Signals, Subset

IFD = Signal("ifd")


@dataclass(frozen=True)
class Ifd:
    """The rows of highest instruction-following difficulty below 1: perplexity of the answer after
    its instruction, over that of the answer alone.

    Source: arXiv 2308.12032 and Superfiltering (arXiv 2402.00530): rows at 1 or more are discarded
    (the instruction does not help), of the rest the highest are kept. Cost: two forward passes over
    the pool's answers under the base model, one of them with the prompt. Where fewer rows than the
    budget lie below 1, the others follow from the lowest on (`fill=none`: fewer rows come back, and
    an error where there is none).

    Differences from the paper: there a model fine-tuned on a few of the rows scores
    (Superfiltering: GPT-2); here the base model does. The details of the papers are from memory.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    most: PositiveFloat = 1.0
    fill: Literal["rest", "none"] = "rest"

    def needs(self) -> frozenset[Signal]:
        return frozenset({IFD})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        value = finite(signals, IFD).double().numpy()
        fine = value < self.most
        if self.fill == "none" and not fine.any():
            raise ValueError(
                f"no row has a difficulty below {self.most:g} (the lowest is {value.min():.3g});"
                " fill=rest takes the lowest"
            )
        # Rows to be discarded rank after all others, the least bad first.
        rank = np.where(fine, value - value.min(), -1 - (value - value.min()))
        seats = budget if self.fill == "rest" else min(budget, int(fine.sum()))
        indices = rules.topk.top(rank, seats).numpy()
        notes: dict[str, Any] = {"score": value, "below_most": int(fine.sum())}
        if fine.sum() < seats:
            notes["note"] = (
                f"{int(fine.sum()):,} rows have a difficulty below {self.most:g}; the budget was"
                " filled with rows above"
            )
        return Subset(indices, gains=np.where(fine, value, -value)[indices], notes=notes)
