"""BM25: rows whose words are those of a target row, the target rows taking turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset

BM25 = Signal("bm25")


@dataclass(frozen=True)
class Bm25:
    """Rows whose words match a target row best, each target row (prompt and answer) picking in
    turn.

    Source: Robertson and Zaragoza 2009, k1 = 1.2, b = 0.75. A control without a model: what a
    search engine would pick. Cost: one reading of the texts, then one product for each word that a
    row shares with a target row; 4 n m bytes for n rows and m target rows.

    aggregate: "rows" = the target rows take turns, each with its best unused row; "groups" = a
    row's score for a group is that for the group's best matching row, and the groups take turns;
    "max" = the rows of highest score for any target row.

    taken: as in `rds`: whose best row is taken already takes the "next", or "lose"s the turn.

    Differences from the paper: none known; turns are ours, for it ranks documents for one query.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    aggregate: Literal["rows", "groups", "max"] = "rows"
    taken: Literal["lose", "next"] = "next"

    def needs(self) -> frozenset[Signal]:
        return frozenset({BM25})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite, nearest_by_turns

        return nearest_by_turns(
            finite(signals, BM25).float(), signals.target_groups, budget, self.aggregate, self.taken
        )

    def why(self, facts: Facts) -> str:
        whose = f"a row of {facts.group}" if facts.group is not None else "a target row"
        return f"its words match those of {whose} with a BM25 score of {figure(facts.value or 0.0)}"
