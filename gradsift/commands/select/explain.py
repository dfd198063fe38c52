"""What a selection shows about itself: per-row columns, warnings, and the data of its report."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gradsift import methods, report
from gradsift.commands.select.map import draw, nearest_rows
from gradsift.commands.select.result import Chosen
from gradsift.commands.select.verdict import verdict_lines
from gradsift.compute import machine
from gradsift.stages.recipe import Timing
from gradsift.types import Selector, counted

SHOWN = 20


def _cut(chosen: Chosen) -> float | None:
    """The score above which every row was picked: the smallest gain, where no row that was left has
    a higher score. Where groups take turns, or clusters share the seats, there is none.
    """
    gains, score = chosen.subset.gains, chosen.score
    if gains is None or score is None or (least := _least(gains)) is None:
        return None
    left = score[chosen.kept[~chosen.picked[chosen.kept]]]
    return least if not np.any(left > least) else None


def _least(gains: np.ndarray) -> float | None:
    """The smallest gain, of the rows that have one: those of --include-ids do not."""
    known = np.asarray(gains)[np.isfinite(gains)]
    return float(known.min()) if len(known) else None


def report_data(
    chosen: Chosen, timings: Sequence[Timing], command: str, agreement: report.Table | None
) -> report.ReportData:
    """The report of a selection. `timings`: of its stages; `command`: makes it again; `agreement`:
    with other selections of the run.
    """
    pool, subset = chosen.pool, chosen.subset
    tokens = chosen.evidence.supervised.astype(np.float64)
    cut = _cut(chosen)
    scores = (
        None
        if chosen.score is None
        else report.histogram(chosen.score, chosen.picked, label=f"{chosen.method} score", cut=cut)
    )
    ends = _ends(chosen)
    nearest = nearest_rows(chosen, [row for rows in ends for row in rows])
    best, borderline, worst = (
        tuple(_card(chosen, row, nearest.get(row)) for row in rows) for rows in ends
    )
    return report.ReportData(
        title=f"{chosen.method}: {len(subset):,} of {counted(pool.funnel['read'], 'row')}",
        method=report.Method(
            name=chosen.method,
            summary=_first_sentence(chosen.selector),
            options=methods.options_of(chosen.selector),
        ),
        verdict=tuple(verdict_lines(chosen, tokens)),
        funnel=tuple(_funnel(chosen)),
        groups=tuple(_groups(chosen, tokens)),
        scores=scores,
        clusters=tuple(_clusters(chosen)),
        lengths=report.histogram(tokens, chosen.picked, label="supervised tokens", upper=0.99),
        best=best,
        borderline=borderline,
        worst=worst,
        map=draw(chosen),
        warmup=_warmup(chosen),
        coverage=_coverage(chosen),
        agreement=agreement,
        timings=tuple(
            report.Timing(
                stage=t.stage,
                seconds=t.seconds,
                peak_bytes=t.peak_bytes,
                digest=t.digest[:12],
                state="reused" if t.reused else "computed",
            )
            for t in timings
        ),
        reproduce=report.Reproduce(
            command=command,
            seeds={"selection": chosen.seed, **chosen.evidence.seeds},
            versions=machine.versions(),
            digests={"pool": pool.digest, **{t.stage: t.digest for t in timings}},
        ),
    )


def _first_sentence(selector: Selector) -> str:
    return (inspect.getdoc(type(selector)) or "").split("\n\n")[0].replace("\n", " ")


def _coverage(chosen: Chosen) -> report.Table | None:
    found = chosen.evidence.coverage
    if not found:
        return None
    rows = [
        (
            row["kind"],
            row["modules"],
            ", ".join("x".join(map(str, shape)) for shape in row["shapes"]),
            row["parameters"],
            f"{row['share']:.1%}",
        )
        for row in found["rows"]
    ]
    caption = (
        f"{counted(found['modules'], 'module carries', 'modules carry')} the gradients:"
        f" {found['share']:.1%} of"
        f" {found['trainable_parameters']:,} trainable parameters."
    )
    if found["moe"]:
        caption += (
            f" A mixture of experts: {len(found['experts'])} expert modules,"
            f" {len(found['uncovered'])} parameters not covered."
        )
    if found.get("rotary"):
        kind, tokens = found["rotary"]
        caption += (
            f" Rotary factors ({kind}) depend on the longest row of a batch where that has over"
            f" {tokens:,} tokens."
        )
    return report.Table(
        columns=("layer", "modules", "shape", "parameters", "share"),
        rows=tuple(rows),
        caption=caption,
    )


def _funnel(chosen: Chosen) -> list[report.Step]:
    pool = chosen.pool
    steps = [
        report.Step(name=name, count=count)
        for name, count in pool.funnel.items()
        if count or name in ("read", "usable")
    ]
    reasons = chosen.screen.counts()
    lost = Counter(row.code for row in chosen.evidence.dropped)
    steps += [report.Step(name=f"not encoded: {code}", count=lost[code]) for code in sorted(lost)]
    steps.append(
        report.Step(
            name="encoded and with a usable signal", count=len(chosen.kept) + sum(reasons.values())
        )
    )
    steps += [
        report.Step(name=f"left out: {reason}", count=count) for reason, count in reasons.items()
    ]
    return [*steps, report.Step(name="selected", count=len(chosen.subset))]


def _groups(chosen: Chosen, tokens: np.ndarray) -> list[report.Group]:
    names, codes = np.unique(
        np.asarray(list(chosen.pool.groups), dtype=object).astype(str), return_inverse=True
    )
    count = len(names)
    every, some = (
        np.bincount(codes, minlength=count),
        np.bincount(codes[chosen.picked], minlength=count),
    )
    mass = np.bincount(codes, tokens, minlength=count)
    taken = np.bincount(codes[chosen.picked], tokens[chosen.picked], minlength=count)
    order = sorted(range(count), key=lambda g: (-every[g], names[g]))
    return [
        report.Group(
            name=str(names[g]),
            pool_rows=int(every[g]),
            picked_rows=int(some[g]),
            pool_tokens=int(mass[g]),
            picked_tokens=int(taken[g]),
        )
        for g in order
    ]


def _clusters(chosen: Chosen) -> list[report.Cluster]:
    labels = chosen.subset.notes.get("cluster")
    if labels is None:
        return []
    labels = np.asarray(labels)
    norms = chosen.subset.notes.get("centroid_norms")
    count = int(labels.max()) + 1
    sizes, taken = (
        np.bincount(labels[labels >= 0], minlength=count),
        np.bincount(labels[chosen.picked], minlength=count),
    )
    return [
        report.Cluster(
            name=str(c),
            rows=int(sizes[c]),
            picked=int(taken[c]),
            norm=None if norms is None else float(norms[c]),
        )
        for c in np.argsort(-sizes, kind="stable")
    ]


def _warmup(chosen: Chosen) -> report.Curve | None:
    losses = [loss for loss in chosen.evidence.warmup_losses if np.isfinite(loss)]
    if len(losses) < 2 or len(losses) < len(chosen.evidence.warmup_losses):
        return None
    return report.Curve(
        label="loss (nats per token)",
        values=tuple(losses),
        marks=chosen.evidence.checkpoints,
    )


def _ends(chosen: Chosen) -> tuple[list[int], list[int], list[int]]:
    """Best picks, rows on both sides of the cut, and the rows the method likes least."""
    subset, score = chosen.subset, chosen.score
    picks = np.asarray(subset.indices)
    if subset.gains is not None:
        picks = picks[np.argsort(-np.asarray(subset.gains), kind="stable")]
    best = [int(i) for i in picks[:SHOWN]]
    if score is None:
        return best, [], []
    left = chosen.kept[~chosen.picked[chosen.kept]]
    left = left[np.argsort(-score[left], kind="stable")]
    ranked = [int(row) for row in picks if chosen.picked_by(int(row)) == "score"]
    near = [*ranked[-SHOWN // 2 :], *left[: SHOWN // 2]]
    return best, [int(i) for i in near], [int(i) for i in left[::-1][:SHOWN]]


def _card(chosen: Chosen, row: int, nearest: report.Near | None) -> report.Row:
    pool, subset, facts = chosen.pool, chosen.subset, chosen.facts(row)
    influence = subset.notes.get("influence")
    return report.row_card(
        pool[row],
        place=pool.place(row),
        rank=facts.rank,
        gain=facts.gain,
        influence=None if influence is None else float(influence[row]),
        tokens=int(chosen.evidence.supervised[row]),
        why=chosen.why(row),
        nearest=nearest,
    )
