"""What holds for a selection whatever the method: rows kept or left out by id, near duplicates,
overlap with test sets, shares of groups, and budgets in tokens.

First rows are taken out of the candidates, then the method chooses among what is left, as often as
group shares and a token budget need. docs/constraints.md says what that means for the result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from gradsift.commands.preflight import share_by_score
from gradsift.commands.select.contamination import TestSets
from gradsift.data.records import text_of
from gradsift.errors import ConfigError, UnknownName, UserError
from gradsift.rules import duplicates
from gradsift.store.rows import RowView
from gradsift.types import Example, Signal, Signals, counted

NEAR = {"rows": Signal("rows"), "embeddings": Signal("embeddings")}
_BOUND = re.compile(
    r"(?P<name>.+)=(?P<least>\d+(?:\.\d+)?%?)?:(?P<most>\d+(?:\.\d+)?%?)?", re.DOTALL
)


@dataclass(frozen=True)
class Bound:
    """At least `least` and at most `most` rows of a group, as written: counts, or percentages of
    the rows chosen.
    """

    group: str
    least: str = ""
    most: str = ""

    def rows(self, chosen: int) -> tuple[int, int]:
        """(least, most) among `chosen` rows. A percentage is rounded down for the least and up for
        the most, so shares that add up fit.
        """
        return _amount(self.least or "0", chosen, math.floor), _amount(
            self.most or "100%", chosen, math.ceil
        )


def _amount(text: str, whole: int, rounded: Callable[[Decimal], int]) -> int:
    return rounded(Decimal(text[:-1]) * whole / 100) if text.endswith("%") else int(text)


@dataclass(frozen=True)
class Constraints:
    """All constraints of a selection; the default constrains nothing.

    near: drop a row whose cosine to an earlier kept one is at least this, by gradient rows (plain,
    last checkpoint) or embeddings. tests: drop a row that shares 13 words in a row with one of
    these. mix: the share of the budget that goes by the method's scores; the rest is drawn from
    what is left. None = all of it by score.
    """

    per_group: tuple[Bound, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    near: float | None = None
    near_by: Literal["rows", "embeddings"] = "rows"
    tests: TestSets | None = None
    mix: Fraction | None = None

    def canonical(self) -> dict[str, Any]:
        """What enters the selection's recipe: empty where nothing is constrained."""
        found = {
            "per_group": sorted([b.group, b.least, b.most] for b in self.per_group),
            "include": _digest(self.include),
            "exclude": _digest(self.exclude),
            "near": None if self.near is None else [self.near, self.near_by],
            "decontaminate": None if self.tests is None else self.tests.digest,
            "mix": None if self.mix is None else str(self.mix),
        }
        return {name: value for name, value in found.items() if value}

    def needs(self) -> frozenset[Signal]:
        """Signals that are read besides the method's."""
        return frozenset() if self.near is None else frozenset({NEAR[self.near_by]})

    def check(self, pool: Any) -> None:
        """Raises UserError, UnknownName for ids and groups that the pool does not have: before
        anything is computed.
        """
        known = set(pool.ids)
        for flag, wanted in (("--include-ids", self.include), ("--exclude-ids", self.exclude)):
            strange = [i for i in wanted if i not in known]
            if strange:
                what = (
                    f"{flag}: {len(strange):,} of {counted(len(wanted), 'id is', 'ids are')} not in"
                    f" the pool, such as {strange[0]!r}"
                )
                raise UserError(what, remedy="Ids are those of scores.parquet; give one per line.")
        groups = set(pool.groups)
        for bound in self.per_group:
            if bound.group not in groups:
                raise UnknownName("group", bound.group, groups, where="--per-group")


@dataclass(frozen=True)
class Screen:
    """Rows (numbers in the pool) after screening: `candidates` the method may choose, `included` it
    must not decide on; `reasons`: pool row -> (code, what was found) for those taken out.
    `warnings` for the report.
    """

    candidates: np.ndarray
    included: np.ndarray
    reasons: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    warnings: Sequence[str] = ()

    def counts(self) -> dict[str, int]:
        return dict(Counter(code for code, _ in self.reasons.values()))


def build(
    *,
    per_group: Sequence[str] = (),
    include_ids: Path | str | Sequence[str] = (),
    exclude_ids: Path | str | Sequence[str] = (),
    near: float | None = None,
    near_by: str = "rows",
    decontaminate: Mapping[str, Iterable[Example]] | None = None,
    mix: float | str | None = None,
) -> Constraints:
    """Constraints from what a user writes: `NAME=MIN:MAX` texts, files of ids (or the ids), a
    cosine, test sets by name, a share of the budget.

    Raises ConfigError, UserError.
    """
    include, exclude = _ids(include_ids), _ids(exclude_ids)
    both = set(include) & set(exclude)
    if both:
        raise UserError(
            f"{sorted(both)[0]!r} is to be included and excluded",
            remedy="Take it off one of the two lists.",
        )
    if near is not None and not 0 < near <= 1:
        raise ConfigError(
            f"a threshold of {near} for near duplicates",
            remedy="Give a cosine above 0 and at most 1, such as 0.95.",
        )
    if near_by not in NEAR:
        raise UnknownName("kind of row for near duplicates", near_by, NEAR)
    tests = TestSets(decontaminate.items()) if decontaminate else None
    bounds = tuple(_bound(text) for text in per_group)
    if len({bound.group for bound in bounds}) < len(bounds):
        raise ConfigError("--per-group names a group twice", remedy="Give each group one MIN:MAX.")
    share = share_by_score(mix)
    return Constraints(bounds, include, exclude, near, near_by, tests, share)  # type: ignore[arg-type]


