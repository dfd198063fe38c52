"""GRAD-MATCH: few weighted rows whose gradients sum to the mean gradient of the pool, or of a
target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Rows, Signal, Signals, Subset, counted

TARGET = Signal("rows", side="target")


@dataclass(frozen=True)
class Gradmatch:
    """Weighted rows whose gradients together reproduce the mean gradient of the pool, or of the
    target where one is given.

    Source: arXiv 2103.00123 (ICML 2021), section 3.2: orthogonal matching pursuit with non-negative
    coefficients. Weights are the coefficients x of sum_i x_i g_i = mean gradient; they are written
    to `weights.jsonl`. Cost: plain gradients at the last checkpoint; one pass over the rows per
    pick, and k^2 d for k picks.

    Matching may end before the budget (the mean is reproduced to `tol`, or no row points its way).
    Then `refill` completes the budget: "repeat" matches the same mean with the rows left and, when
    none fits, takes those of highest product with it; "random" draws. Such a row gets weight 1 / n,
    its own in the pool's mean, and a warning says how many they are.

    Differences from the paper: gradients are brought to unit length first, on both sides; as they
    are (`normalise=false`), answers of a few tokens have by far the largest ones and take nearly
    the whole budget. One choice instead of one every few epochs of training; gradients of the
    adapter (randomly projected) instead of the last layer's; all rows at once instead of per class
    or batch. Differences from the released code (`preset=released`: lengths kept, a second pick of
    an atom ends the matching, refill at random): the answer is always a completed solve, and a
    filled row weighs 1 / n against the mean where the code has 1 against the sum. ridge is 0, as
    its CPU path and its per-batch settings have it; its per-class settings have 0.5
    (`-o ridge=0.5`). With a ridge its GPU path does not end at a second pick: the presets follow
    the CPU path.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "optional"
    preset: Literal["paper", "released"] = "paper"
    ridge: NonNegativeFloat = 0.0
    tol: NonNegativeFloat = 1e-4
    refill: Literal["repeat", "random"] | None = None
    normalise: bool | None = None
    transform: Literal["none", "adam"] = "none"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.rows, TARGET})

    @property
    def rows(self) -> Signal:
        return Signal("rows", transform=self.transform)

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        import torch

        from gradsift.methods.reading import blocks, mean
        from gradsift.rules.blocks import Unit

        unit = self.normalise if self.normalise is not None else self.preset == "paper"
        form = Unit if unit else rules.blocks.Raw
        atoms: Rows = form(signals[self.rows])
        goal = mean(form(signals[TARGET]) if TARGET in signals.values else atoms)
        n = atoms.shape[0]
        refill = self.refill or ("random" if self.preset == "released" else "repeat")
        on_repeat = "stop" if self.preset == "released" else "mask"
        found = rules.omp.match(
            atoms, goal, budget, ridge=self.ridge, on_repeat=on_repeat, tol=self.tol
        )
        indices = found.indices.numpy()
        score = torch.cat(
            [(block.double() @ goal.to(block.device)).cpu() for _, block in blocks(atoms)]
        ).numpy()
        if len(found) < budget:
            filled = rules.omp.fill(
                atoms,
                goal,
                budget,
                refill=refill,
                rng=rng,
                found=found,
                ridge=self.ridge,
                on_repeat=on_repeat,
                tol=self.tol,
            )
            left = np.setdiff1d(np.arange(n), filled.numpy())
            last = left[rules.topk.top(score[left], budget - len(filled)).numpy()]
            indices = np.concatenate([filled.numpy(), last])
        weights = np.concatenate([found.coefficients.numpy(), np.full(budget - len(found), 1 / n)])
        error = float(found.residual_norms[-1] / goal.norm()) if len(found.residual_norms) else 1.0
        notes = {"score": score, "influence": score, "residual": error, "matched": len(found)}
        if len(found) < budget:
            notes["note"] = (
                f"matching ended after {counted(len(found), 'row')} ({100 * error:.1f} % of the"
                " mean"
                f" gradient unexplained); the other {budget - len(found):,} were filled in with"
                " weight 1/n"
            )
        return Subset(indices=indices, gains=score[indices], weights=weights, notes=notes)

    def why(self, facts: Facts) -> str:
        whose = "target" if facts.target_rows else "pool"
        weight = "" if facts.weight is None else f"; it weighs {figure(facts.weight)} in the match"
        return (
            f"the product of its gradient with the {whose}'s mean gradient is"
            f" {figure(facts.value or 0.0)}{weight}"
        )
