"""k-center: rows that leave no part of the pool far from a chosen one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.types import Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Kcenter:
    """Rows each as far as possible from all chosen before it: coverage of the pool, noise at its
    edges included.

    Source: Sener and Savarese 2018 (arXiv 1708.00489), algorithm 1 (k-Center-Greedy). Cost: one
    forward pass over the pool (embeddings); n x k x h multiply-adds at worst, h the hidden size.
    `signal=rows` measures between gradient rows of the last checkpoint instead.

    Differences from the paper: Euclidean distance of unit rows, so an angle; starts from one drawn
    row instead of a labelled set; no integer program over outliers.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    signal: Literal["embeddings", "rows"] = "embeddings"
    transform: Literal["adam", "none"] = "adam"

    def needs(self) -> frozenset[Signal]:
        return frozenset(
            {
                (
                    Signal("embeddings")
                    if self.signal == "embeddings"
                    else Signal("rows", transform=self.transform)
                )
            }
        )

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        (signal,) = self.needs()
        return Subset(
            indices=rules.kcenter.farthest_first(signals[signal], budget, rng=rng).numpy()
        )

    def why(self, facts: Facts) -> str:
        if facts.rank == 1:
            return "drawn at random, to start from"
        what = "embedding" if self.signal == "embeddings" else "gradient"
        return f"its {what} was the farthest from those of all rows picked before it"
