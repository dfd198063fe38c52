"""What one selection's report shows, as plain data that survives JSON unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator

from gradsift.types import Example

MAX_CHARACTERS = 4_000
MAX_TURNS = 12


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _finite_or_none(value: Any) -> Any:
    value = _plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


T = TypeVar("T")
Int = Annotated[int, BeforeValidator(_plain)]
Real = Annotated[float, BeforeValidator(_plain)]
MaybeReal = Annotated[float | None, BeforeValidator(_finite_or_none)]
Text = Annotated[str, BeforeValidator(_encodable)]
Several = Annotated[tuple[T, ...], Strict(False)]  # a list is accepted and frozen
Cell = Annotated[
    str | int | float | None, BeforeValidator(lambda value: _encodable(_finite_or_none(value)))
]
Option = Annotated[
    str | int | float | bool | None,
    BeforeValidator(lambda value: _encodable(_finite_or_none(value))),
]


class Part(BaseModel):
    """Frozen and strict; unknown fields are refused; numpy scalars become plain numbers; NaN is
    refused, or None where None is allowed.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Verdict(Part):
    """One plain sentence of the result. The first of a report is its headline."""

    text: Text
    level: Literal["ok", "note", "warn"] = "ok"


class Method(Part):
    name: Text
    summary: Text = ""
    options: dict[str, Option] = {}


class Step(Part):
    """One stage of the funnel from rows read to rows selected."""

    name: Text
    count: Int
    note: Text = ""


class Group(Part):
    name: Text
    pool_rows: Int
    picked_rows: Int
    pool_tokens: Int | None = None
    picked_tokens: Int | None = None


class Histogram(Part):
    """`counts[i]` of all values and `picked[i]` of the picked ones lie in edges[i] <= x < edges[i +
    1] (the last bin is closed).

    `above` values lie over the last edge and are counted in the last bin; `missing` values were not
    finite and are counted nowhere.
    """

    label: Text
    edges: Several[Real]
    counts: Several[Int]
    picked: Several[Int]
    cut: MaybeReal = None
    above: Int = 0
    missing: Int = 0

    @model_validator(mode="after")
    def _lengths(self) -> Histogram:
        if not len(self.edges) - 1 == len(self.counts) == len(self.picked):
            raise ValueError(
                "a histogram has one edge more than it has bins, and as many picked counts as"
                " counts"
            )
        return self


class Cluster(Part):
    """`norm`: L2 norm of the mean of the cluster's unit rows, in [0, 1]; near 1 = the rows
    agree.
    """

    name: Text
    rows: Int
    picked: Int
    norm: MaybeReal = None


class Turn(Part):
    role: Text
    content: Text
    cut: Int = 0  # characters left out of `content`


class Near(Part):
    """The target row nearest to a pool row. `how`: the measure in words, its value included."""

    id: Text
    place: Text = ""  # file:line
    opening: Text = ""
    how: Text = ""


class Row(Part):
    id: Text
    group: Text
    place: Text = ""  # file:line
    turns: Several[Turn] = ()
    turns_cut: Int = 0
    rank: Int | None = None
    gain: MaybeReal = None
    influence: MaybeReal = None
    tokens: Int | None = None
    why: Text = ""
    nearest: Near | None = None

    @property
    def opening(self) -> str:
        """The text a reader knows the row by: its first turn that is not a system prompt."""
        return next(
            (turn.content for turn in self.turns if turn.role != "system" and turn.content.strip()),
            self.id,
        )


class Table(Part):
    columns: Several[Text]
    rows: Several[Several[Cell]]
    caption: Text = ""

    @model_validator(mode="after")
    def _widths(self) -> Table:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError("every row of a table has one cell per column")
        return self


class Timing(Part):
    """`seconds` of wall time and `peak_bytes` of memory, as measured when the artifact was
    computed.
    """

    stage: Text
    seconds: MaybeReal = None
    peak_bytes: Int | None = None
    digest: Text = ""
    state: Literal["computed", "reused"] = "computed"
    note: Text = ""


class Compared(Part):
    """One training: `value` is the measure (mean over `seeds`), [low, high] its interval, `share`
    the share of the pool trained on.
    """

    name: Text
    kind: Literal["method", "control", "full", "none"] = "method"
    value: MaybeReal = None
    low: MaybeReal = None
    high: MaybeReal = None
    seeds: Int | None = None
    rows: Int | None = None
    share: MaybeReal = None
    note: Text = ""


class Comparison(Part):
    measure: Text = "held-out loss (nats per token)"
    lower_is_better: bool = True
    results: Several[Compared]
    note: Text = ""


class Point(Part):
    """One row on the map. `text`: its turns, shortened; `cut`: characters left out."""

    kind: Literal["pool", "target", "picked"]
    x: Real
    y: Real
    id: Text
    group: Text = ""
    place: Text = ""  # file:line
    rank: Int | None = None
    text: Text = ""
    cut: Int = 0


