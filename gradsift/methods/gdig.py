"""G-DIG: rows that help every trusted example, spread over gradient clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from gradsift import rules
from gradsift.methods.words import count, figure
from gradsift.types import Facts, Rows, Signal, Signals, Subset, counted

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gdig:
    """Rows whose influence on every trusted example (the target) is positive, drawn evenly from
    clusters of their gradients.

    Source: arXiv 2405.12915 (ACL 2024), section 3 and equation 4: influence = <gradient of the row,
    inverse curvature x gradient of the trusted example>, kept if it helps all of them, then k-means
    of the gradients and even resampling. Positive = training on the row lowers the trusted
    example's loss (the paper's sign, reversed). Cost: two passes over `curvature.fit_rows` rows for
    the curvature, one over the pool for influence and one for the stored rows that are clustered;
    k-means is clusters x rows x d per step.

    Where fewer rows than the budget help all trusted examples, the share of these that must be
    helped is lowered to the largest one that leaves enough rows (`fill=none`: fewer come back
    instead, and where none helps all of them that is an error). Both counts and the share stand in
    the report.

    Differences from the paper: curvature is EK-FAC of LoRA or linear layers at the warm-up's last
    checkpoint; the paper fine-tunes the whole model on the pool and takes K-FAC (`backend=kfac`).
    Clusters are those of the projected rows, at their own length or with `cosine=true` at unit
    length, projected once more to `dim` numbers (`dim=0`: as they are stored). 512 clusters and 400
    numbers are from memory of the paper; there are as many clusters as rows at most. Differences
    from the released code: `preset=released` ranks by the mean score over trusted examples taken
    two at a time, K-FAC with summed tokens, factored damping 0.5 and rank 32, and neither filters
    nor clusters, as the code does. Padding is masked here; biases are left out of factors and
    products, where the code has them; the pool's gradients stay whole, where the code compresses
    them to rank 32 as the target's. The code reads one matrix of the MLP in ten blocks: those
    layers are `[gradients] modules` of recipes/gdig-released.toml.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    preset: Literal["paper", "released"] = "paper"
    backend: str | None = None
    clusters: PositiveInt = 512
    dim: NonNegativeInt = 400
    cosine: bool = False
    iterations: PositiveInt = 25
    restarts: PositiveInt = 1
    fill: Literal["quantile", "none"] = "quantile"

    def needs(self) -> frozenset[Signal]:
        return (
            frozenset({self.influence})
            if self.preset == "released"
            else frozenset({self.influence, Signal("rows")})
        )

    @property
    def influence(self) -> Signal:
        backend = self.backend or ("kfac-released" if self.preset == "released" else "ekfac")
        return Signal("influence", transform="backend", backend=backend)

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        from gradsift.methods.reading import finite

        scores = finite(signals, self.influence).float().cpu()
        mean = scores.double().mean(dim=1).numpy()
        if self.preset == "released":
            indices = rules.topk.top(mean, budget).numpy()
            return Subset(indices, gains=mean[indices], notes={"score": mean, "influence": mean})
        helped = (scores > 0).sum(dim=1).numpy()
        least = (
            scores.shape[1] if self.fill == "none" else threshold(helped, scores.shape[1], budget)
        )
        good = np.flatnonzero(helped >= least)
        if not len(good):
            raise ValueError(
                f"no row helps all {scores.shape[1]:,} target rows (the most that one helps is"
                f" {int(helped.max()):,}); fill=quantile takes those that help the most of them"
            )
        notes = self._counts(helped, least, scores.shape[1])
        labels = np.full(signals.n, -1, dtype=np.int64)
        rows = PickedRows(signals[Signal("rows")], good, raw=not self.cosine, dim=self.dim)
        labels[good] = rules.kmeans.fit(
            rows,
            min(self.clusters, len(good)),
            rng=rng,
            cosine=self.cosine,
            iterations=self.iterations,
            restarts=self.restarts,
        ).labels.numpy()
        picks = resample(labels, min(budget, len(good)), rng)
        if len(picks) < budget:
            notes["note"] = (
                f"{len(good):,} rows help all {scores.shape[1]:,} trusted examples, fewer than the"
                f" budget of {budget:,}: -o fill=quantile meets it"
            )
        return Subset(
            picks,
            gains=mean[picks],
            notes={"score": mean, "influence": mean, "cluster": labels, **notes},
        )

    def _counts(self, helped: np.ndarray, least: int, m: int) -> dict[str, Any]:
        every, kept = int((helped == m).sum()), int((helped >= least).sum())
        notes: dict[str, Any] = {
            "helps_every_target": every,
            "survivors": kept,
            "quantile": least / m,
        }
        if least < m:
            notes["note"] = (
                f"{counted(every, 'row helps', 'rows help')} all {counted(m, 'trusted example')},"
                " fewer than the budget: the"
                f" {counted(kept, 'row that helps', 'rows that help')} at least {least:,} of them"
                f" ({least / m:.1%}) were"
                " clustered"
            )
            if none := int((helped == 0).sum()) if least == 0 else 0:
                notes["note"] += f"; {none:,} of these help none"
        return notes

    def why(self, facts: Facts) -> str:
        value = facts.value or 0.0
        verb = "lowers" if value >= 0 else "raises"
        rows = count(facts.target_rows, "trusted row")
        said = (
            f"training on it {verb} the loss of your {rows}: influence {figure(value)} in the mean"
        )
        cluster = facts.notes.get("cluster", -1)
        drawn = f"; drawn from gradient cluster {cluster}" if cluster >= 0 else ""
        return said + (drawn if facts.rank is not None else "")


def threshold(helped: np.ndarray, m: int, budget: int) -> int:
    """The largest number of trusted examples, of m, that at least `budget` rows help; `helped` [n]:
    how many each row does.
    """
    return m if int((helped == m).sum()) >= budget else int(np.sort(helped)[::-1][budget - 1])


def resample(labels: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """`budget` rows, the same number from each cluster as far as it goes, drawn at random within;
    clusters take turns. -1 = in none.
    """
    sizes = np.bincount(labels[labels >= 0])
    seats = rules.topk.apportion(budget, [1] * len(sizes), capacity=sizes)
    drawn = [rng.permutation(np.flatnonzero(labels == c))[: seats[c]] for c in range(len(sizes))]
    order = sorted((rank, c) for c, rows in enumerate(drawn) for rank in range(len(rows)))
    return np.array([drawn[c][rank] for rank, c in order], dtype=np.int64)


class PickedRows:
    """Some of the rows, at the length their gradients have or as they are stored, projected once
    more to `dim` numbers where they have more: by dense signs over sqrt(dim), the same for every
    run.
    """

    def __init__(self, rows: Rows, indices: np.ndarray, *, raw: bool, dim: int) -> None:
        import torch

        self.rows, d = rules.blocks.Raw(rows) if raw else rows, rows.shape[1]
        self.signs = rules.blocks.signs(d, dim) if 0 < dim < d else None
        self.indices, self.shape = (
            torch.as_tensor(indices),
            (len(indices), d if self.signs is None else self.signs.shape[1]),
        )

    def __getitem__(self, where: slice) -> Tensor:
        rows = rules.blocks.gather(self.rows, self.indices[where])
        return rows if self.signs is None else rows.float() @ self.signs.to(rows.device)
