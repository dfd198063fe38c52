"""DSIR: rows whose words are those of the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset

NGRAMS = Signal("ngrams")


@dataclass(frozen=True)
class Dsir:
    """Rows drawn by importance weight: how much likelier their hashed words and word pairs are in
    the target than in the pool.

    Source: DSIR (arXiv 2302.03169), section 3: bags of 10,000 hashed 1- and 2-grams, log weight =
    sum over the row's grams of log probability in the target less that in the pool, then Gumbel
    top-k, which is sampling without replacement by weight. Cost: one reading of the texts, no
    model. `draw=top`: the heaviest rows, without noise. `temperature` divides the log weights
    before the noise: above 1 nearer to uniform.

    Differences from the paper: the target's counts are joined by 1,000 grams spread as in the pool,
    so that a small target says little of words it does not hold; the text is that of all messages.
    The details of the paper are from memory. Differences from the released code: it leaves out rows
    of fewer than 100 words by default, here none is; its counts have no such prior (1e-8 is added
    to each); another hash puts grams into the buckets, so scores differ where grams collide.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    draw: Literal["gumbel", "top"] = "gumbel"
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[Signal]:
        return frozenset({NGRAMS})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        drawn = self.draw == "gumbel"
        weights = finite(signals, NGRAMS, below=drawn).double()
        indices = (
            rules.sample.gumbel_topk(weights / self.temperature, budget, rng=rng)
            if drawn
            else rules.topk.top(weights, budget)
        ).numpy()
        gain = weights.numpy()
        return Subset(indices, gains=gain[indices], notes={"score": gain})

    def why(self, facts: Facts) -> str:
        value = facts.value or 0.0
        side = "likelier" if value >= 0 else "less likely"
        drawn = "drawn by weight: " if self.draw == "gumbel" and facts.rank is not None else ""
        return (
            f"{drawn}its words are {figure(abs(value))} nats {side} in the target than in the pool"
        )
