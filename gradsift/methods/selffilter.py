"""Self-Filter: rows that a small net, trained along with the model, learns to give little weight, with a penalty on alike rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from gradsift.rules import penalty
from gradsift.types import Signal, Signals, Subset

DIFFICULTY, EMBEDDINGS = Signal("difficulty"), Signal("embeddings")


@dataclass(frozen=True)
class Selffilter:
    """Difficult rows, each pick lowering the difficulty of the rows most like it.

    Source: arXiv 2402.12501 (Findings of ACL 2024), section 3: a linear score net weighs the rows of a batch by softmax while the model is
    fine-tuned; difficulty = minus the score, since hard rows are given little weight; greedy choice, where the 10 nearest rows lose
    gamma x difficulty x cosine squared. Cost: embeddings of the pool, and one more short fine-tune like the warm-up.

    Differences from the paper: text only, so features are the base model's embeddings where the paper has CLIP's of image and text; the net
    is trained during a short LoRA fine-tune on a share of the pool (the run's warm-up settings) and not during a full training; it starts
    from zero weights, not random ones.
    The net sees summed losses, so a long answer counts as difficult.
    Differences from the released code: the net's softmax is over an optimiser step, not over one device's part of it; a row of negative
    difficulty raises its neighbours, as there (`clamp=true` sets it to 0 instead).
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    neighbours: int = 10
    gamma: float = 1.0
    clamp: bool = False

    def needs(self) -> frozenset[Signal]:
        return frozenset({DIFFICULTY, EMBEDDINGS})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        difficulty = torch.as_tensor(signals[DIFFICULTY], dtype=torch.float64)
        difficulty = difficulty.clamp(min=0) if self.clamp else difficulty
        found = penalty.diverse(difficulty, signals[EMBEDDINGS], budget, neighbours=self.neighbours, gamma=self.gamma)
        return Subset(found.indices.numpy(), gains=found.gains.numpy(), notes={"score": difficulty.numpy()})
