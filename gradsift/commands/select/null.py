"""A null target: the same method toward rows drawn from the pool, to tell whether its scores see
the target at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from gradsift.commands.select.choose import narrow
from gradsift.commands.select.constraints import Screen
from gradsift.errors import DataError
from gradsift.stages.pipeline import Pipeline
from gradsift.types import Selector, Signals, Subset

SEED = 20_260_218  # of the draws: the same rows for every method and seed of a selection
DRAWS = 5


def draws_for(selector: Selector) -> int:
    """How many null targets a method is asked about: five, or one where each costs a training and a
    pass over the pool.
    """
    return 1 if any(signal.name == "tuned" for signal in selector.needs()) else DRAWS


@dataclass(frozen=True)
class Null:
    """How the picks' scores toward the target stand to those toward rows drawn from the pool.

    Args:
        target: mean score of the picks toward the target, in the method's own unit.
        draws: the same toward each draw.
        rows: target rows of a draw.
    """

    target: float
    draws: tuple[float, ...]
    rows: int

    @property
    def above(self) -> bool:
        """Whether the target's picks score higher than those of every draw."""
        return self.target > max(self.draws)

    @property
    def deviations(self) -> float | None:
        """Standard deviations of the draws between their mean and the target's; None where there is
        no telling.
        """
        spread = stdev(self.draws) if len(self.draws) > 1 else 0.0
        return (self.target - fmean(self.draws)) / spread if spread > 0 else None

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "target": self.target,
            "draws": list(self.draws),
            "rows": self.rows,
            "deviations": self.deviations,
            "above": self.above,
        }

    def text(self) -> str:
        """One sentence."""
        many = len(self.draws) > 1
        drawn = (
            f"{len(self.draws)} draws of {self.rows:,} pool rows"
            if many
            else (f"{self.rows:,} rows drawn from the pool")
        )
        span = f" ({min(self.draws):.4g} to {max(self.draws):.4g})" if many else ""
        far = (
            ""
            if self.deviations is None
            else f", {self.deviations:+.1f} standard deviations of them"
        )
        said = (
            f"Null target: the picks score {self.target:.4g} toward the target on average, and"
            f" {fmean(self.draws):.4g}{span} toward {drawn} in its place{far}."
        )
        if self.above:
            return said
        return f"{said} These scores do not see the target: take random rows, or train longer."


def against_null(
    pipeline: Pipeline, selector: Selector, signals: Signals, kept: np.ndarray, left: Screen, k: int
) -> Null:
    """The method's own choice of k rows toward the target, and toward as many pool rows, drawn by a
    fixed seed, in the groups of the target's.

    Bounds, mixes and included rows are left aside on both sides. A drawn row is no candidate toward
    its own draw.

    Args:
        pipeline: of the selection.
        selector: a method that reads a target.
        signals: toward the target.
        kept: the pool rows behind `signals`.
        left: the rows that may be chosen.
        k: rows to choose.
    """
    target = pipeline.sides["target"]
    usable = np.flatnonzero(pipeline.encoded("target").codes == 0)
    groups = [target.groups[int(i)] for i in usable][: max(1, len(kept) // 2)]
    rng = np.random.default_rng(SEED)
    scores = []
    for number in range(draws_for(selector)):
        rows = np.sort(rng.choice(kept, size=len(groups), replace=False))
        pipeline.progress.note(f"null target {number + 1} of {draws_for(selector)}")
        other = pipeline.over(pipeline.sides["pool"], _as_target(pipeline, rows, groups))
        theirs, them = other.signals(selector.needs())
        free = np.setdiff1d(left.candidates, rows)
        scores.append(_score(selector, theirs, them, free, k))
    own = _score(selector, signals, kept, left.candidates, k)
    return Null(own, tuple(scores), len(groups))


def _as_target(pipeline: Pipeline, rows: np.ndarray, groups: Sequence[str]) -> Any:
    """Rows of the pool in the place of the target's, whose groups they take at random: `rows` are
    sorted.
    """
    order = np.random.default_rng(SEED).permutation(len(groups))
    return pipeline.sides["pool"].regrouped(rows, [groups[int(i)] for i in order])


def _score(
    selector: Selector, signals: Signals, kept: np.ndarray, candidates: np.ndarray, k: int
) -> float:
    """Mean score of the k rows that the method chooses by itself among `candidates` (pool rows)."""
    places = np.flatnonzero(np.isin(kept, candidates))
    given = replace(narrow(signals, places, selector.needs()), share=None)
    try:
        found = selector.select(given, min(k, len(places)), rng=np.random.default_rng(0))
    except ValueError as error:
        name = type(selector).__name__.lower()
        raise DataError(
            f"{name} cannot choose toward a null target: {error}", remedy="Leave --null out."
        ) from error
    return float(np.mean(_of_picks(found)))


def _of_picks(found: Subset) -> np.ndarray:
    """What the method thinks of each pick: its influence or score, whose unit does not depend on
    what was picked before; else its gain.
    """
    for name in ("influence", "score"):
        if name in found.notes:
            return np.asarray(found.notes[name], dtype=np.float64)[found.indices]
    if found.gains is None:
        raise DataError("the method scores no rows: there is nothing to compare with a null target")
    return np.asarray(found.gains, dtype=np.float64)
