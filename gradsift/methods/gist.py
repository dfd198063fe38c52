"""GIST: cosine to the target inside the subspace that the target's own gradients span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Rows, Signal, Signals, Subset

if TYPE_CHECKING:
    from torch import Tensor

POOL, TARGET = Signal("rows"), Signal("rows", side="target")


@dataclass(frozen=True)
class Gist:
    """Rows whose plain gradient, seen only inside the target's gradient subspace, points the way of
    a target group's mean gradient.

    Source: arXiv 2602.18584 (ICML 2026): the strongest directions of the target's raw, uncentred
    gradients; pool gradients projected on them; cosine with each group's mean projected gradient; a
    row's best group counts. No optimiser state is needed, and one checkpoint. Cost: plain gradients
    of pool and target at the last checkpoint, then n x d x rank multiply-adds.

    rank: how many directions (no more than the target spans); variance: instead, the fewest that
    hold this share of the target's squared length (the paper finds 0.95 near rank 150). energy:
    weight each cosine by the share of the row's squared length inside the subspace.

    Differences from the paper: the gradients are random projections (the run's), which keep
    products up to noise. Without `energy`, as in the paper, what a row does outside the subspace is
    ignored, so a row with a tiny part inside can score 1. Differences from the released code:
    float32 instead of bfloat16 products; directions that are rounding are left out, where the code
    keeps them (target rows that nearly repeat each other, with rank above the number of different
    ones).
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    rank: PositiveInt = 150
    variance: Annotated[float, Field(gt=0, le=1)] | None = None
    energy: bool = False

    def needs(self) -> frozenset[Signal]:
        return frozenset({POOL, TARGET})

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        import torch

        from gradsift.methods.reading import whole
        from gradsift.rules.blocks import group_means

        target = whole(rules.blocks.Raw(signals[TARGET]))
        basis = self._basis(target)
        means, names = group_means(target.double(), signals.target_groups)
        inside = torch.nn.functional.normalize(means @ basis.double().T, dim=1).float()
        scores, share = _cosines(signals[POOL], basis, inside)
        best, which = (scores * share[:, None] if self.energy else scores).max(dim=1)
        indices = rules.topk.top(best, budget).numpy()
        gain = best.numpy()
        why = np.array([names[g] for g in which.tolist()], dtype=object)
        notes = {
            "score": gain,
            "influence": gain,
            "nearest_group": why,
            "energy": share.numpy(),
            "rank": len(basis),
        }
        if len(basis) == 1 and not self.energy:
            notes["note"] = (
                "the target spans one direction, in which every row scores +1 or -1; -o energy=true"
                " ranks them"
            )
        return Subset(indices=indices, gains=gain[indices], notes=notes)

    def _basis(self, target: Tensor) -> Tensor:
        """Orthonormal directions fp32 [r, d], strongest first."""
        if self.variance is not None:
            return rules.components.principal(
                target, self.variance, centred=False, orient=False
            ).directions
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        return rules.components.principal(
            target, 1.0, by="count", centred=False, orient=False
        ).directions[: self.rank]

    def why(self, facts: Facts) -> str:
        group = facts.group if facts.group is not None else "the target"
        inside = facts.notes.get("energy")
        part = "" if inside is None else f", where {inside:.1%} of its squared length lies"
        if self.energy:
            return (
                f"its gradient has {figure(facts.value or 0.0)} = cosine times share with the mean"
                f" gradient of {group} inside the target's subspace{part}"
            )
        return (
            f"its gradient has a cosine of {figure(facts.value or 0.0)} with the mean gradient of"
            f" {group} inside the target's subspace{part}"
        )


def _cosines(rows: Rows, basis: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [n, g] of the rows' parts inside the basis with `inside` [g, r], and those parts'
    shares [n] of the squared lengths.
    """
    import torch

    from gradsift.methods.reading import blocks

    scores, share = torch.zeros(rows.shape[0], len(inside)), torch.zeros(rows.shape[0])
    for start, block in blocks(rows):
        parts = (block @ basis.T.to(block.device)).cpu()
        where = slice(start, start + len(block))
        scores[where] = torch.nn.functional.normalize(parts, dim=1) @ inside.T
        share[where] = parts.square().sum(dim=1) / block.square().sum(dim=1).cpu().clamp_min(
            torch.finfo(torch.float32).tiny
        )
    return scores, share