def _bound(text: str) -> Bound:
    found = _BOUND.fullmatch(text)
    if not found or not (found["least"] or found["most"]):
        raise ConfigError(
            f"--per-group {text}: not NAME=MIN:MAX",
            remedy="Write rows or shares: code=10%:30%, code=:500, code=100:.",
        )
    bound = Bound(found["name"], found["least"] or "", found["most"] or "")
    for part in (bound.least, bound.most):
        if ("." in part and "%" not in part) or (part.endswith("%") and Decimal(part[:-1]) > 100):
            raise ConfigError(
                f"--per-group {text}: {part} is neither a count of rows nor a percentage",
                remedy="Write 100 or 12.5%.",
            )
    least, most = bound.rows(10**9)
    if bound.most and ("%" in bound.least) == ("%" in bound.most) and least > most:
        raise ConfigError(
            f"--per-group {text}: the least is above the most",
            remedy="Write the smaller one first.",
        )
    return bound


def _ids(source: Path | str | Sequence[str]) -> tuple[str, ...]:
    if not isinstance(source, (Path, str)):
        return tuple(dict.fromkeys(source))
    try:
        lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read ids from it ({error})",
            where=source,
            remedy="Give a text file with one id per line.",
        ) from None
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _digest(ids: Sequence[str]) -> str:
    return (
        xxhash.xxh3_128_hexdigest("\n".join(sorted(ids)).encode("utf-8", "backslashreplace"))
        if ids
        else ""
    )


def screen(limits: Constraints, pool: Any, signals: Signals, kept: np.ndarray) -> Screen:
    """Takes the rows out of `kept` (pool rows behind `signals`) that must not be chosen, and sets
    aside those that must.

    Order: excluded ids, test sets, near duplicates; each sees what the ones before have left. Of
    near duplicates the first is kept, included rows before all others; an included row is never
    taken out as one. Raises UserError where an included row overlaps a test set.
    """
    ids, warnings = pool.ids, []
    reasons: dict[int, tuple[str, str]] = {}
    excluded, wanted = set(limits.exclude), set(limits.include)
    for row in kept.tolist():
        if ids[row] in excluded:
            reasons[row] = ("excluded by id", "named in --exclude-ids")
    if limits.tests is not None:
        reasons |= _contaminated(
            limits.tests, pool, [row for row in kept.tolist() if row not in reasons]
        )
        warnings += _test_warnings(limits.tests)
    for row in reasons:
        if ids[row] in wanted:
            what = f"{ids[row]!r} is to be included but {reasons[row][1]}"
            raise UserError(
                what,
                where=pool.place(row),
                remedy="Take it off --include-ids, or leave that test set out.",
            )
    if limits.near is not None:
        reasons |= _repeated(limits, ids, wanted, signals, kept, reasons)
    included = np.array([row for row in kept.tolist() if ids[row] in wanted], dtype=np.int64)
    if len(included) < len(wanted):
        warnings.append(
            counted(
                len(wanted) - len(included),
                "row of --include-ids is not usable and was",
                "rows of --include-ids are not usable and were",
            )
            + " left out"
        )
    out = set(reasons) | set(included.tolist())
    return Screen(
        np.array([row for row in kept.tolist() if row not in out], dtype=np.int64),
        included,
        reasons,
        warnings,
    )


def _contaminated(tests: TestSets, pool: Any, rows: Sequence[int]) -> dict[int, tuple[str, str]]:
    found = {}
    for row in rows:
        overlap = tests.overlap(text_of(pool[row]))
        if overlap is not None:
            what = (
                f"shares 13 words with row {overlap.instance + 1} of {overlap.test}:"
                f" {overlap.words!r}"
            )
            found[row] = ("overlaps a test set", what)
    return found


def _test_warnings(tests: TestSets) -> list[str]:
    return [
        f"{c.short:,} of the {c.instances:,} rows of the test set {c.name} have fewer than 13 words"
        " and cannot be found in the pool"
        for c in tests.counts
        if c.short
    ]


def _repeated(
    limits: Constraints,
    ids: Sequence[str],
    wanted: set[str],
    signals: Signals,
    kept: np.ndarray,
    reasons: Mapping[int, Any],
) -> dict[int, tuple[str, str]]:
    assert limits.near is not None
    places = np.array(
        [p for p, row in enumerate(kept.tolist()) if row not in reasons], dtype=np.int64
    )
    if not len(places):
        return {}
    late = np.array([ids[int(kept[p])] not in wanted for p in places])
    repeats = duplicates.near(
        RowView(signals[NEAR[limits.near_by]], places),
        limits.near,
        order=np.argsort(late, kind="stable"),
    ).tolist()
    found = {}
    for i, first in enumerate(repeats):
        row = int(kept[places[i]])
        if first >= 0 and ids[row] not in wanted:
            found[row] = (
                "near duplicate",
                (
                    f"cosine of at least {limits.near:g} ({limits.near_by}) to"
                    f" {ids[int(kept[places[first]])]!r}"
                ),
            )
    return found
