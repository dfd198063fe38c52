"""Longest answers first: a control that many published selectors do not beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.methods.words import count
from gradsift.types import Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Length:
    """The rows with the most (or fewest) supervised tokens.

    Source: arXiv 2410.09335, where a plain length filter is a stable gain over random; arXiv
    2506.01317 reports the same of the longest responses. Cost: token counts only, which encoding
    gives. Differences from the paper: the count is of supervised tokens.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    order: Literal["longest", "shortest"] = "longest"

    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        if signals.tokens is None:
            raise ValueError(
                "length reads Signals.tokens, the supervised tokens of each row, and none were"
                " given"
            )
        gain = signals.tokens.astype(np.float64) * (1 if self.order == "longest" else -1)
        indices = rules.topk.top(gain, budget).numpy()
        return Subset(indices=indices, gains=gain[indices], notes={"score": gain})

    def why(self, facts: Facts) -> str:
        return f"its answer has {count(round(abs(facts.value or 0.0)), 'supervised token')}"
