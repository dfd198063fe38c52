"""What a selection shows about itself: per-row columns, warnings, and the data of its report."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradsift import methods, report
from gradsift.commands.budget import Budget
from gradsift.commands.select.constraints import Screen
from gradsift.compute import machine
from gradsift.data.pool import Pool
from gradsift.data.records import Dropped
from gradsift.rules.ranks import spearman
from gradsift.stages.evidence import Evidence
from gradsift.stages.recipe import Timing
from gradsift.types import Selector, Subset

SHOWN = 20


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
        found = []
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
    def score(self) -> np.ndarray | None:
        """[n], what the method ranked rows by, where it says."""
        found = self.subset.notes.get("score")
        return None if found is None else np.asarray(found, dtype=np.float64)

    def why(self, row: int) -> str:
        """One line on a pool row: what the method saw in it."""
        notes, parts = self.subset.notes, []
        if self.score is not None and np.isfinite(self.score[row]):
            parts.append(f"score {self.score[row]:.4g}")
        if "nearest_group" in notes and notes["nearest_group"][row] is not None:
            parts.append(f"nearest target group {notes['nearest_group'][row]}")
        if "cluster" in notes and notes["cluster"][row] >= 0:
            parts.append(f"gradient cluster {notes['cluster'][row]}")
        if row in self.screen.included:
            parts = ["named in --include-ids"]
        if not parts:
            parts.append(
                "drawn at random"
                if self.method == "random"
                else "chosen"
                if self.picked[row]
                else "not chosen"
            )
        return ", ".join(parts)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Columns of scores.parquet over all pool rows, besides rank, gain and weight; what is
        unknown is left out.
        """
        subset = self.subset
        found: dict[str, Any] = {"tokens": self.evidence.supervised}
        found["score"], found["influence"] = self.score, subset.notes.get("influence")
        found["cluster"] = subset.notes.get("cluster")
        found["norm"], found["loss"] = self.evidence.norms, self.evidence.losses
        found["why"] = [self.why(i) if self.picked[i] else None for i in range(self.n)]
        return {name: column for name, column in found.items() if column is not None}

    def warnings(self) -> list[str]:
        found = []
        found += self.screen.warnings
        if len(self.subset) < self.asked:
            found.append(f"{len(self.subset):,} rows were chosen where {self.asked:,} were asked")
        overlap = self.overlap()
        if overlap:
            found.append(f"{overlap} target rows stand in the pool word for word")
        if "note" in self.subset.notes:
            found.append(str(self.subset.notes["note"]))
        return [*found, *self.evidence.warnings]

    def overlap(self) -> int:
        """Target rows whose messages are those of a pool row."""
        target = self.target
        if target is None:
            return 0
        wanted = {example.messages for example in target if example.messages}
        return len(wanted & {example.messages for example in self.pool}) if wanted else 0


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
    best, borderline, worst = _ends(chosen)
    return report.ReportData(
        title=f"{chosen.method}: {len(subset):,} of {pool.funnel['read']:,} rows",
        method=report.Method(
            name=chosen.method,
            summary=_first_sentence(chosen.selector),
            options=methods.options_of(chosen.selector),
        ),
        verdict=tuple(_verdict(chosen, tokens)),
        funnel=tuple(_funnel(chosen)),
        groups=tuple(_groups(chosen, tokens)),
        scores=scores,
        clusters=tuple(_clusters(chosen)),
        lengths=report.histogram(tokens, chosen.picked, label="supervised tokens", upper=0.99),
        best=tuple(best),
        borderline=tuple(borderline),
        worst=tuple(worst),
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


def _verdict(chosen: Chosen, tokens: np.ndarray) -> list[report.Verdict]:
    read, picked = chosen.pool.funnel["read"], chosen.picked
    share = tokens[picked].sum() / max(tokens[chosen.kept].sum(), 1)
    lines = [
        report.Verdict(
            text=(
                f"Selected {picked.sum():,} of {read:,} rows ({100 * picked.sum() / read:.1f} %)"
                f" with {chosen.method}."
            )
        ),
        report.Verdict(
            text=(
                f"They hold {100 * share:.1f} % of the supervised tokens; mean answer"
                f" {tokens[picked].mean():.0f} tokens, in the pool"
                f" {tokens[chosen.kept].mean():.0f}."
            )
        ),
    ]
    lines += [report.Verdict(text=text) for text in _constraint_lines(chosen)]
    lines += [report.Verdict(text=f"{text}.", level="warn") for text in chosen.warnings()]
    if chosen.score is not None:
        rho = spearman(chosen.score[chosen.kept], tokens[chosen.kept])
        if np.isfinite(rho):
            level = "warn" if abs(rho) > 0.5 and chosen.method != "length" else "note"
            lines.append(
                report.Verdict(
                    text=f"Rank correlation of score and answer length: {rho:+.2f}.", level=level
                )
            )
    if chosen.score is not None and chosen.evidence.norms is not None:
        rho = spearman(chosen.score[chosen.kept], chosen.evidence.norms[chosen.kept])
        if np.isfinite(rho):
            lines.append(
                report.Verdict(text=f"Rank correlation of score and gradient norm: {rho:+.2f}.")
            )
    if chosen.evidence.norms is not None:
        rho = spearman(chosen.evidence.norms[chosen.kept], tokens[chosen.kept])
        lines.append(
            report.Verdict(text=f"Rank correlation of gradient norm and answer length: {rho:+.2f}.")
        )
        cosine = chosen.evidence.mean_cosine
        if cosine is not None:
            text = f"Mean pairwise cosine of the stored rows: {cosine:.2f}"
            text += (
                " (a large component is shared by all rows; differences between them are what is"
                " left)."
                if cosine > 0.5
                else "."
            )
            lines.append(report.Verdict(text=text, level="warn" if cosine > 0.5 else "note"))
    lines += [report.Verdict(text=text) for text in _influence_lines(chosen)]
    return lines


def _influence_lines(chosen: Chosen) -> list[str]:
    """What curvature did, and how many rows help every target row, where the method says so."""
    lines, notes = [], chosen.subset.notes
    for curvature in chosen.evidence.curvature:
        ratio, agreement = curvature.damping, curvature.agreement
        if curvature.rows is not None:
            lines.append(f"The curvature was fitted on {curvature.rows:,} rows of the pool.")
        lines.append(
            f"Damping over mean eigenvalue of the curvature: {ratio['least']:.2g} to"
            f" {ratio['most']:.2g} (median {ratio['median']:.2g}); far above 1 the curvature hardly"
            " matters and scores are plain products of gradients."
        )
        if agreement is not None:
            lines.append(
                f"The target's gradients are kept at rank {curvature.rank}; their scores order"
                f" {agreement['rows']} rows of the pool as whole ones do to a Spearman correlation"
                f" of {agreement['mean']:.3f} (least of {agreement['targets']} targets:"
                f" {agreement['least']:.3f})."
            )
    if "neighbour_recall" in notes:
        lines.append(
            f"The graph holds {100 * notes['neighbour_recall']:.2f} % of the true nearest"
            " neighbours (a sample of rows)."
        )
    if "helps_every_target" in notes:
        lines.append(
            f"{notes['helps_every_target']:,} rows help every target row; {notes['survivors']:,}"
            f" help at least {100 * notes['quantile']:.1f} % of them and were clustered."
        )
    return lines


def _constraint_lines(chosen: Chosen) -> list[str]:
    lines = [
        f"Left out before choosing, {reason}: {count:,} rows."
        for reason, count in chosen.screen.counts().items()
    ]
    if len(chosen.screen.included):
        lines.append(
            f"{len(chosen.screen.included):,} rows are there because --include-ids names them; they"
            " have no gain."
        )
    if chosen.budget.unit != "rows":
        cost = (
            chosen.evidence.lengths
            if chosen.budget.unit == "tokens"
            else chosen.evidence.supervised
        )
        kind = (
            "tokens, prompts included," if chosen.budget.unit == "tokens" else "supervised tokens"
        )
        lines.append(
            f"The budget of {chosen.budget.text} is met with {int(cost[chosen.picked].sum()):,}"
            f" {kind} of the encoded rows."
        )
    return lines


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
        f"{found['modules']} modules carry the gradients: {found['share']:.1%} of"
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


def _ends(chosen: Chosen) -> tuple[list[report.Row], list[report.Row], list[report.Row]]:
    """Best picks, rows on both sides of the cut, and the rows the method likes least."""
    subset, score = chosen.subset, chosen.score
    picks = np.asarray(subset.indices)
    if subset.gains is not None:
        picks = picks[np.argsort(-np.asarray(subset.gains), kind="stable")]
    best = [_card(chosen, int(i)) for i in picks[:SHOWN]]
    if score is None:
        return best, [], []
    left = chosen.kept[~chosen.picked[chosen.kept]]
    left = left[np.argsort(-score[left], kind="stable")]
    near = [*picks[-SHOWN // 2 :], *left[: SHOWN // 2]]
    return (
        best,
        [_card(chosen, int(i)) for i in near],
        [_card(chosen, int(i)) for i in left[::-1][:SHOWN]],
    )


def _card(chosen: Chosen, row: int) -> report.Row:
    pool, subset = chosen.pool, chosen.subset
    where = np.flatnonzero(np.asarray(subset.indices) == row)
    rank = int(where[0]) if len(where) else None
    gain = float(subset.gains[rank]) if rank is not None and subset.gains is not None else None
    influence = subset.notes.get("influence")
    return report.row_card(
        pool[row],
        place=pool.place(row),
        rank=None if rank is None else rank + 1,
        gain=gain,
        influence=None if influence is None else float(influence[row]),
        tokens=int(chosen.evidence.supervised[row]),
        why=chosen.why(row),
    )