class Map(Part):
    """The pool in two dimensions. `x`, `y`: what the axes are; `note`: what is drawn and what is
    left out, or, without points, why there is no map. Points: picks in pick order, then target
    rows, then a sample of the pool's other rows.
    """

    title: Text = "Map of the rows"
    x: Text = ""
    y: Text = ""
    note: Text = ""
    points: Several[Point] = ()


class Curve(Part):
    """One value per optimiser step, from step 1; `marks`: steps to draw a line at."""

    label: Text
    values: Several[Real]
    marks: Several[Int] = ()


class Reproduce(Part):
    command: Text = ""
    seeds: dict[str, Option] = {}
    versions: dict[str, Text] = {}
    digests: dict[str, Text] = {}
    notes: Several[Text] = ()


class ReportData(Part):
    """Everything the report of one selection shows.
    `ReportData.model_validate_json(data.model_dump_json()) == data`.
    """

    title: Text
    method: Method
    verdict: Several[Verdict]
    funnel: Several[Step] = ()
    groups: Several[Group] = ()
    scores: Histogram | None = None
    clusters: Several[Cluster] = ()
    lengths: Histogram | None = None
    best: Several[Row] = ()
    borderline: Several[Row] = ()
    worst: Several[Row] = ()
    map: Map | None = None
    warmup: Curve | None = None
    coverage: Table | None = None
    agreement: Table | None = None
    timings: Several[Timing] = ()
    comparison: Comparison | None = None
    reproduce: Reproduce = Reproduce()

    @property
    def sentences(self) -> tuple[Verdict, ...]:
        """The verdict, and where no comparison is shown, that nobody knows yet what these rows are
        worth.
        """
        unknown = Verdict(
            text=(
                "Whether this trains a better model than random rows is not measured on this page."
            ),
            level="note",
        )
        return self.verdict if self.comparison or not self.verdict else (*self.verdict, unknown)


def histogram(
    values: Sequence[float] | np.ndarray,
    picked_mask: Sequence[bool] | np.ndarray,
    bins: int = 60,
    *,
    label: str = "score",
    cut: float | None = None,
    upper: float | None = None,
) -> Histogram:
    """Counts of `values` [n] and of the picked ones in `bins` equal bins.

    `upper`: a quantile in (0, 1]; larger values are counted in the last bin (for long-tailed axes
    such as lengths). Values that are not finite are counted in `missing`. Whole-number values never
    get bins narrower than 1.
    """
    array = np.asarray(values, dtype=np.float64)
    mask = np.asarray(picked_mask, dtype=bool)
    if array.ndim != 1 or array.shape != mask.shape:
        raise ValueError(
            f"values and picked_mask must be two vectors of one length, not {array.shape} and"
            f" {mask.shape}"
        )
    good = np.isfinite(array)
    missing, array, mask = int((~good).sum()), array[good], mask[good]
    if not len(array):
        return Histogram(
            label=label, edges=(0.0, 1.0), counts=(0,), picked=(0,), cut=cut, missing=missing
        )
    low, top = float(array.min()), float(array.max())
    high = float(np.quantile(array, upper)) if upper is not None else top
    above = int((array > high).sum())
    if high <= low:
        margin = max(abs(low) * 1e-3, 0.5)
        edges = np.array([low - margin, low + margin])
    elif np.array_equal(array, np.round(array)):
        width = max(1, math.ceil((high - low + 1) / bins))
        edges = np.arange(low, high + width + 0.5, width, dtype=np.float64)
    else:
        edges = np.linspace(low, high, bins + 1)
    inside = np.minimum(array, edges[-1])
    counts, picked = np.histogram(inside, edges)[0], np.histogram(inside[mask], edges)[0]
    return Histogram(
        label=label,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
        picked=tuple(picked.tolist()),
        cut=cut,
        above=above,
        missing=missing,
    )


def row_card(
    example: Example,
    *,
    place: str = "",
    rank: int | None = None,
    gain: float | None = None,
    influence: float | None = None,
    tokens: int | None = None,
    why: str = "",
    nearest: Near | None = None,
) -> Row:
    """An example as the report shows it: the first 12 turns, 4,000 characters of each, with what
    was left out counted.
    """
    return Row(
        id=example.id,
        group=example.group,
        place=place,
        turns=tuple(_turns(example)),
        turns_cut=max(0, len(example.messages) - MAX_TURNS),
        rank=rank,
        gain=gain,
        influence=influence,
        tokens=tokens,
        why=why,
        nearest=nearest,
    )


def _turns(example: Example) -> Iterable[Turn]:
    if not example.messages and example.tokens is not None:
        yield Turn(role="tokens", content=" ".join(map(str, example.tokens[0][:200])), cut=0)
    for message in example.messages[:MAX_TURNS]:
        content = message.content[:MAX_CHARACTERS]
        yield Turn(role=message.role, content=content, cut=len(message.content) - len(content))
