"""Uniform choice without replacement: the control every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift.types import Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Random:
    """Rows drawn uniformly without replacement.

    Source: none; the control. Cost: nothing. Differences from the paper: none.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"

    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        return Subset(indices=rng.permutation(signals.n)[:budget].astype(np.int64))

    def why(self, facts: Facts) -> str:
        return "drawn at random"
