"""G2IS: walk the graph of pool gradients along the directions of a target's gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor

from gradsift.methods.reading import Centred, Raw, Unit, group_means, products, whole
from gradsift.rules import components, knn, topk, walk
from gradsift.types import Rows, Signal, Signals, Subset

FLAT = 1e-6  # length of a mean of unit rows below which it is rounding
T = TypeVar("T")


@dataclass(frozen=True)
class G2is:
    """Rows that agree with each other and with the target's gradients, found by walking among neighbours.

    Source: arXiv 2502.11062 (ACL 2025), section 3 and appendix C. Each direction of the target gets seats by its share (largest remainder)
    and a walk through the graph of pool gradients that takes no row in conflict (negative product) with the walk so far, and keeps
    `consistency` of its alignment with the direction.
    Cost: gradients of the pool and the target at one checkpoint; the graph is n^2 d multiply-adds (`exact=false`: bfloat16 with re-rank);
    the walk tests each candidate against the walk so far. checkpoints: "last", or "mean" over all, weighted by learning rate (target rows
    at unit norm).

    core: "mean" = one direction for each target group, the mean of its unit rows, with equal seats; "principal" = the directions that hold
    `keep` of the variance of all target rows (the paper's core knowledge).

    `preset=mean`, the default, is ours: core=mean, plain gradients of the pool as they are. The paper's directions after the first are
    contrasts within the target, at a right angle to the way its loss falls, and their walks end among rows of other kinds; Adam directions
    lead from long answers to one-word ones (docs/methods.md has the measurement).
    Differences from the paper in `preset=paper` (core=principal, Adam directions of the pool): the directions are those of the uncentred
    rows, since centring removes the mean gradient, which is the way the target's loss falls; they point the way of the target's mean; the
    pool's mean unit row is taken out of the pool (`remove_mean`), since Adam directions share their momentum and with it no two rows are
    ever in conflict; seats that a walk cannot fill go to the others, and what is still open after that to the rows of highest weighted
    product with the directions (a warning says how many).
    Differences from the released code (`preset=released`: centred, signs as they fall, pool as it is, no redistribution): what its walks
    leave open is topped up here, and `neighbours` is a setting (the graph is an input there).
    """

    target: ClassVar[Literal["required", "optional", "none"]] = "required"
    preset: Literal["mean", "paper", "released"] = "mean"
    core: Literal["mean", "principal"] | None = None
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    neighbours: NonNegativeInt = 50
    consistency: NonNegativeFloat = 0.8
    centred: bool | None = None
    orient: bool | None = None
    redistribute: bool | None = None
    remove_mean: bool | None = None
    exact: bool = True
    transform: Literal["adam", "none"] | None = None
    checkpoints: Literal["last", "mean"] = "last"

    def needs(self) -> frozenset[Signal]:
        return frozenset({self.pool_rows, self.target_rows})

    @property
    def pool_rows(self) -> Signal:
        transform = self.transform or ("none" if self.preset == "mean" else "adam")
        return Signal("rows", transform=transform, checkpoints=self.checkpoints)

    @property
    def target_rows(self) -> Signal:
        return Signal("rows", side="target", checkpoints=self.checkpoints)

    def select(self, signals: Signals, budget: int, *, rng: np.random.Generator) -> Subset:
        rows: Rows = signals[self.pool_rows]
        rows = Centred(rows) if _set(self.remove_mean, self.preset == "paper") else rows
        core = self._core(signals)
        n = rows.shape[0]
        seats = topk.apportion(budget, core.weights.tolist())
        k = min(self.neighbours, n - 1)
        graph = knn.graph(rows, k, exact=self.exact, map=signals.map)[0] if k > 0 else torch.empty(n, 0, dtype=torch.int64)
        redistribute = _set(self.redistribute, self.preset != "released")
        found = walk.gradient_walk(rows, core.directions, seats, graph, consistency=self.consistency, redistribute=redistribute)
        score = products(rows, core.directions).double() @ core.weights
        indices = _topped_up(found.indices, score, budget)
        origin = np.full(n, -1)
        origin[found.indices.numpy()] = found.component.numpy()
        notes = {"score": score.numpy(), "component": origin, "component_weights": core.weights.numpy(), "walked": len(found)}
        if not self.exact and k > 0:
            notes["neighbour_recall"] = knn.recall(rows, graph, rng=np.random.default_rng(0))
        if len(found) < budget:
            notes["note"] = (
                f"the walks ended after {len(found):,} rows; the other {budget - len(found):,} are those of highest weighted product "
                "with the target's directions"
            )
        return Subset(indices=indices, gains=score.numpy()[indices], notes=notes)

    def _core(self, signals: Signals) -> components.Components:
        """The directions to walk along, and their shares of the seats."""
        rows: Rows = signals[self.target_rows]
        if _set(self.core, "mean" if self.preset == "mean" else "principal") == "principal":
            centred, orient = _set(self.centred, self.preset == "released"), _set(self.orient, self.preset != "released")
            return components.principal(Raw(rows), self.keep, centred=centred, orient=orient)
        means, names = group_means(whole(Unit(rows)), signals.target_groups)
        lengths = means.norm(dim=1, keepdim=True)
        if flat := [name for name, length in zip(names, lengths.flatten().tolist(), strict=True) if not length > FLAT]:
            raise ValueError(
                f"the gradients of target group {flat[0]!r} cancel: their mean has no direction; core=principal has no need of one"
            )
        return components.Components(means / lengths, torch.full((len(names),), 1 / len(names), dtype=torch.float64))


def _set(given: T | None, preset: T) -> T:
    return preset if given is None else given


def _topped_up(walked: Tensor, score: Tensor, budget: int) -> np.ndarray:
    open_ = np.setdiff1d(np.arange(len(score)), walked.numpy())
    more = topk.top(score[torch.as_tensor(open_)], budget - len(walked)).numpy()
    return np.concatenate([walked.numpy(), open_[more]])
