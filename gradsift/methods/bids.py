"""BIDS: raise the influence on whichever target row is served worst so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import Facts, Signal, Signals, Subset


@dataclass(frozen=True)
class Bids:
    """Rows that, one by one, exceed most what those chosen before offer to some target row:
    influence balanced over abilities.

    Source: arXiv 2501.12147 (Findings of EMNLP 2025), section 4, algorithm 1: influence on every
    target row (not group), each column brought to mean 0 and standard deviation 1 over the pool;
    then, again and again, the row with the largest max_j (Z_ij - mean of Z_j over the chosen).
    Cost: gradients of pool and target at one checkpoint, the n x m matrix in memory, then lazily
    evaluated picks.

    gain = that value when the row was picked; score = the same against the means at the end.

    `preset=plain`, the default, is ours: the influence is the cosine of plain gradients at the last
    checkpoint. `preset=paper` takes that of LESS, Adam directions at every checkpoint, which
    favours short answers and costs a pass over the pool for each (docs/methods.md).
    Differences from the paper in either: the standard deviation is over n - 1, the mean over no row
    is 0 and ties go to the lowest row, all of which it leaves open; constant columns are left out.
    Where the pool's rows are all alike, none is better than another: the first ones are taken, and
    a warning says so. `standardise=false` is its ablation; `backend=` takes another influence
    (docs/scores.md).
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    preset: Literal["plain", "paper"] = "plain"
    standardise: bool = True
    transform: Literal["adam", "none"] | None = None
    checkpoints: Literal["last", "mean"] | None = None
    backend: str | None = None

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.influence})

    @property
    def influence(self) -> Signal:
        plain = self.preset == "plain" and self.backend is None
        transform, checkpoints = ("none", "last") if plain else ("backend", "mean")
        return Signal(
            "influence",
            transform=self.transform or transform,
            checkpoints=self.checkpoints or checkpoints,
            backend=self.backend or "less",
        )

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        import torch

        from gradsift.methods.reading import finite

        scores = finite(signals, self.influence).float()
        if bool((scores == scores[:1]).all()):
            note = (
                "every pool row has the same influence on every target row: the first rows were"
                " taken"
            )
            return Subset(indices=np.arange(budget), notes={"note": note})
        picks = rules.balance.greedy(scores, budget, standardise=self.standardise)
        indices = picks.indices.numpy()
        columns = torch.nonzero(scores.amin(dim=0) < scores.amax(dim=0))[:, 0]
        values = scores[:, columns].double()
        if self.standardise:
            values = (values - values.mean(dim=0)) / values.std(dim=0)
        best, which = (values - values[picks.indices].mean(dim=0)).max(dim=1)
        groups = list(signals.target_groups) or ["target"] * scores.shape[1]
        if len(groups) > scores.shape[1]:
            # a backend that merges a group's rows has one column for each
            groups = list(dict.fromkeys(groups))
        notes = {
            "score": best.numpy(),
            "influence": scores.amax(dim=1).numpy(),
            "nearest_group": np.array([groups[j] for j in columns[which].tolist()], dtype=object),
        }
        return Subset(indices=indices, gains=picks.gains.double().numpy(), notes=notes)

    def why(self, facts: Facts) -> str:
        if facts.value is None:
            return "taken in the order of the file: every row has the same influence"
        unit = " standard deviations" if self.standardise else ""
        side = "above" if facts.value >= 0 else "below"
        said = f"{figure(abs(facts.value))}{unit} {side} the mean of"
        if facts.gain is not None:
            return f"its influence on one target row stood {said} the picks before it"
        whose = f"a row of {facts.group}" if facts.group is not None else "one target row"
        return f"its influence on {whose} is at best {said} the picks"
