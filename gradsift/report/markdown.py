"""The report as Markdown: the same facts for a terminal, a pull request or an issue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gradsift.report.data import Comparison, Curve, Histogram, ReportData, Row
from gradsift.report.text import count, excerpt, number, pieces, seconds, share, size, visible

MARKS = {"ok": "", "note": "Note: ", "warn": "Warning: "}
_SPECIAL = re.compile(
    r"[\\`*_\[\]<>|~$&@]|(?<=[a-z])(?=://)|(?<=www)(?=\.)|^[-+=#]|(?<=^\d)(?=[.)])", re.IGNORECASE
)


def plain(text: str) -> str:
    """`text` in one line as literal Markdown: no markup, link, mention, formula or HTML in it takes
    effect.
    """
    return _SPECIAL.sub(lambda match: "\\" + match.group(), visible(text))


def fenced(text: str) -> list[str]:
    """`text` in a code block whose fence is longer than any run of backticks inside it."""
    body = "".join(f"[{piece}]" if control else piece for piece, control in pieces(text))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", body)), default=0))
    return [f"{fence}text", *body.split("\n"), fence]


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: int | None = None
) -> list[str]:
    """A table; the columns from `numeric` on are aligned right."""
    start = len(columns) if numeric is None else numeric
    rule = ["---" if place < start else "---:" for place in range(len(columns))]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)] + [""]


def render(data: ReportData) -> str:
    lines = [f"# {plain(data.title)}", ""]
    for place, item in enumerate(data.sentences):
        lines += (
            [f"**{plain(item.text)}**", ""]
            if place == 0
            else [f"- {MARKS[item.level]}{plain(item.text)}"]
        )
    options = ", ".join(
        f"{plain(name)} = {plain('none' if value is None else str(value))}"
        for name, value in data.method.options.items()
    )
    lines += [
        "",
        f"Method: {plain(data.method.name)}. {plain(data.method.summary)}",
        "",
        *([f"Options: {options}", ""] if options else []),
    ]
    if data.comparison:
        lines += _comparison(data.comparison)
    if data.funnel:
        lines += ["## From rows read to rows selected", ""]
        lines += table(
            ["stage", "note", "rows"],
            ([plain(s.name), plain(s.note), count(s.count)] for s in data.funnel),
            2,
        )
    lines += _groups(data)
    for title, bins in (
        ("Scores and the cut", data.scores),
        ("Lengths, before and after", data.lengths),
    ):
        if bins:
            lines += _histogram(title, bins)
    if data.clusters:
        rows = (
            [plain(c.name), count(c.rows), count(c.picked), number(c.norm)] for c in data.clusters
        )
        lines += ["## Clusters", "", *table(["cluster", "rows", "picked", "norm"], rows, 1)]
    if data.map:
        where = " The map is in report.html." if data.map.points else ""
        lines += [f"## {plain(data.map.title)}", "", f"{plain(data.map.note)}{where}", ""]
    for title, cards in (
        ("Best rows", data.best),
        ("Borderline rows", data.borderline),
        ("Worst rows", data.worst),
    ):
        if cards:
            lines += [f"## {title}", "", *(line for card in cards for line in _card(card))]
    if data.warmup:
        lines += _curve(data.warmup)
    for title, found in (
        ("What the gradients cover", data.coverage),
        ("Which selections agree", data.agreement),
    ):
        if found:
            cells = (
                [plain(cell) if isinstance(cell, str) else number(cell) for cell in row]
                for row in found.rows
            )
            lines += [f"## {title}", "", *([plain(found.caption), ""] if found.caption else [])]
            lines += table([plain(column) for column in found.columns], cells)
    if data.timings:
        rows = (
            [plain(t.stage), t.state, t.digest[:12], seconds(t.seconds), size(t.peak_bytes)]
            for t in data.timings
        )
        lines += [
            "## Time and memory",
            "",
            *table(["stage", "state", "artifact", "time", "peak memory"], rows, 3),
        ]
    return "\n".join(lines + _reproduce(data)).rstrip() + "\n"


def _comparison(data: Comparison) -> list[str]:
    better = "lower" if data.lower_is_better else "higher"
    lines = [
        "## Does it train a better model?",
        "",
        f"{plain(data.measure)}; {better} is better. {plain(data.note)}".strip(),
        "",
    ]
    rows = (
        [
            plain(r.name),
            r.kind,
            number(r.value),
            number(r.low),
            number(r.high),
            count(r.rows),
            share(r.share),
            count(r.seeds),
        ]
        for r in data.results
    )
    return lines + table(
        ["trained on", "kind", "value", "low", "high", "rows", "share", "seeds"], rows, 2
    )


def _groups(data: ReportData) -> list[str]:
    if not data.groups:
        return []
    pool, picked = sum(g.pool_rows for g in data.groups), sum(g.picked_rows for g in data.groups)
    rows = (
        [
            plain(g.name),
            count(g.pool_rows),
            count(g.picked_rows),
            share(g.pool_rows, pool),
            share(g.picked_rows, picked),
            count(g.pool_tokens),
            count(g.picked_tokens),
        ]
        for g in data.groups
    )
    columns = [
        "group",
        "pool rows",
        "picked",
        "of pool",
        "of subset",
        "pool tokens",
        "picked tokens",
    ]
    return ["## Groups, before and after", "", *table(columns, rows, 1)]


def _histogram(title: str, data: Histogram) -> list[str]:
    # a dozen lines are enough to read in text
    total, step = len(data.counts), max(1, -(-len(data.counts) // 12))
    rows = []
    for start in range(0, total, step):
        end = min(start + step, total)
        last = " and more" if end == total and data.above else ""
        rows.append(
            [
                f"{number(data.edges[start])} to {number(data.edges[end])}{last}",
                count(sum(data.counts[start:end])),
                count(sum(data.picked[start:end])),
            ]
        )
    cut = [f"Cut at {number(data.cut)}.", ""] if data.cut is not None else []
    return [f"## {title}", "", *cut, *table([plain(data.label), "rows", "picked"], rows, 1)]


def _curve(data: Curve) -> list[str]:
    """A dozen of the steps, the first, the last and the checkpoints among them."""
    last = len(data.values)
    steps = {1, last, *(step for step in data.marks if 0 < step <= last)}
    steps |= set(range(1, last, max(1, -(-last // 10))))
    rows = (
        [count(step), number(data.values[step - 1]), "yes" if step in data.marks else ""]
        for step in sorted(steps)
    )
    return ["## The warm-up", "", *table(["step", plain(data.label), "checkpoint"], rows, 0)]


def _card(row: Row) -> list[str]:
    facts = {
        "rank": count(row.rank),
        "gain": number(row.gain),
        "influence": number(row.influence),
        "tokens": count(row.tokens),
    }
    facts |= {"group": plain(row.group), "file": plain(row.place), "why": plain(row.why)}
    if (near := row.nearest) is not None:
        where = plain(near.place or near.id)
        facts["nearest target row"] = f"{plain(excerpt(near.opening))} ({where}; {plain(near.how)})"
    lines = [
        f"### {plain(excerpt(row.opening, 60))}",
        "",
        f"- id: {plain(row.id)}",
        *(f"- {name}: {value}" for name, value in facts.items() if value),
        "",
    ]
    for turn in row.turns:
        lines += [f"{plain(turn.role)}:", "", *fenced(turn.content), ""]
        lines += [f"({count(turn.cut)} more characters)", ""] if turn.cut else []
    return lines + ([f"({count(row.turns_cut)} more turns)", ""] if row.turns_cut else [])


def _reproduce(data: ReportData) -> list[str]:
    how = data.reproduce
    lines = ["## How to get the same rows again", ""]
    if how.command:
        lines += [*fenced(how.command), ""]
    lines += [f"- {plain(note)}" for note in how.notes] + ([""] if how.notes else [])
    for title, values in (
        ("Seeds", how.seeds),
        ("Versions", how.versions),
        ("Digests", how.digests),
    ):
        if values:
            lines += table(
                [title, "value"],
                ([plain(name), plain(number(value))] for name, value in values.items()),
            )
    return lines
