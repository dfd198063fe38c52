"""The sentences of a report's verdict."""

from __future__ import annotations

import numpy as np

from gradsift import report
from gradsift.commands.select.mix import DRAWN
from gradsift.commands.select.result import Chosen
from gradsift.rules.ranks import spearman
from gradsift.types import counted

# Where the mean answer of the picks is so many times longer or shorter than the pool's, a selection
# may have chosen by length.
LOPSIDED = 2.0


def _lopsided(chosen: Chosen, tokens: np.ndarray) -> bool:
    """Whether the picks' mean answer is far shorter or longer than the pool's, and not by request
    (method `length`).
    """
    mine, all_ = tokens[chosen.picked].mean(), tokens[chosen.kept].mean()
    return chosen.method != "length" and not all_ / LOPSIDED <= mine <= all_ * LOPSIDED


def verdict_lines(chosen: Chosen, tokens: np.ndarray) -> list[report.Verdict]:
    """The sentences of the verdict; `tokens` [n]: supervised tokens of every pool row."""
    read, picked = chosen.pool.funnel["read"], chosen.picked
    share = tokens[picked].sum() / max(tokens[chosen.kept].sum(), 1)
    lines = [
        report.Verdict(
            text=(
                f"Selected {picked.sum():,} of {counted(read, 'row')}"
                f" ({100 * picked.sum() / read:.1f} %)"
                f" with {chosen.method}."
            )
        ),
        report.Verdict(
            text=(
                f"They hold {100 * share:.1f} % of the supervised tokens; mean answer"
                f" {tokens[picked].mean():.0f} tokens, in the pool"
                f" {tokens[chosen.kept].mean():.0f}."
            ),
            level="warn" if len(chosen.subset) and _lopsided(chosen, tokens) else "ok",
        ),
    ]
    lines += [report.Verdict(text=text) for text in _constraint_lines(chosen)]
    if chosen.null is not None and (chosen.null.above or not chosen.null.known):
        # else it is among the warnings
        lines.append(report.Verdict(text=chosen.null.text()))
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
            lines.append(
                f"The curvature was fitted on {counted(curvature.rows, 'row')} of the pool."
            )
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
            f"{counted(notes['helps_every_target'], 'row helps', 'rows help')} every target row;"
            f" {notes['survivors']:,}"
            f" help at least {100 * notes['quantile']:.1f} % of them and were clustered."
        )
    return lines


def _constraint_lines(chosen: Chosen) -> list[str]:
    lines = [
        f"Left out before choosing, {reason}: {counted(count, 'row')}."
        for reason, count in chosen.screen.counts().items()
    ]
    if len(chosen.screen.included):
        lines.append(
            f"{counted(len(chosen.screen.included), 'row is', 'rows are')} there because"
            " --include-ids says so, without a gain."
        )
    if DRAWN in chosen.subset.notes:
        drawn = int(chosen.drawn.sum())
        lines.append(
            f"{drawn:,} of {counted(len(chosen.subset), 'row is', 'rows are')} drawn from what the"
            " method left (--mix); they have no gain."
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
