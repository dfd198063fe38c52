"""RDS+: rows whose embedding is close to a target row's, the target rows taking turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset

POOL, TARGET = Signal("embeddings"), Signal("embeddings", side="target")


@dataclass(frozen=True)
class Rds:
    """Rows whose position-weighted hidden states are most like those of a target row, each target
    row picking in turn.

    Source: arXiv 2503.01807 (RDS+): weight of token t proportional to t, last hidden states of the
    base model over prompt and answer, unit norm, cosine. Cost: one forward pass over pool and
    target, then n x m x h multiply-adds (h = hidden size): no gradients, no warm-up.

    aggregate: "rows" = the target rows take turns; "groups" = a row's score for a group is that of
    the group's nearest row, and the groups take turns (the paper's setting for several tasks);
    "max" = the rows of highest score for any target row.

    taken: whose nearest row is taken already "lose"s the turn (in round r only the r-th nearest
    row counts), so that target rows that want the same rows get fewer of their own; or takes the
    "next" one, so that each gets as many. "next" is ours.

    Differences from the paper: none known. Differences from the released code: float32 pooling
    whatever the model's dtype; the last round ends where the budget is met, where the code
    completes it and drops rows of an unordered set.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    aggregate: Literal["rows", "groups", "max"] = "rows"
    taken: Literal["lose", "next"] = "lose"

    def needs(self) -> frozenset[Signal]:
        return frozenset({POOL, TARGET})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import nearest_by_turns, products, whole

        scores = products(signals[POOL], whole(signals[TARGET]))
        return nearest_by_turns(scores, signals.target_groups, budget, self.aggregate, self.taken)

    def why(self, facts: Facts) -> str:
        whose = f"a row of {facts.group}" if facts.group is not None else "a target row"
        return (
            f"its hidden states have a cosine of {figure(facts.value or 0.0)} with those of {whose}"
        )
