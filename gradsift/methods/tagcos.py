"""TAGCOS: cluster the pool's gradients, then match each cluster's mean with few rows. No target."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import AdamForm, Facts, Rows, Signal, Signals, Subset, counted

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ROWS = 4  # of a cluster, on average: the mean of fewer is hardly a direction of its own


@dataclass(frozen=True)
class Tagcos:
    """Rows whose non-negative combinations reproduce the mean gradient of each gradient cluster.

    Source: arXiv 2407.15235 (Findings of NAACL 2025), section 3: features = Adam directions at each
    checkpoint, unit, averaged with the checkpoints' mean learning rates (not re-normalised);
    k-means; orthogonal matching pursuit of every cluster's centroid. Cost: gradients of the pool at
    every checkpoint; k-means is clusters x n x d per step; matching one pass over a cluster per
    pick.

    weights: keep the matching's coefficients as training weights, in `weights.jsonl`: x_i of a
    cluster's match times the cluster's share of the pool, so that the weighted rows sum to the
    pool's mean feature (`cosine=true`: to the clusters' directions, by their shares); a row that a
    repeated match or the fill added weighs 1 / n, its own in that mean, and a note says how many
    did. By default coefficients are dropped, as in the released code.

    clusters: with `fill=nearest` at most as many as there are rows to choose, and one for every
    four rows; where that is fewer, the report and the plan say so.

    fill: "nearest" = cluster budgets by largest remainder, so that they sum to the budget, and rows
    nearest to the centroid complete a share that matching leaves open; "none" = every cluster's
    size times the share, rounded down (5% is 0.05 of each; a budget of rows is that many of the
    pool's), and open seats left open, so that fewer rows than asked may come back: the report says
    how many the clusters were to give and how many matched.

    Differences from the paper (`preset=paper`, the default: `fill=nearest`; ridge 0, a repeated
    atom is masked, matching repeated on what is left of a cluster until its share is spent): its
    full text was not at hand; the ridge and what it does with a repeated atom could not be
    verified. Differences from the released code (`preset=released`: Adam rows in the code's form,
    ridge 1 from the second atom on, a repeated atom ends a call, `fill=none`): a cluster of which
    no row left points toward the centroid gives fewer rows than its share; the code first takes
    rows of negative product, and then calls the matching again without end. Clusters too small for
    a seat give no row, as there. In both: k-means is our own (greedy k-means++, Lloyd; the code has
    scikit-learn's), and gradients are projected by a count sketch where the code has dense random
    signs.
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
    fill: Literal["nearest", "none"] | None = None
    weights: bool = False
    tol: NonNegativeFloat = 1e-4
    transform: Literal["adam", "none"] = "adam"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.rows})

    @property
    def rows(self) -> Signal:
        released = self.preset == "released" and self.transform == "adam"
        form: AdamForm | None = "released" if released else None
        return Signal("rows", transform=self.transform, checkpoints="mean", adam_form=form)

    @property
    def exact(self) -> bool:
        """Whether the budget is met to the row."""
        return (self.fill or ("none" if self.preset == "released" else "nearest")) == "nearest"

    def settled(self, n: int, budget: int) -> int:
        """How many clusters n rows are put into for a budget: no more than there are rows to
        choose, and four rows in each on average. Where shares are rounded down, as in the released
        code, as many as asked.
        """
        if not self.exact:
            return min(self.clusters, n)
        return max(1, min(self.clusters, budget, n // LEAST_ROWS))

    def notices(self, n: int, budget: int) -> list[str]:
        """What there is to say before n rows are clustered."""
        settled = self.settled(n, budget)
        if settled == self.clusters or not self.exact:
            return []
        why = (
            f"no more than the {counted(budget, 'row')} to choose"
            if settled == budget
            else f"{counted(n, 'row fills', 'rows fill')} no more, {LEAST_ROWS} in each on average"
        )
        return [f"{counted(settled, 'cluster')} in place of {self.clusters:,}: {why}"]

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        rows: Rows = signals[self.rows]
        n = rows.shape[0]
        found = rules.kmeans.fit(
            rows,
            self.settled(n, budget),
            rng=rng,
            cosine=self.cosine,
            iterations=self.iterations,
            restarts=self.restarts,
            map=signals.map,
        )
        labels = np.asarray(found.labels)
        sizes = np.bincount(labels, minlength=len(found.centres))
        share = Fraction(budget, n) if signals.share is None else signals.share
        floors = np.array([int(share * size) for size in sizes.tolist()])
        seats = (
            np.asarray(rules.topk.apportion(budget, sizes, capacity=sizes))
            if self.exact
            else floors
        )
        draws = rng if self.refill == "random" else None

        def match(c: int) -> _ClusterPicks:
            return self._match(
                rows, np.flatnonzero(labels == c), found.centres[c], int(seats[c]), draws
            )

        # One generator serves the clusters in turn, so draws are not for other processes.
        picks: list[_ClusterPicks] = list(
            (map if self.refill == "random" else signals.map)(match, range(len(sizes)))
        )
        order = sorted(
            (rank, c) for c, chosen in enumerate(picks) for rank in range(len(chosen.members))
        )
        matched = sum(len(chosen.coefficients) for chosen in picks)
        notes: dict[str, Any] = {
            "score": self._agreement(rows, labels, found.centres),
            "cluster": labels,
            "objective": found.objective,
        }
        notes["centroid_norms"] = np.array([float(centre.norm()) for centre in found.centres])
        notes |= {"seats": int(seats.sum()), "matched": matched}
        told = self.notices(n, budget)
        told += [lopsided(sizes)] if 2 * sizes.max() > n and len(sizes) > 2 else []
        told += self._counts(budget, int(seats.sum()), len(order), matched)
        return Subset(
            indices=np.array([picks[c].members[rank] for rank, c in order], dtype=np.int64),
            gains=np.array([picks[c].gains[rank] for rank, c in order]),
            weights=(
                np.array([picks[c].weight(rank, n) for rank, c in order]) if self.weights else None
            ),
            notes=notes | ({"note": "; ".join(told)} if told else {}),
        )

    def _counts(self, budget: int, seats: int, given: int, matched: int) -> list[str]:
        """What to say of rows asked for and given, and of weights that are no coefficients."""
        told = []
        if given < budget:
            why = (
                f"the clusters' budgets, each rounded down, ask for {seats:,} of {budget:,} rows"
                if seats < budget
                else ""
            )
            open_ = (
                f"matching left {seats - given:,} of {seats:,} seats open" if given < seats else ""
            )
            told.append(
                f"{'; '.join(filter(None, (why, open_)))}: -o fill=nearest meets the budget"
            )
        if self.weights and matched < given:
            told.append(
                f"{given - matched:,} of {given:,} rows are no atom of a cluster's first match and"
                " weigh 1/n"
            )
        return told

    def _agreement(self, rows: Rows, labels: np.ndarray, centres: Tensor) -> np.ndarray:
        """[n], product of every row with its own centroid: what the report draws; matching decides
        by more than this.
        """
        import torch

        from gradsift.methods.reading import blocks

        score = np.empty(rows.shape[0])
        for start, block in blocks(rows):
            block = torch.nn.functional.normalize(block, dim=1) if self.cosine else block
            own = centres[torch.as_tensor(labels[start : start + len(block)])].to(block.device)
            score[start : start + len(block)] = (block * own).sum(dim=1).cpu().numpy()
        return score

    def _match(
        self,
        rows: Rows,
        members: np.ndarray,
        centre: Tensor,
        seats: int,
        rng: np.random.Generator | None,
    ) -> _ClusterPicks:
        """One cluster's picks. Its rows are read once, and no other."""
        if seats == 0:
            return _ClusterPicks(
                np.empty(0, dtype=np.int64), np.empty(0), np.empty(0), len(members)
            )
        import torch

        atoms = rules.blocks.gather(rows, torch.as_tensor(members)).float()
        atoms = torch.nn.functional.normalize(atoms, dim=1) if self.cosine else atoms
        centre = centre.to(atoms.device)
        options: dict[str, Any] = {
            "ridge": self.ridge if self.ridge is not None else float(self.preset == "released"),
            "on_repeat": self.on_repeat or ("stop" if self.preset == "released" else "mask"),
            "tol": self.tol,
        }
        found = rules.omp.match(atoms, centre, seats, **options)
        chosen = found.indices.numpy()
        if 0 < len(found) < seats or (self.refill == "random" and not len(found)):
            chosen = rules.omp.fill(
                atoms, centre, seats, refill=self.refill, rng=rng, found=found, **options
            ).numpy()
        if len(chosen) < seats and self.exact:
            # Rows that point away from the centroid are never matched; the closest of them complete
            # the cluster's share.
            left = np.setdiff1d(np.arange(len(members)), chosen)
            agreement = (atoms[torch.as_tensor(left, device=atoms.device)] @ centre).cpu().numpy()
            chosen = np.concatenate(
                [chosen, left[rules.topk.top(agreement, seats - len(chosen)).numpy()]]
            )
        gains = (atoms[torch.as_tensor(chosen, device=atoms.device)] @ centre).cpu().numpy()
        return _ClusterPicks(members[chosen], gains, found.coefficients.numpy(), len(members))

    def why(self, facts: Facts) -> str:
        cluster = facts.notes.get("cluster", -1)
        whose = f"its cluster {cluster}" if cluster >= 0 else "its cluster"
        return (
            "the product of its gradient with the mean gradient of"
            f" {whose} is {figure(facts.value or 0.0)}"
        )


@dataclass(frozen=True)
class _ClusterPicks:
    """A cluster's picks in pick order: pool indices `members` [k], products with the centroid
    `gains` [k], and the `coefficients` [<= k] of its first match, whose atoms come first. `size`:
    rows of the cluster.
    """

    members: np.ndarray
    gains: np.ndarray
    coefficients: np.ndarray
    size: int

    def weight(self, rank: int, n: int) -> float:
        """The training weight of a pick: its part in the mean of all n rows."""
        return (
            float(self.coefficients[rank]) * self.size / n
            if rank < len(self.coefficients)
            else 1 / n
        )


def lopsided(sizes: np.ndarray) -> str:
    """What to say where one cluster holds most of the rows: matching in it takes odd rows, often
    those of short answers.
    """
    fewer = "fewer (-o clusters=20)" if len(sizes) > 20 else "fewer clusters"
    return (
        f"one gradient cluster holds {sizes.max():,} of {sizes.sum():,} rows and"
        f" {int((sizes == 1).sum()):,} of {len(sizes):,} clusters a single row: for a pool of this"
        f" size try {fewer}, and look at the lengths of the picks"
    )
