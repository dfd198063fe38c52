"""TAGCOS: cluster the pool's gradients, then match each cluster's mean with few rows. No target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gradsift.rules import kmeans, omp, topk
from gradsift.types import Rows, Signal, Signals, Subset


@dataclass(frozen=True)
class Tagcos:
    """Rows whose non-negative combinations reproduce the mean gradient of each gradient cluster.

    Source: arXiv 2407.15235 (Findings of NAACL 2025), section 3: features = Adam directions at each checkpoint, unit, averaged with the
    checkpoints' mean learning rates (not re-normalised); k-means; orthogonal matching pursuit of every cluster's centroid.
    Cost: gradients of the pool at every checkpoint; k-means is clusters x n x d per step; matching one pass over a cluster per pick.

    Differences from the paper (`preset=paper`, the default): none known; ridge 0, a repeated atom is masked, cluster budgets by largest
    remainder so that they sum to the budget, matching repeated on what is left of a cluster until its share is spent.
    Differences from the released code (`preset=released`): ridge 1 from the second atom on, a repeated atom ends a call, cluster budgets
    floored (small clusters get none, so fewer rows than asked come back). Both drop the coefficients, as the code does.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "none"
    preset: Literal["paper", "released"] = "paper"
    clusters: PositiveInt = 100
    cosine: bool = False
    iterations: PositiveInt = 25
    restarts: PositiveInt = 1
    ridge: NonNegativeFloat | None = None
    on_repeat: Literal["mask", "stop"] | None = None
    refill: Literal["repeat", "random", "none"] = "repeat"
    tol: NonNegativeFloat = 1e-4
    transform: Literal["adam", "none"] = "adam"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.rows})

    @property
    def rows(self) -> Signal:
        return Signal("rows", transform=self.transform, checkpoints="mean")

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        rows: Rows = signals[self.rows]
        n = rows.shape[0]
        found = kmeans.fit(
            rows, min(self.clusters, n), rng=rng, cosine=self.cosine, iterations=self.iterations, restarts=self.restarts, map=signals.map
        )
        labels = np.asarray(found.labels)
        sizes = np.bincount(labels, minlength=len(found.centres))
        if self.preset == "released":
            seats = np.floor(budget / n * sizes + 1e-9).astype(int)
        else:
            seats = np.asarray(topk.apportion(budget, sizes, capacity=sizes))
        draws = rng if self.refill == "random" else None

        def match(c: int) -> tuple[np.ndarray, np.ndarray]:
            return self._match(rows, np.flatnonzero(labels == c), found.centres[c], int(seats[c]), draws)

        # One generator serves the clusters in turn, so draws are not for other processes.
        picks = list((map if self.refill == "random" else signals.map)(match, range(len(sizes))))
        order = sorted((rank, c) for c, (chosen, _) in enumerate(picks) for rank in range(len(chosen)))
        norms = np.array([float(centre.norm()) for centre in found.centres])
        notes = {"note": lopsided(sizes)} if 2 * sizes.max() > n and len(sizes) > 2 else {}
        return Subset(
            indices=np.array([picks[c][0][rank] for rank, c in order], dtype=np.int64),
            gains=np.array([picks[c][1][rank] for rank, c in order]),
            notes={
                "score": self._agreement(rows, labels, found.centres),
                "cluster": labels,
                "centroid_norms": norms,
                "objective": found.objective,
                **notes,
            },
        )

    def _agreement(self, rows: Rows, labels: np.ndarray, centres: Tensor) -> np.ndarray:
        """[n], product of every row with its own centroid: what the report draws; matching decides by more than this."""
        score = np.empty(rows.shape[0])
        for start in range(0, len(score), 2048):
            block = rows[start : min(start + 2048, len(score))].float()
            block = torch.nn.functional.normalize(block, dim=1) if self.cosine else block
            score[start : start + len(block)] = (block * centres[torch.as_tensor(labels[start : start + len(block)])]).sum(dim=1).numpy()
        return score

    def _match(
        self, rows: Rows, members: np.ndarray, centre: Tensor, seats: int, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices of one cluster's picks, in pick order, and their product with the centroid."""
        if seats == 0:
            return np.empty(0, dtype=np.int64), np.empty(0)
        atoms = _gather(rows, members, normalise=self.cosine)
        chosen = omp.fill(
            atoms,
            centre,
            seats,
            refill=self.refill,
            rng=rng,
            ridge=self.ridge if self.ridge is not None else float(self.preset == "released"),
            on_repeat=self.on_repeat or ("stop" if self.preset == "released" else "mask"),
            tol=self.tol,
        )
        chosen = np.asarray(chosen, dtype=np.int64)
        if len(chosen) < seats and self.preset == "paper" and self.refill == "repeat":
            # Rows that point away from the centroid are never matched; the closest of them complete the cluster's share.
            left = np.setdiff1d(np.arange(len(members)), chosen)
            agreement = (atoms[left] @ centre).numpy()
            chosen = np.concatenate([chosen, left[topk.top(agreement, seats - len(chosen)).numpy()]])
        return members[chosen], (atoms[chosen] @ centre).numpy()


def lopsided(sizes: np.ndarray) -> str:
    """What to say where one cluster holds most of the rows: matching in it takes odd rows, often those of short answers."""
    return (
        f"one gradient cluster holds {sizes.max():,} of {sizes.sum():,} rows and {int((sizes == 1).sum()):,} of {len(sizes):,} clusters "
        "a single row: for a pool of this size try fewer (-o clusters=20), and look at the lengths of the picks"
    )


def _gather(rows: Rows, members: np.ndarray, *, normalise: bool) -> Tensor:
    """fp32 copy of some rows, read in runs of neighbouring blocks so that a store is never held whole."""
    if isinstance(rows, Tensor):
        atoms = rows[torch.as_tensor(members)].float()
    else:
        atoms = torch.empty(len(members), rows.shape[1])
        for start in range(0, rows.shape[0], 2048):
            here = np.flatnonzero((members >= start) & (members < start + 2048))
            if len(here):
                block = rows[start : min(start + 2048, rows.shape[0])]
                atoms[torch.as_tensor(here)] = block[torch.as_tensor(members[here] - start)].float()
    return torch.nn.functional.normalize(atoms, dim=1) if normalise else atoms
