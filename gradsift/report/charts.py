"""The report's charts as Vega-Lite specifications. Colours are named styles; the page fills them in
for light and dark.
"""

from __future__ import annotations

from typing import Any

import altair as alt

from gradsift.report.data import Comparison, Curve, Group, Histogram, Map, ReportData
from gradsift.report.text import visible

MAX_BARS = 20
COUNT = ",.0f"


def charts(data: ReportData) -> dict[str, dict[str, Any]]:
    """Chart name -> Vega-Lite specification, for the parts of the report that have data."""
    made: dict[str, alt.LayerChart] = {}
    if len(data.groups) > 1:
        made["groups"] = _groups(data)
    if data.scores is not None and sum(data.scores.counts):
        made["scores"] = _scores(data.scores)
    if len(data.clusters) > 1:
        made["clusters"] = _clusters(data)
    if data.lengths is not None and sum(data.lengths.counts):
        made["lengths"] = _lengths(data.lengths)
    if data.map is not None and data.map.points:
        made["map"] = _map(data.map)
    if data.warmup is not None:
        made["warmup"] = _warmup(data.warmup)
    if data.comparison is not None and any(
        row.value is not None for row in data.comparison.results
    ):
        made["comparison"] = _comparison(data.comparison)
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return {name: chart.properties(autosize=fit).to_dict() for name, chart in made.items()}


def by_size(groups: tuple[Group, ...]) -> list[Group]:
    """The groups, the largest of the pool first. A chart has room for the first MAX_BARS."""
    return sorted(groups, key=lambda group: -group.pool_rows)


