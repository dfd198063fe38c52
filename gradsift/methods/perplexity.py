"""Rows by the base model's loss on their answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset

LOSS = Signal("loss")


@dataclass(frozen=True)
class Perplexity:
    """The rows of lowest, middle or highest loss (mean nats per supervised token; perplexity is its
    exponential) under the base model.

    Source: the usual perplexity control; TAGCOS (arXiv 2407.15235, main table) takes it as a
    baseline. Cost: one forward pass over the pool. Differences from the paper: none stated there;
    `middle` takes the rows whose loss rank lies nearest the median, of two equally near the one of
    lower loss.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    band: Literal["low", "middle", "high"] = "middle"

    def needs(self) -> frozenset[Signal]:
        return frozenset({LOSS})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        loss = finite(signals, LOSS).double().numpy()
        if self.band == "middle":
            rank = np.empty(len(loss))
            rank[np.argsort(loss, kind="stable")] = np.arange(len(loss))
            # a quarter below the median: no two ranks are equally near
            gain = -np.abs(rank - (len(loss) - 1) / 2 + 0.25)
        else:
            gain = loss if self.band == "high" else -loss
        indices = rules.topk.top(gain, budget).numpy()
        return Subset(indices=indices, gains=gain[indices], notes={"score": gain})

    def why(self, facts: Facts) -> str:
        value = abs(facts.value or 0.0)
        if self.band != "middle":
            return f"the base model's loss on it is {figure(value)} nats per token"
        loss = "" if facts.loss is None else f" ({figure(facts.loss)} nats per token)"
        return f"its loss{loss} ranks {figure(value)} places from the middle of the pool's"
