"""A subset of the pool with what it came from: per-row columns, reasons, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradsift.commands.budget import Budget
from gradsift.commands.select.constraints import Screen
from gradsift.commands.select.mix import DRAWN
from gradsift.commands.select.null import Null
from gradsift.data.pool import Pool
from gradsift.data.records import Dropped
from gradsift.model.layers import thin_coverage
from gradsift.stages.evidence import Evidence
from gradsift.types import Facts, Selector, Subset, counted


@dataclass(frozen=True)
class Chosen:
    """A subset of the pool (indices and per-row notes over all n pool rows) with what it came from.
    `screen`: the rows it could choose; `evidence`: what the stages saw that it was made of.
    """

    pool: Pool
    target: Pool | None
    evidence: Evidence
    method: str
    selector: Selector
    subset: Subset
    asked: int
    seed: int
    screen: Screen
    budget: Budget
    null: Null | None = None

    @property
    def n(self) -> int:
        return len(self.pool)

    @cached_property
    def kept(self) -> np.ndarray:
        """Pool rows that could be chosen, in order."""
        return np.sort(np.concatenate([self.screen.candidates, self.screen.included]))

    def left_out(self) -> list[Dropped]:
        """The rows that were not to be chosen, as lines of dropped.jsonl."""
        pool = self.pool
        found = list(self.evidence.dropped)
        for row, (code, what) in sorted(self.screen.reasons.items()):
            file, _, line = pool.place(row).rpartition(":")
            found.append(
                Dropped(
                    file,
                    int(line),
                    pool.ids[row],
                    f"{code}: {what}",
                    "left out by a constraint of this selection",
                )
            )
        return found

    @cached_property
    def picked(self) -> np.ndarray:
        mask = np.zeros(self.n, dtype=bool)
        mask[self.subset.indices] = True
        return mask

    @cached_property
    def drawn(self) -> np.ndarray:
        """bool [n]: the picks that were drawn beside the method's own."""
        told = self.subset.notes.get(DRAWN)
        return np.zeros(self.n, dtype=bool) if told is None else np.asarray(told) == 1

    def picked_by(self, row: int) -> str | None:
        """How a pick came in: "score", "draw" or "included"; None for a row that is none."""
        if not self.picked[row]:
            return None
        return "included" if row in self.screen.included else "draw" if self.drawn[row] else "score"

    @cached_property
    def score(self) -> np.ndarray | None:
        """[n], what the method ranked rows by, where it says."""
        found = self.subset.notes.get("score")
        return None if found is None else np.asarray(found, dtype=np.float64)

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Pool row -> its place in pick order, from 0."""
        return {int(row): place for place, row in enumerate(self.subset.indices)}

    def facts(self, row: int) -> Facts:
        """What this selection knows of a pool row."""
        subset, place, evidence = self.subset, self.ranks.get(row), self.evidence

        def of_pick(values: np.ndarray | None) -> float | None:
            known = None if place is None or values is None else float(values[place])
            return known if known is not None and np.isfinite(known) else None

        score = None if self.score is None else float(self.score[row])
        return Facts(
            rank=None if place is None else place + 1,
            gain=of_pick(subset.gains),
            weight=of_pick(subset.weights),
            score=score if score is not None and np.isfinite(score) else None,
            tokens=int(evidence.supervised[row]),
            loss=None if evidence.losses is None else float(evidence.losses[row]),
            notes={name: self._note(value, row) for name, value in subset.notes.items()},
            target_rows=0 if self.target is None else len(self.target),
            tuned=evidence.tuned,
            checkpoints=len(evidence.checkpoints),
        )

    def _note(self, value: Any, row: int) -> Any:
        """A note of the method: at `row` where it has one value per pool row."""
        if isinstance(value, np.ndarray) and value.ndim == 1 and len(value) == self.n:
            return value[row].item() if isinstance(value[row], np.generic) else value[row]
        return value

    def why(self, row: int) -> str:
        """One line on a pool row: what the method saw in it, in its own words and units."""
        if row in self.screen.included:
            return "named in --include-ids"
        if self.drawn[row]:
            return "drawn at random (--mix)"
        facts, explain = self.facts(row), getattr(self.selector, "why", None)
        if explain is not None and (facts.rank is not None or facts.score is not None):
            return explain(facts)
        parts = [] if facts.score is None else [f"score {facts.score:.4g}"]
        if facts.group is not None:
            parts.append(f"nearest target group {facts.group}")
        return ", ".join(parts) or ("chosen" if facts.rank is not None else "not chosen")

    def columns(self) -> dict[str, Sequence[Any]]:
        """Columns of scores.parquet over all pool rows, besides rank, gain and weight; what is
        unknown is left out.
        """
        subset = self.subset
        found: dict[str, Any] = {"tokens": self.evidence.supervised}
        found["score"], found["influence"] = self.score, subset.notes.get("influence")
        found["cluster"] = subset.notes.get("cluster")
        found["norm"], found["loss"] = self.evidence.norms, self.evidence.losses
        found["picked_by"] = [self.picked_by(i) for i in range(self.n)]
        found["why"] = [self.why(i) if self.picked[i] else None for i in range(self.n)]
        return {name: column for name, column in found.items() if column is not None}

    def warnings(self) -> list[str]:
        found = []
        found += self.screen.warnings
        if len(self.subset) < self.asked:
            found.append(
                f"{counted(len(self.subset), 'row was', 'rows were')} chosen where {self.asked:,}"
                " were asked"
            )
        overlap = self.overlap()
        if overlap:
            found.append(
                f"{counted(overlap, 'target row stands', 'target rows stand')} in the pool word"
                " for word"
            )
        thin = thin_coverage(self.evidence.coverage) if self.evidence.coverage else None
        if thin is not None:
            found.append(f"The {thin}")
        if "note" in self.subset.notes:
            found.append(str(self.subset.notes["note"]))
        if self.null is not None and self.null.known and not self.null.above:
            found.append(self.null.text().removesuffix("."))
        return [*found, *self.evidence.warnings]

    def overlap(self) -> int:
        """Target rows whose messages are those of a pool row."""
        target = self.target
        if target is None:
            return 0
        wanted = {example.messages for example in target if example.messages}
        return len(wanted & {example.messages for example in self.pool}) if wanted else 0
