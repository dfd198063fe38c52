"""The map of a selection: its picks, its target and a sample of the pool in two dimensions; and the
target row nearest to each row that the report shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from gradsift import report
from gradsift.commands.select.result import Chosen
from gradsift.data.pool import Pool
from gradsift.data.records import text_of
from gradsift.rules import plane
from gradsift.signals.ngrams import BUCKETS, buckets
from gradsift.stages.evidence import Vectors
from gradsift.types import Example, Rows

POOL_SHOWN = 1_500  # rows of the pool beside the picks
MARKED = 10_000  # picks, and target rows: of more, the first picks and a sample of the target
TEXT = 400_000  # characters of all rows on the map together
SHORTEST, LONGEST = 120, 600  # characters of one
WORDS_TARGET = 1_000  # target rows that are compared by their words
SEED = 0  # of what is drawn, whatever the selection's own seed: two selections show the same rows

_DIRECTION = {
    "gradients": "Gradients at the last checkpoint",
    "embeddings": "Embeddings of the base model",
    "features": "Features of the rows",
    "influence": "Influence on every target row",
}
_LENGTH = ("length",)  # methods whose score is the length of the answer


def draw(chosen: Chosen) -> report.Map:
    """The map, or a word why there is none.

    Coordinates are two principal directions of what the method stored: gradients, else embeddings
    or features, else the influence on every target row. Otherwise the method's score over the
    length of the answer. Stored rows are read in blocks: at most 64 MiB of them are held, and the
    Gram matrix of 1,024.
    """
    vectors = chosen.evidence.vectors
    if vectors is not None:
        made = _principal(chosen, vectors)
        if made is not None:
            return made
        return report.Map(note="No map: the stored rows are all alike.")
    if chosen.score is None:
        return report.Map(note=f"No map: {chosen.method} reads nothing of a row to draw it by.")
    if chosen.method in _LENGTH:
        return report.Map(
            note="No map: the score is the length of the answer, which has its own chart."
        )
    shown = _Shown.of(chosen, np.isfinite(chosen.score), None)
    tokens = np.asarray(chosen.evidence.supervised, dtype=np.float64)
    places = np.stack([tokens, chosen.score], axis=1)
    return report.Map(
        title="Map of the scores",
        x="supervised tokens of the answer",
        y=f"{chosen.method} score",
        note=_said(
            f"{chosen.method} stores no gradient rows: each dot is a row by the length of its"
            " answer and by its score",
            shown,
            "target rows have no score and are not drawn" if chosen.target is not None else "",
        ),
        points=_points(chosen, shown, places[shown.rows], np.empty((0, 2))),
    )


def _principal(chosen: Chosen, vectors: Vectors) -> report.Map | None:
    usable = np.asarray(vectors.usable, dtype=bool)
    rows, unit = vectors.pool, vectors.kind in ("gradients", "embeddings")
    if not unit:
        rows = _standardised(rows, np.flatnonzero(usable))
    kept = np.intersect1d(chosen.kept, np.flatnonzero(usable))
    axes = plane.fit(rows, kept, rng=np.random.default_rng(SEED), unit=unit)
    if axes is None:
        return None
    shown = _Shown.of(chosen, usable, vectors)
    placed = axes.place(rows, shown.rows)
    stars = np.empty((0, 2)) if vectors.target is None else axes.place(vectors.target, shown.target)
    missing = (
        f"target rows have no stored {vectors.kind} here and are not drawn"
        if chosen.target is not None and vectors.target is None
        else ""
    )
    what = "Adam steps at the last checkpoint" if vectors.adam else _DIRECTION[vectors.kind]
    unit_note = " at length 1" if unit else ""
    if vectors.adam and len(stars):
        missing = (
            "target rows are plain gradients, which lack what all Adam steps share: look at how"
            " they lie to each other, not at how far they are from the dots"
        )
    return report.Map(
        title=f"Map of the {vectors.kind}",
        x=f"first principal direction ({axes.shares[0]:.1%} of the variance)",
        y=f"second principal direction ({axes.shares[1]:.1%})",
        note=_said(
            f"{what}{unit_note}, in the two directions in which the pool's rows differ most:"
            f" {sum(axes.shares):.1%} of how they differ",
            shown,
            missing,
        ),
        points=_points(chosen, shown, placed, stars),
    )


def _standardised(rows: Rows, usable: np.ndarray) -> Rows:
    """Columns [n, d] of mean 0 and standard deviation 1 over the usable rows."""
    import torch

    columns = torch.as_tensor(rows).float()
    some = columns[torch.as_tensor(usable)]
    scale = some.std(dim=0, correction=0)
    return (columns - some.mean(dim=0)) / torch.where(scale > 0, scale, torch.ones_like(scale))


class _Shown:
    """What the map draws: pool rows, the `picks` first, in pick order; `target` rows; and how many
    there are of each.
    """

    def __init__(
        self,
        picks: np.ndarray,
        rest: np.ndarray,
        target: np.ndarray,
        totals: tuple[int, int, int],
    ) -> None:
        self.picks, self.rest, self.target, self.totals = picks, rest, target, totals
        self.rows = np.concatenate([picks, rest])

    @classmethod
    def of(cls, chosen: Chosen, usable: np.ndarray, vectors: Vectors | None) -> _Shown:
        rng = np.random.default_rng(SEED)
        picks = np.asarray(chosen.subset.indices, dtype=np.int64)
        picks = picks[usable[picks]]
        left = chosen.kept[~chosen.picked[chosen.kept] & usable[chosen.kept]]
        aims = np.empty(0, dtype=np.int64)
        if vectors is not None and vectors.target_usable is not None:
            aims = np.flatnonzero(vectors.target_usable)
        return cls(
            picks[:MARKED],
            plane.sample(left, POOL_SHOWN, rng),
            plane.sample(aims, MARKED, rng),
            (len(picks), len(left), len(aims)),
        )

    def __len__(self) -> int:
        return len(self.rows) + len(self.target)


def _said(first: str, shown: _Shown, missing: str) -> str:
    picks, left, aims = shown.totals
    drawn = [_share(len(shown.picks), picks, "picked row", "the first {} of {} picked rows")]
    if aims:
        drawn.append(_share(len(shown.target), aims, "target row", "{} of {} target rows"))
    drawn.append(
        _share(len(shown.rest), left, "other row", "a random {} of the {} other rows of the pool")
    )
    return f"{first}. Drawn: {', '.join(drawn)}{f'; {missing}' if missing else ''}."


def _share(some: int, of: int, noun: str, part: str) -> str:
    if some == of:
        return f"{of:,} {noun}{'' if of == 1 else 's'}"
    return part.format(f"{some:,}", f"{of:,}")


def _points(
    chosen: Chosen, shown: _Shown, placed: np.ndarray, stars: np.ndarray
) -> tuple[report.Point, ...]:
    most = max(SHORTEST, min(LONGEST, TEXT // max(len(shown), 1)))
    count = len(shown.picks)
    rank = {int(row): place + 1 for place, row in enumerate(chosen.subset.indices)}
    found = [
        _point("picked", chosen.pool, int(row), at, most, rank[int(row)])
        for row, at in zip(shown.picks, placed[:count], strict=True)
    ]
    if chosen.target is not None:
        found += [
            _point("target", chosen.target, int(row), at, most)
            for row, at in zip(shown.target, stars, strict=True)
        ]
    found += [
        _point("pool", chosen.pool, int(row), at, most)
        for row, at in zip(shown.rest, placed[count:], strict=True)
    ]
    return tuple(found)


def _point(
    kind: Literal["pool", "target", "picked"],
    rows: Pool,
    row: int,
    at: np.ndarray,
    most: int,
    rank: int | None = None,
) -> report.Point:
    example = rows[row]
    text = _turns(example)
    return report.Point(
        kind=kind,
        x=float(f"{at[0]:.4g}"),
        y=float(f"{at[1]:.4g}"),
        id=example.id,
        group=example.group,
        place=rows.place(row),
        rank=rank,
        text=text[:most],
        cut=max(0, len(text) - most),
    )


def _turns(example: Example) -> str:
    if not example.messages and example.tokens is not None:
        return " ".join(map(str, example.tokens[0]))
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in example.messages)


# --- the nearest target row


def nearest_rows(chosen: Chosen, rows: Sequence[int]) -> dict[int, report.Near]:
    """Pool row -> the target row nearest to it: by cosine of stored gradients or embeddings, else
    the one it helps most, else the one whose words are most like its own. Empty without a target.
    """
    target, vectors, helped = chosen.target, chosen.evidence.vectors, chosen.evidence.helped
    asked = np.array(sorted({int(row) for row in rows}), dtype=np.int64)
    if target is None or not len(asked):
        return {}
    if vectors is not None and vectors.target is not None and vectors.target_usable is not None:
        some = asked[np.asarray(vectors.usable)[asked]]
        which, value = plane.nearest(
            vectors.pool, some, vectors.target, np.flatnonzero(vectors.target_usable)
        )
        noun = {"gradients": "gradient", "embeddings": "embedding"}.get(vectors.kind, "row")
        said = [f"cosine of their {noun}s {v:.3g}" for v in value]
    elif helped is not None:
        some = asked
        values = helped.scores[some].float()
        best, at = values.max(dim=1)
        which = helped.target[at.numpy()]
        said = [f"the row it helps most: influence {v:.3g}" for v in best.tolist()]
    else:
        some = asked
        which, value = _by_words([chosen.pool[int(row)] for row in some], target)
        said = [f"by their words alone: cosine {v:.2f}" for v in value]
    return {
        int(row): _near(target, int(at), how)
        for row, at, how in zip(some, which, said, strict=True)
    }


def _near(target: Pool, row: int, how: str) -> report.Near:
    card = report.row_card(target[row], place=target.place(row))
    return report.Near(id=card.id, place=card.place, opening=card.opening[:300], how=how)


def _by_words(examples: Sequence[Example], target: Pool) -> tuple[np.ndarray, np.ndarray]:
    """Target row of highest cosine of hashed words and word pairs, rare ones weighing more."""
    rows = plane.sample(np.arange(len(target)), WORDS_TARGET, np.random.default_rng(SEED))
    theirs = _counts(text_of(target[int(row)]) for row in rows)
    ours = _counts(text_of(example) for example in examples)
    rare = np.log((1 + len(theirs)) / (1 + (theirs > 0).sum(axis=0)))
    ours, theirs = (_unit(np.log1p(counts) * (rare + 1e-9)) for counts in (ours, theirs))
    cosines = ours @ theirs.T
    best = cosines.argmax(axis=1)
    return rows[best], cosines[np.arange(len(best)), best]


def _counts(texts: Iterable[str]) -> np.ndarray:
    return np.stack(
        [np.bincount(buckets(text), minlength=BUCKETS).astype(np.float32) for text in texts]
    )


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
