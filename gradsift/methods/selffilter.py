"""Self-Filter: rows that a small net, trained along with the model, learns to give little weight,
with a penalty on alike rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Selffilter:
    """Difficult rows, each pick lowering the difficulty of the rows most like it.

    Source: arXiv 2402.12501 (Findings of ACL 2024), section 3: a linear score net weighs the rows
    of a batch by softmax while the model is fine-tuned; difficulty = minus the score, since hard
    rows are given little weight; greedy choice, where the 10 nearest rows lose gamma x difficulty x
    cosine squared. Cost: embeddings of the pool, and one more short fine-tune like the warm-up.

    features: fields of the pool's own rows to learn from and to compare rows by, in place of
    embeddings, separated by commas: numbers (brought to one scale over the pool) or lists of
    numbers (at length 1), such as the scores and embeddings the paper learns from.

    Differences from the paper: text only, so features are the base model's embeddings where the
    paper has CLIP's of image and text; the net is trained during a short LoRA fine-tune on a share
    of the pool (the run's warm-up settings) and not during a full training; it starts from zero
    weights, not random ones. The net sees summed losses, so a long answer counts as difficult.
    Differences from the released code: the net's softmax is over an optimiser step, not over one
    device's part of it; a row of negative difficulty raises its neighbours, as there (`clamp=true`
    sets it to 0 instead).
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    neighbours: NonNegativeInt = 10
    gamma: NonNegativeFloat = 1.0
    clamp: bool = False
    features: str | None = None

    def __post_init__(self) -> None:
        if self.features is not None and not self.fields:
            raise ValueError("names no field")

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.features or "").split(",") if name.strip())

    @property
    def rows(self) -> Signal:
        return Signal("features", fields=self.fields) if self.fields else Signal("embeddings")

    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("difficulty", fields=self.fields), self.rows})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        difficulty = finite(signals, Signal("difficulty", fields=self.fields)).double()
        difficulty = difficulty.clamp(min=0) if self.clamp else difficulty
        found = rules.penalty.diverse(
            difficulty, signals[self.rows], budget, neighbours=self.neighbours, gamma=self.gamma
        )
        return Subset(
            found.indices.numpy(), gains=found.gains.numpy(), notes={"score": difficulty.numpy()}
        )

    def why(self, facts: Facts) -> str:
        score, gain = facts.score or 0.0, facts.gain
        said = f"the score net finds it hard: difficulty {figure(score)}"
        if score < 0:
            said = f"the score net finds it easy: difficulty {figure(score)}"
        if gain is None or figure(gain) == figure(score):
            return said
        return f"{said}, {figure(gain)} after the picks like it"
