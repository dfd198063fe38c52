"""G2IS: walk the graph of pool gradients along the directions of a target's gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from gradsift import rules
from gradsift.methods.words import figure
from gradsift.types import AdamForm, Facts, Rows, Signal, Signals, Subset, counted

if TYPE_CHECKING:
    from torch import Tensor

FLAT = 1e-6  # length of a mean of unit rows below which it is rounding
T = TypeVar("T")


@dataclass(frozen=True)
class G2is:
    """Rows that agree with each other and with the target's gradients, found by walking among
    neighbours.

    Source: arXiv 2502.11062 (ACL 2025), section 3 and appendix C. Each direction of the target gets
    seats by its share (largest remainder) and a walk through the graph of pool gradients that takes
    no row in conflict (negative product) with the walk so far, and keeps `consistency` of its
    alignment with the direction. Cost: gradients of the pool and the target at one checkpoint; the
    graph is n^2 d multiply-adds (`exact=false`: bfloat16 with re-rank); the walk tests each
    candidate against the walk so far. checkpoints: "last", or "mean" over all, weighted by learning
    rate (target rows at unit norm).

    core: "mean" = one direction for each target group, the mean of its unit rows, with equal seats;
    "principal" = the directions that hold `keep` (0.5) of the variance of all target rows, the
    paper's core knowledge; `keep`, `centred` and `orient` are of this core alone. Seats that a walk
    cannot fill go to the other walks (`redistribute`). What is open when all have ended goes to the
    rows of highest cosine with the groups' means, groups taking turns (mean), or of highest
    weighted product with the directions (principal); the report says how many. Plain rows are soon
    in conflict with one row of a long walk, so most of a large budget can be those.

    `preset=mean`, the default, is ours: core=mean, plain gradients of the pool as they are.
    Principal directions after the first are at a right angle to it; where the first is near the
    mean gradient, they are mostly contrasts within the target, and their walks can end among rows
    of other kinds (docs/methods.md). `preset=uncentred` is ours too: core=principal, Adam rows, but
    directions of the uncentred rows, since centring removes the mean gradient, which is the way the
    target's loss falls; they point the way of the target's mean; the pool's mean unit row is taken
    out of the pool (`remove_mean`), since Adam directions share their momentum and with it no two
    rows are ever in conflict; and seats are redistributed.

    `preset=paper` and `preset=released` are the published walk: directions by PCA (centred, signs
    as they fall), the pool as it is, no redistribution. They differ in the Adam rows alone: as the
    paper writes them (or as `[gradients] adam_form` says), and as the code forms them.

    Differences from the paper and from the released code: what the walks leave open is topped up
    here, and `neighbours` is a setting (the graph is an input to the code; the paper names no
    number). Whether the paper's target rows enter at
    unit length could not be read: they enter raw, as in the code.
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    preset: Literal["mean", "uncentred", "paper", "released"] = "mean"
    core: Literal["mean", "principal"] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    neighbours: NonNegativeInt = 50
    consistency: NonNegativeFloat = 0.8
    centred: bool | None = None
    orient: bool | None = None
    redistribute: bool | None = None
    remove_mean: bool | None = None
    exact: bool = True
    transform: Literal["adam", "none"] | None = None
    checkpoints: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        if self._by_mean and (
            given := [
                name for name in ("keep", "centred", "orient") if getattr(self, name) is not None
            ]
        ):
            raise ValueError(
                f"{given[0]} is of the principal directions: add core=principal, or"
                " preset=uncentred"
            )

    @property
    def _published(self) -> bool:
        return self.preset in ("paper", "released")

    @property
    def _by_mean(self) -> bool:
        return _set(self.core, "mean" if self.preset == "mean" else "principal") == "mean"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.pool_rows, self.target_rows})

    @property
    def pool_rows(self) -> Signal:
        transform = self.transform or ("none" if self.preset == "mean" else "adam")
        released = self.preset == "released" and transform == "adam"
        form: AdamForm | None = "released" if released else None
        return Signal("rows", transform=transform, checkpoints=self.checkpoints, adam_form=form)

    @property
    def target_rows(self) -> Signal:
        return Signal("rows", side="target", checkpoints=self.checkpoints)

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        import torch

        from gradsift.methods.reading import Centred, products

        rows: Rows = signals[self.pool_rows]
        rows = Centred(rows) if _set(self.remove_mean, self.preset == "uncentred") else rows
        core = self._core(signals)
        n = rows.shape[0]
        seats = rules.topk.apportion(budget, core.weights.tolist())
        k = min(self.neighbours, n - 1)
        graph = (
            rules.knn.graph(rows, k, exact=self.exact, map=signals.map)[0]
            if k > 0
            else torch.empty(n, 0, dtype=torch.int64)
        )
        redistribute = _set(self.redistribute, not self._published)
        found = rules.walk.gradient_walk(
            rows,
            core.directions,
            seats,
            graph,
            consistency=self.consistency,
            redistribute=redistribute,
        )
        along = products(rows, core.directions).double()
        score = along.amax(dim=1) if self._by_mean else along @ core.weights
        walked, component = found.indices.numpy(), found.component.numpy()
        more = (
            _by_fewest(along, walked, component, budget)
            if self._by_mean
            else _highest(score, walked, budget)
        )
        indices = np.concatenate([walked, more])
        origin = np.full(n, -1)
        origin[walked] = component
        notes = {
            "score": score.numpy(),
            "component": origin,
            "component_weights": core.weights.numpy(),
            "walked": len(found),
        }
        if not self.exact and k > 0:
            notes["neighbour_recall"] = rules.knn.recall(rows, graph, rng=np.random.default_rng(0))
        if len(found) < budget:
            notes["note"] = (
                f"the walks ended after {counted(len(found), 'row')}; the other"
                f" {budget - len(found):,} are"
                " those of highest "
                + (
                    "cosine with the mean of a target group"
                    if self._by_mean
                    else "weighted product with the target's directions"
                )
            )
        return Subset(indices=indices, gains=score.numpy()[indices], notes=notes)

    def _core(self, signals: Signals) -> rules.components.Components:
        """The directions to walk along, and their shares of the seats."""
        import torch

        from gradsift.methods.reading import whole
        from gradsift.rules.blocks import Unit, group_means

        rows: Rows = signals[self.target_rows]
        if not self._by_mean:
            centred, orient = (
                _set(self.centred, self._published),
                _set(self.orient, not self._published),
            )
            return rules.components.principal(
                rules.blocks.Raw(rows), _set(self.keep, 0.5), centred=centred, orient=orient
            )
        means, names = group_means(whole(Unit(rows)), signals.target_groups)
        lengths = means.norm(dim=1, keepdim=True)
        if not bool(torch.isfinite(lengths).all()):
            raise ValueError("target rows are NaN or infinite")
        if flat := [
            name
            for name, length in zip(names, lengths.flatten().tolist(), strict=True)
            if not length > FLAT
        ]:
            raise ValueError(
                f"the rows of target group {flat[0]!r} are zero or cancel: their mean has no"
                " direction; try core=principal"
            )
        return rules.components.Components(
            means / lengths, torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        )

    def why(self, facts: Facts) -> str:
        value = figure(facts.value or 0.0)
        seen = (
            f"its gradient has a cosine of {value} with the mean gradient of a target group"
            if self._by_mean
            else f"its weighted cosine with the target's principal directions is {value}"
        )
        if facts.rank is None:
            return seen
        walk = facts.notes.get("component", -1)
        how = (
            f"reached by the walk along direction {walk + 1} of the target"
            if walk >= 0
            else "taken after the walks had ended"
        )
        return f"{seen}; {how}"


def _set(given: T | None, preset: T) -> T:
    return preset if given is None else given


def _highest(score: Tensor, walked: np.ndarray, budget: int) -> np.ndarray:
    """The rows of highest score [n] that fill what the walks left of the budget."""
    import torch

    open_ = np.setdiff1d(np.arange(len(score)), walked)
    return open_[rules.topk.top(score[torch.as_tensor(open_)], budget - len(walked)).numpy()]


def _by_fewest(along: Tensor, walked: np.ndarray, component: np.ndarray, budget: int) -> np.ndarray:
    """Rows that fill what the walks left: again and again the group with fewest rows takes its best
    one, of along [n, groups].
    """
    counts, used = np.bincount(component, minlength=along.shape[1]), set(walked.tolist())
    queues = [
        iter(column.sort(descending=True, stable=True).indices.tolist()) for column in along.T
    ]
    picks: list[int] = []
    while len(used) < budget:
        group = int(counts.argmin())
        picks.append(next(row for row in queues[group] if row not in used))
        used.add(picks[-1])
        counts[group] += 1
    return np.array(picks, dtype=np.int64)
