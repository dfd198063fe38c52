"""A null target: the same method toward rows drawn from the pool, to tell whether its scores see
the target at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from gradsift.commands.select.choose import narrow
from gradsift.commands.select.constraints import Screen
from gradsift.errors import DataError, UserError
from gradsift.stages.pipeline import Pipeline
from gradsift.types import Selector, Signals, counted

SEED = 20_260_218  # of the draws: the same rows for every method and seed of a selection
DRAWS = 5


def draws_for(selector: Selector) -> int:
    """How many null targets a method is asked about: five, or one where each costs a training and a
    pass over the pool.
    """
    return 1 if any(signal.name == "tuned" for signal in selector.needs()) else DRAWS


@dataclass(frozen=True)
class Null:
    """How far the picks' scores stand above the pool's, toward the target and toward rows drawn
    from the pool.

    Scores of different targets have different scales (longer rows match more words; a mean of many
    kinds is near every row). So each is measured in the pool's own spread: mean score of the picks
    less that of all candidates, over the standard deviation of the candidates' scores.

    Args:
        target: toward the target.
        draws: toward each draw.
        rows: target rows of a draw.
    """

    target: float
    draws: tuple[float, ...]
    rows: int

    @property
    def known(self) -> bool:
        """Whether there is anything to tell: not where every row is picked."""
        return all(map(math.isfinite, (self.target, *self.draws)))

    @property
    def above(self) -> bool:
        """Whether the target's picks score higher than those of every draw."""
        return self.known and self.target > max(self.draws)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "target": self.target if self.known else None,
            "draws": list(self.draws) if self.known else None,
            "rows": self.rows,
            "above": self.above if self.known else None,
        }

    def text(self) -> str:
        """One sentence."""
        if not self.known:
            return "Null target: nothing can be told, for every row that may be chosen is picked."
        many = len(self.draws) > 1
        drawn = (
            f"{len(self.draws)} draws of {counted(self.rows, 'pool row')}"
            if many
            else f"{counted(self.rows, 'row')} drawn from the pool"
        )
        span = f" ({min(self.draws):.2f} to {max(self.draws):.2f})" if many else ""
        said = (
            f"Null target: the picks' scores stand {self.target:.2f} standard deviations above the"
            f" pool's; toward {drawn} in the target's place {fmean(self.draws):.2f}{span}."
        )
        if self.above:
            return said
        return (
            f"{said} These scores tell the target from no other: take random rows, or train longer."
        )


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
        # as large a part of the rows as toward the target, or fewer rows would be as many picks
        part = max(1, round(k * len(free) / max(len(left.candidates), 1)))
        scores.append(_score(selector, theirs, them, free, part))
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
    """How far the k rows that the method chooses by itself among `candidates` (pool rows) stand
    above them all, in standard deviations of their scores; 0 where all score the same, NaN where
    all are chosen.
    """
    places = np.flatnonzero(np.isin(kept, candidates))
    given = replace(narrow(signals, places, selector.needs()), share=None)
    try:
        found = selector.select(given, min(k, len(places)), rng=np.random.default_rng(0))
    except ValueError as error:
        name = type(selector).__name__.lower()
        raise DataError(
            f"{name} cannot choose toward a null target: {error}", remedy="Leave --null out."
        ) from error
    # what the method thinks of a row whatever was picked before it
    score = found.notes.get("influence", found.notes.get("score"))
    if score is None:
        raise UserError(
            f"{type(selector).__name__.lower()} gives rows no score that a null target could be"
            " compared by",
            remedy="Leave --null out.",
        )
    score = np.asarray(score, dtype=np.float64)
    spread = score.std()
    if len(found) >= len(score):
        return math.nan
    return float((score[found.indices].mean() - score.mean()) / spread) if spread > 0 else 0.0
