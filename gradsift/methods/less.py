"""LESS: low-rank gradient similarity search toward a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.methods.words import count, figure
from gradsift.types import AdamForm, Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Less:
    """Rows whose optimiser step points the way the target's gradients point, cosine summed over the
    warm-up's checkpoints.

    Source: arXiv 2402.04333 (ICML 2024), sections 3 and 4; score = sum over checkpoints of mean_lr
    * cos(Adam direction of the row, target gradient), mean_lr normalised to sum 1. Positive =
    training on the row lowers the target's loss. Cost: gradients of pool and target at every
    checkpoint, then one product of n x m rows.

    score = that of a row's best group; gain of a pick = in the group, or for the target row, whose
    turn it was.

    aggregate: "groups" (the default of `preset=paper`) = the target groups take turns, each with
    its best unused row; "rows" = so does each target row, which needs a score with each:
    `preset=released`, or a backend that keeps them; "max" (the default of `preset=released`) = each
    row's best group, then the k largest.

    Differences from the paper: `preset=paper` merges a group's target gradients into their mean and
    takes one cosine with it; several groups take turns (`aggregate=groups`) where the paper takes
    the maximum, as `preset=released` does: by the maximum, the groups whose cosines are largest can
    take every pick (docs/methods.md). Differences from the released code: `preset=released`
    averages the cosines with each target row within a group. Both take any number and size of
    groups; the released code needs equal, contiguous ones. `preset=released` reads Adam rows as
    the code forms them (bias correction, eps); else `[gradients] adam_form` says, whose default is
    the paper's. `transform=none` compares plain gradients instead, for warm-ups whose optimiser
    state is gone, and `checkpoints=last` those of the last checkpoint alone. `backend=` takes
    another line of the table of influence backends (docs/scores.md): `ekfac` or `trak`, say, with
    LESS's rule on top.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    preset: Literal["paper", "released"] = "paper"
    aggregate: Literal["rows", "groups", "max"] | None = None
    transform: Literal["adam", "none"] | None = None
    checkpoints: Literal["last", "mean"] = "mean"
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.aggregate == "rows" and self._merged:
            raise ValueError(
                "aggregate=rows needs a score with every target row: add preset=released, or"
                " backend=cosine"
            )

    @property
    def _form(self) -> AdamForm | None:
        """The Adam form of the released features; None = that of the run."""
        return "released" if self.preset == "released" and self.transform != "none" else None

    @property
    def _merged(self) -> bool:
        """Whether scores have one column for each group."""
        return self.influence.backend == "less-mean"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.influence})

    @property
    def influence(self) -> Signal:
        backend = self.backend or ("less" if self.preset == "released" else "less-mean")
        return Signal(
            "influence",
            transform=self.transform or "backend",
            checkpoints=self.checkpoints,
            backend=backend,
            adam_form=self._form,
        )

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import by_turns, finite

        scores = finite(signals, self.influence).float()
        of = list(signals.target_groups)
        groups = list(dict.fromkeys(of))
        by_group = scores if self._merged else rules.topk.group_scores(scores, of)
        best, which = by_group.max(dim=1)
        aggregate = self.aggregate or ("max" if self.preset == "released" else "groups")
        score, why = best.numpy(), np.array([groups[g] for g in which.tolist()], dtype=object)
        if aggregate == "max":
            indices = rules.topk.top(best, budget).numpy()
            gains = score[indices]
        else:
            indices, gains, turn = by_turns(by_group if aggregate == "groups" else scores, budget)
            names = groups if aggregate == "groups" else of
            why[indices] = [names[c] for c in turn]
        return Subset(
            indices=indices,
            gains=gains,
            notes={"influence": score, "score": score, "nearest_group": why},
        )

    def why(self, facts: Facts) -> str:
        backend, value = self.influence.backend, figure(facts.value or 0.0)
        group = facts.group if facts.group is not None else "the target"
        if backend not in ("less", "less-mean", "cosine"):
            return f"training on it helps {group}: influence {value} by {backend}"
        adam = backend != "cosine" if self.transform is None else self.transform == "adam"
        step = "optimiser step" if adam else "gradient"
        whom = "the mean gradient" if self._merged else "the gradients of the rows"
        if self.aggregate == "rows" and facts.gain is not None:
            whom = "the gradient of a row"
        over = (
            f", mean over {count(facts.checkpoints, 'checkpoint')}"
            if self.checkpoints == "mean" and facts.checkpoints
            else ""
        )
        return f"its {step} has a cosine of {value} with {whom} of {group}{over}"