def _values(rows: list[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=rows)


def _groups(data: ReportData) -> alt.LayerChart:
    pool = sum(group.pool_rows for group in data.groups) or 1
    picked = sum(group.picked_rows for group in data.groups) or 1
    groups = by_size(data.groups)[:MAX_BARS]
    rows = [
        {
            "group": visible(group.name)[:60],
            "before": group.pool_rows / pool,
            "after": group.picked_rows / picked,
            "place": place,
        }
        for place, group in enumerate(groups)
    ]
    y = alt.Y(
        "group:N",
        sort=alt.EncodingSortField("place"),
        title=None,
        axis=alt.Axis(labelLimit=150, labelPadding=8),
    )
    tips = [
        alt.Tooltip("group:N"),
        alt.Tooltip("before:Q", format=".1%", title="of the pool"),
        alt.Tooltip("after:Q", format=".1%", title="of the subset"),
    ]
    share = alt.Axis(format=".0%", tickCount=5)
    base = alt.Chart(_values(rows)).encode(y=y, tooltip=tips)
    line = base.mark_rule(style="link", strokeWidth=3).encode(
        x=alt.X("before:Q", title="share of rows", axis=share), x2="after:Q"
    )
    before = base.mark_point(style="pool-point", filled=True, size=90, opacity=1).encode(
        x="before:Q"
    )
    after = base.mark_point(style="picked-point", filled=True, size=110, opacity=1).encode(
        x="after:Q"
    )
    return alt.layer(line, before, after).properties(
        width="container",
        height=28 * len(rows),
        description="For each group, its share of the pool and its share of the subset.",
    )


def _bins(data: Histogram) -> list[dict[str, Any]]:
    pairs = zip(data.edges, data.edges[1:], data.counts, data.picked, strict=False)
    return [{"from": a, "to": b, "all": count, "picked": picked} for a, b, count, picked in pairs]


def _scores(data: Histogram) -> alt.LayerChart:
    tips = [
        alt.Tooltip("from:Q", format=".4~g"),
        alt.Tooltip("to:Q", format=".4~g"),
        alt.Tooltip("all:Q", format=COUNT, title="rows"),
        alt.Tooltip("picked:Q", format=COUNT, title="picked"),
    ]
    unpadded = alt.Scale(zero=False, nice=False)
    x = alt.X(
        "from:Q",
        bin="binned",
        title=visible(data.label),
        scale=unpadded,
        axis=alt.Axis(grid=False, tickCount=6),
    )
    # Square root: the picked tail is a few per cent of the pool and would be flat on a linear axis,
    # while a logarithm has no zero.
    y = alt.Y(
        "all:Q",
        title="rows (square-root scale)",
        scale=alt.Scale(type="sqrt"),
        axis=alt.Axis(tickCount=4, format=COUNT),
    )
    base = alt.Chart().encode(x=x, x2="to:Q", tooltip=tips)
    layers = [
        base.mark_bar(style="pool", binSpacing=1).encode(y=y),
        base.mark_bar(style="picked", binSpacing=1).encode(y=alt.Y("picked:Q")),
    ]
    if data.cut is not None and data.edges[0] <= data.cut <= data.edges[-1]:
        side, away = (
            ("right", -6) if data.cut > (data.edges[0] + data.edges[-1]) / 2 else ("left", 6)
        )
        mark = alt.Chart(_values([{"cut": data.cut, "text": f"cut {data.cut:.4g}"}])).encode(
            x="cut:Q"
        )
        layers.append(mark.mark_rule(style="cut", strokeWidth=1.5, strokeDash=[4, 3]))
        layers.append(
            mark.mark_text(style="cut-label", align=side, dx=away, y=4, baseline="top").encode(
                text="text:N"
            )
        )
    return alt.layer(*layers, data=_values(_bins(data))).properties(
        width="container",
        height=230,
        description="Histogram of the scores of all rows and of the picked rows.",
    )


def _lengths(data: Histogram) -> alt.LayerChart:
    total, chosen = sum(data.counts) or 1, sum(data.picked) or 1
    rows = [
        bin | {"pool share": bin["all"] / total, "picked share": bin["picked"] / chosen}
        for bin in _bins(data)
    ]
    tips = [
        alt.Tooltip("from:Q", format=COUNT),
        alt.Tooltip("to:Q", format=COUNT),
        alt.Tooltip("pool share:Q", format=".1%"),
        alt.Tooltip("picked share:Q", format=".1%"),
    ]
    title = visible(data.label) + (" (last bin: and longer)" if data.above else "")
    x = alt.X(
        "from:Q",
        bin="binned",
        title=title,
        scale=alt.Scale(nice=False),
        axis=alt.Axis(grid=False, tickCount=6),
    )
    y = alt.Y("pool share:Q", title="share of rows", axis=alt.Axis(tickCount=4, format=".0%"))
    pool = (
        alt.Chart(_values(rows))
        .encode(x=x, x2="to:Q", y=y, tooltip=tips)
        .mark_bar(style="pool", binSpacing=0.5)
    )
    steps = [
        *((row["from"], row["picked share"]) for row in rows),
        (rows[-1]["to"], rows[-1]["picked share"]),
    ]
    outline = alt.Chart(_values([{"from": at, "picked share": part} for at, part in steps])).encode(
        x="from:Q", y="picked share:Q"
    )
    picked = outline.mark_line(style="picked-line", interpolate="step-after", strokeWidth=2)
    return alt.layer(pool, picked).properties(
        width="container",
        height=190,
        description="Lengths of the rows of the pool and of the picked rows.",
    )


def _clusters(data: ReportData) -> alt.LayerChart:
    rows = [
        {"cluster": visible(c.name)[:60], "rows": c.rows, "picked": c.picked, "norm": c.norm}
        for c in data.clusters
    ]
    size = sum(c.rows for c in data.clusters) or 1
    rate = sum(c.picked for c in data.clusters) / size
    top = max(c.rows for c in data.clusters)
    tips = [
        alt.Tooltip("cluster:N"),
        alt.Tooltip("rows:Q", format=COUNT),
        alt.Tooltip("picked:Q", format=COUNT),
        alt.Tooltip("norm:Q", format=".2f"),
    ]
    x = alt.X(
        "rows:Q", title="rows in the cluster", axis=alt.Axis(tickCount=5, format=COUNT, grid=False)
    )
    y = alt.Y("picked:Q", title="picked", axis=alt.Axis(tickCount=4, format=COUNT))
    line = alt.Chart(
        _values([{"rows": 0, "picked": 0}, {"rows": top, "picked": top * rate}])
    ).mark_line(style="even", strokeDash=[4, 3], strokeWidth=1.5)
    points = (
        alt.Chart(_values(rows))
        .mark_point(style="picked-point", filled=True, size=70, opacity=0.65)
        .encode(x=x, y=y, tooltip=tips)
    )
    return alt.layer(line.encode(x=x, y=y), points).properties(
        width="container", height=220, description="Rows and picks of each cluster."
    )


# A star of five points within a circle of radius 1.
STAR = (
    "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309"
    "L-.235,-.324Z"
)


def _map(data: Map) -> alt.LayerChart:
    """Dots of the pool below, stars of the target and picks above; `chosen` is the place of the
    point that the reader has opened.
    """
    rows = [
        {"i": place, "x": point.x, "y": point.y, "kind": point.kind}
        for place, point in enumerate(data.points)
    ]
    axis = alt.Axis(tickCount=4, format=",f")  # "g" would write 200 as 2e+2
    x = alt.X("x:Q", title=visible(data.x), scale=_domain([p.x for p in data.points]), axis=axis)
    y = alt.Y("y:Q", title=visible(data.y), scale=_domain([p.y for p in data.points]), axis=axis)
    base = alt.Chart().encode(x=x, y=y)

    def dots(kind: str, **mark: Any) -> alt.Chart:
        return base.transform_filter(f"datum.kind == '{kind}'").mark_point(
            style=f"map-{kind}", filled=True, aria=False, cursor="pointer", **mark
        )

    chosen = alt.param(name="chosen", value=-1)
    return (
        alt.layer(
            dots("pool", size=16, opacity=0.9),
            dots("picked", size=36, opacity=0.95),
            dots("target", size=150, opacity=1, shape=STAR, strokeWidth=0.6),
            base.transform_filter("datum.i == chosen").mark_point(
                style="map-chosen", filled=False, size=260, strokeWidth=2.5, aria=False
            ),
            data=_values(rows),
        )
        .add_params(chosen)
        .properties(
            width="container",
            height=360,
            description="Rows of the pool, of the target and picked rows in two dimensions.",
        )
    )


def _domain(values: list[float]) -> alt.Scale:
    """A scale with a margin at both ends; stated, for the layer of the chosen point is empty at
    first and has no extent.
    """
    margin = 0.03 * (max(values) - min(values)) or 0.5
    return alt.Scale(domain=[min(values) - margin, max(values) + margin], nice=False, zero=False)


def _warmup(data: Curve) -> alt.LayerChart:
    values = [{"step": place + 1, "loss": value} for place, value in enumerate(data.values)]
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickCount=6, format="d", grid=False))
    y = alt.Y(
        "loss:Q",
        title=visible(data.label),
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=4, format="~g"),
    )
    line = (
        alt.Chart(_values(values))
        .mark_line(style="picked-line", strokeWidth=1.5)
        .encode(x=x, y=y, tooltip=[alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4f")])
    )
    marks = alt.Chart(_values([{"step": step} for step in data.marks])).encode(x="step:Q")
    rule = marks.mark_rule(style="cut", strokeWidth=1, strokeDash=[4, 3])
    return alt.layer(rule, line).properties(
        width="container", height=170, description="The loss of every step of the warm-up."
    )


def _comparison(data: Comparison) -> alt.LayerChart:
    rows = [
        {
            "name": visible(r.name)[:60],
            "kind": r.kind,
            "value": r.value,
            "low": r.low,
            "high": r.high,
            "ours": r.kind == "method",
        }
        for r in data.results
        if r.value is not None
    ]
    order = "ascending" if data.lower_is_better else "descending"
    y = alt.Y(
        "name:N",
        sort=alt.EncodingSortField("value", order=order),
        title=None,
        axis=alt.Axis(labelLimit=170, labelPadding=8),
    )
    tips = [
        alt.Tooltip("name:N"),
        *(alt.Tooltip(f"{field}:Q", format=".4f") for field in ("value", "low", "high")),
    ]
    x = alt.X(
        "value:Q",
        title=visible(data.measure),
        scale=alt.Scale(zero=False),
        axis=alt.Axis(tickCount=5),
    )
    base = alt.Chart(_values(rows)).encode(y=y, tooltip=tips)
    bars = (
        base.transform_filter("datum.low != null && datum.high != null")
        .mark_rule(style="link", strokeWidth=3)
        .encode(x=alt.X("low:Q"), x2="high:Q")
    )
    others = (
        base.transform_filter("!datum.ours")
        .mark_point(style="pool-point", filled=True, size=90, opacity=1)
        .encode(x=x)
    )
    ours = (
        base.transform_filter("datum.ours")
        .mark_point(style="picked-point", filled=True, size=110, opacity=1)
        .encode(x=x)
    )
    return alt.layer(bars, others, ours).properties(
        width="container",
        height=28 * len(rows),
        description="The measure per method, with its interval.",
    )
