"""k-means (and its cosine form) over rows that need not fit in memory.

Two parts. A *rehearsal* finds the start: seeds by greedy k-means++ (Arthur & Vassilvitskii 2007,
with 2 + log k draws per centre), improved by local search (Lattanzi & Sohler 2019: swap a seed for
a row drawn by squared distance where that lowers the total), then Lloyd steps. It runs on a sketch
of the rows: at most SAMPLE rows per cluster and SKETCH columns (a count-sketch with random signs
and offsets: inner products kept in expectation), so that the seeds, which decide the objective, and
`restarts` cost little. Squared distances draw long rows as seeds, and a short seed then takes in
every row that is near none: where norms differ, a second start comes from the clusters of the unit
rows, and the better of the two goes on.

Then Lloyd steps on all rows in full, from the clusters of the rehearsal. Each is one product with
the centres per block; the centre sums are moved only by the rows whose label changed.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .blocks import Rows, check_finite, check_rng, floating, read, sizes, spans, unit

SKETCH = 512  # columns of the rehearsal
# rows of the rehearsal: per cluster, and bounds on all of them
SAMPLE, SAMPLE_LEAST, SAMPLE_MOST = 256, 8192, 1 << 18
# of those, rows per cluster that seeds are drawn from, and a bound on all of them
SEEDING, SEEDING_MOST = 64, 1 << 16
# standard deviation of the rows' norms, over their mean, from which the unit rows are rehearsed too
UNEVEN = 0.02
# up to so many rows, Lloyd steps go on until no label changes; beyond, until fewer than 1 in 50 do
EXACT = 8192

Map = Callable[[Callable[[tuple[int, int]], Any], Iterable[tuple[int, int]]], Iterable[Any]]


@dataclass(frozen=True)
class Clustering:
    """`labels` int64 [n] in 0..c-1, every cluster with a member; `centres` float32 [c, d], the mean
    of each cluster's members (its direction, if cosine); `objective`: mean squared distance of a
    row to its centre (of unit row to unit centre, if cosine).
    """

    labels: Tensor
    centres: Tensor
    objective: float


def fit(
    rows: Rows,
    clusters: int,
    *,
    rng: np.random.Generator,
    cosine: bool = False,
    init: Literal["greedy++", "random"] | Tensor = "greedy++",
    restarts: int = 1,
    iterations: int = 25,
    map: Map = map,
) -> Clustering:
    """Cluster rows [n, d] into `clusters` groups by squared Euclidean distance, or by cosine (rows
    are then normalised inside).

    `init`: how the rehearsal seeds, "greedy++" or "random" rows; or a Tensor [clusters, d] of
    centres, which skips the rehearsal. `restarts` rehearsals are made, as many again on unit rows
    where norms differ, and the best goes on. `iterations` bounds the Lloyd steps over all rows (and
    those of a rehearsal); they end earlier when no label changes, with more than 8,192 rows when
    fewer than 1 in 50 do. A cluster that loses all its rows gets the row farthest from its own
    centre (lowest index among equals). Ties go to the lowest cluster. `map(function, blocks)` must
    return the results in order; a thread pool's `map` gives the same bytes as the built-in one.
    Memory beyond the rows: the sketch, some n-long vectors, and a few blocks. Raises ValueError for
    clusters outside 1..n, an unknown `init`, restarts or iterations < 1, and rows that are not
    finite.
    """
    n, d = sizes(rows)
    check_rng(rng)
    if isinstance(clusters, bool) or int(clusters) != clusters or not 1 <= clusters <= n:
        raise ValueError(
            f"clusters must be a whole number between 1 and the {n} rows, got {clusters!r}"
        )
    if restarts < 1 or iterations < 1:
        raise ValueError(f"restarts and iterations must be >= 1, got {restarts} and {iterations}")
    if not isinstance(init, Tensor) and init not in ("greedy++", "random"):
        raise ValueError(f'init must be "greedy++", "random" or a Tensor of centres, got {init!r}')
    start: Tensor | None = None
    labels = torch.full((n,), -1, dtype=torch.int64)
    if isinstance(init, Tensor):
        start = floating(init, "init", 2)
        if tuple(start.shape) != (clusters, d):
            raise ValueError(f"init must have shape {[clusters, d]}, got {list(start.shape)}")
    else:
        labels = _rehearse(rows, int(clusters), rng, cosine, init, restarts, iterations, map)
    lloyd = _Lloyd(rows, int(clusters), cosine, map)
    lloyd.run(iterations, labels=labels, start=start)
    return Clustering(lloyd.labels, lloyd.centres().float().cpu(), lloyd.objective())


class _Lloyd:
    """Lloyd steps over blocks. `sums` [c, d] float64 are the sums of the members, kept up to date
    by the rows that move.
    """

    def __init__(self, rows: Rows, clusters: int, cosine: bool, map: Map) -> None:
        self.rows, self.clusters, self.cosine, self.map = rows, clusters, cosine, map
        self.n, self.d = sizes(rows)
        self.labels = torch.full((self.n,), -1, dtype=torch.int64)
        self.sums: Tensor | None = None
        self.scale = self.shift = None
        totals, scales = None, []
        for total, scale in map(self._survey, spans(self.n)):
            totals = total if totals is None else totals + total
            scales.append(scale)
        assert totals is not None
        if not bool(torch.isfinite(totals).all()):
            raise ValueError("rows hold NaN or infinite values")
        if cosine:
            self.scale = torch.cat(scales)
        else:  # distances are taken from the mean row: rows far from the origin lose no digits
            self.shift = totals / self.n

    def _survey(self, span: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        block = read(self.rows, *span)
        if not self.cosine:
            return block.sum(0).double(), None
        norms = block.norm(dim=1)
        return norms.sum().double(), torch.where(
            norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), norms
        )

    def run(self, iterations: int, labels: Tensor, start: Tensor | None = None) -> None:
        """From centres, or from labels (-1 = not known yet, leaves its row out of the first
        centres).
        """
        if start is None:
            unknown = torch.full_like(labels, -1)
            self._move(
                self.map(
                    lambda span: self._change(span, labels[slice(*span)], unknown), spans(self.n)
                )
            )
            self.labels = labels
            start = self.centres()
            if bool((labels < 0).any()):  # centres of a sample: the sums start again with every row
                self.sums, self.labels = None, unknown
        for _ in range(iterations):
            before, centres = self.labels, self.centres() if start is None else start
            start = None
            self.labels = self._move(self.map(self._step(centres, before), spans(self.n)))
            self._refill(centres)
            if int((self.labels != before).sum()) <= (0 if self.n <= EXACT else self.n // 50):
                break

    def _move(self, changes: Iterable[_Change]) -> Tensor:
        labels = []
        for change in changes:
            labels.append(change.labels)
            if self.sums is None:
                self.sums = torch.zeros(
                    self.clusters, self.d, dtype=torch.float64, device=change.sums.device
                )
            self.sums.index_add_(0, change.clusters.to(self.sums.device), change.sums.double())
        return torch.cat(labels)

    def centres(self) -> Tensor:
        """Means of the members [c, d] float64; unit length if cosine (a zero mean stays zero)."""
        assert self.sums is not None
        if self.cosine:
            norms = self.sums.norm(dim=1, keepdim=True)
            return self.sums / torch.where(norms > 0, norms, torch.ones_like(norms))
        counts = torch.bincount(self.labels[self.labels >= 0], minlength=self.clusters).clamp_min(1)
        return self.sums / counts[:, None].to(self.sums)

    def _step(self, centres: Tensor, before: Tensor) -> Callable[[tuple[int, int]], _Change]:
        """|x - c|^2 is least where (x - shift) . (c - shift) - |c - shift|^2 / 2 is largest: one
        product and a constant per centre.
        """
        moved = (
            centres.double()
            if self.shift is None
            else centres.double() - self.shift.to(centres.device)
        )
        constant = moved.square().sum(1) / 2
        if self.shift is not None:
            constant = constant + moved @ self.shift.to(moved.device)

        def step(span: tuple[int, int]) -> _Change:
            a, b = span
            block = read(self.rows, a, b)
            score = block @ moved.to(block).T
            if self.scale is not None:
                score *= self.scale[a:b, None]
            new = (score - constant.to(block)).argmax(1).cpu()
            return self._change(span, new, before, block)

        return step

    def _change(
        self, span: tuple[int, int], new: Tensor, before: Tensor, block: Tensor | None = None
    ) -> _Change:
        """What the rows of a block add to the sums: + where they come to, - where they leave; rows
        that stay cost nothing.
        """
        block = read(self.rows, *span) if block is None else block
        old = before[slice(*span)]
        came, left = (
            torch.nonzero((new != old) & (new >= 0)).flatten(),
            torch.nonzero((new != old) & (old >= 0)).flatten(),
        )
        row, cluster = torch.cat([came, left]), torch.cat([new[came], old[left]])
        if len(row) == 0:
            return _Change(new, row, block[:0])
        sign = torch.cat([torch.ones(len(came)), -torch.ones(len(left))])
        if self.scale is not None:
            sign = sign * self.scale[slice(*span)].cpu()[row]
        order = torch.argsort(cluster, stable=True)
        touched, counts = torch.unique_consecutive(cluster[order], return_counts=True)
        bags = (counts.cumsum(0) - counts).to(block.device)
        sums = embedding_bag(
            row[order].to(block.device),
            block,
            bags,
            mode="sum",
            per_sample_weights=sign[order].to(block),
        )
        return _Change(new, touched, sums)

    def _distances(self, centres: Tensor) -> Iterable[Tensor]:
        """Squared distance of every row to the centre of its cluster, block by block, by
        differences.
        """

        def distance(span: tuple[int, int]) -> Tensor:
            block = read(self.rows, *span)
            if self.scale is not None:
                block = block * self.scale[slice(*span), None]
            labels = self.labels[slice(*span)].to(block.device)
            return (block - centres.to(block)[labels]).square_().sum(1).cpu()

        return self.map(distance, spans(self.n))

    def objective(self) -> float:
        return sum(float(part.double().sum()) for part in self._distances(self.centres())) / self.n

    def _refill(self, centres: Tensor) -> None:
        counts = torch.bincount(self.labels, minlength=self.clusters)
        empty = torch.nonzero(counts == 0).flatten().tolist()
        if not empty:
            return
        assert self.sums is not None
        distance = torch.cat(list(self._distances(centres)))
        for cluster in empty:
            free = torch.where(counts[self.labels] > 1, distance, -torch.ones_like(distance))
            row = int(free.argmax())
            moved = read(self.rows, row, row + 1)[0].double()
            if self.scale is not None:
                moved = moved * self.scale[row]
            donor = int(self.labels[row])
            self.sums[donor] -= moved
            self.sums[cluster] += moved
            counts[donor] -= 1
            counts[cluster] = 1
            self.labels[row] = cluster


@dataclass(frozen=True)
class _Change:
    """New labels of a block, and the clusters [t] it touches with what to add to their sums [t,
    d].
    """

    labels: Tensor
    clusters: Tensor
    sums: Tensor


def _rehearse(
    rows: Rows,
    clusters: int,
    rng: np.random.Generator,
    cosine: bool,
    init: str,
    restarts: int,
    iterations: int,
    map: Map,
) -> Tensor:
    """Labels [n] of the best of `restarts` clusterings of the sketch; -1 for rows outside the
    sample.
    """
    n, d = sizes(rows)
    size = min(n, max(min(SAMPLE * clusters, SAMPLE_MOST), SAMPLE_LEAST, clusters))
    chosen = np.arange(n) if size == n else np.sort(rng.choice(n, size=size, replace=False))
    fold = _Fold(d, rng) if d >= 2 * SKETCH else None

    def sketch(span: tuple[int, int]) -> tuple[Tensor, Tensor]:
        here = chosen[np.searchsorted(chosen, span[0]) : np.searchsorted(chosen, span[1])] - span[0]
        block = read(rows, *span)
        block = block if len(here) == len(block) else block[torch.from_numpy(here).to(block.device)]
        block = unit(block) if cosine else block
        return block.clone() if fold is None else fold(block), block.norm(dim=1)

    parts = list(map(sketch, spans(n)))
    points, norms = (
        torch.cat([part for part, _ in parts]),
        torch.cat([lengths for _, lengths in parts]),
    )
    del parts
    check_finite(points.sum(1), "rows")
    if not cosine:
        points -= points.mean(0)
    unknown = torch.full((size,), -1, dtype=torch.int64)

    def trial(points: Tensor, cosine: bool, start: Tensor | None = None) -> _Lloyd:
        """Lloyd steps from the labels `start`, or from seeds."""
        lloyd, seeds = _Lloyd(points, clusters, cosine, builtins.map), None
        if start is None:
            drawn = torch.from_numpy(
                rng.permutation(size)[: max(min(SEEDING * clusters, SEEDING_MOST), clusters)]
            ).to(points.device)
            seeds = (
                _seed(points[drawn], clusters, rng)
                if init == "greedy++"
                else points[drawn[:clusters]]
            )
        lloyd.run(iterations, labels=unknown if start is None else start, start=seeds)
        return lloyd

    trials = [trial(points, cosine) for _ in range(restarts)]
    if (
        init == "greedy++"
        and not cosine
        and float(norms.std(correction=0)) > UNEVEN * float(norms.mean())
    ):
        directions = unit(points)
        trials += [trial(points, False, trial(directions, True).labels) for _ in range(restarts)]
    best = min(trials, key=_Lloyd.objective) if len(trials) > 1 else trials[0]
    labels = torch.full((n,), -1, dtype=torch.int64)
    labels[torch.from_numpy(chosen)] = best.labels
    return labels


class _Fold:
    """A count-sketch [b, d] -> [b, SKETCH]: signed slices of SKETCH columns, each rotated by its
    own offset, added up.
    """

    def __init__(self, d: int, rng: np.random.Generator) -> None:
        self.signs = torch.from_numpy(rng.integers(0, 2, size=d).astype(np.float32) * 2 - 1)
        self.offsets = rng.integers(0, SKETCH, size=-(-d // SKETCH)).tolist()

    def __call__(self, block: Tensor) -> Tensor:
        out = torch.zeros(len(block), SKETCH, dtype=block.dtype, device=block.device)
        signs = self.signs.to(block)
        for slice_, offset in enumerate(self.offsets):
            low = slice_ * SKETCH
            high = min(low + SKETCH, block.shape[1])
            turn = min(high, low + SKETCH - offset)
            out[:, offset : offset + turn - low].addcmul_(block[:, low:turn], signs[low:turn])
            if turn < high:
                out[:, : high - turn].addcmul_(block[:, turn:high], signs[turn:high])
        return out


def _seed(points: Tensor, clusters: int, rng: np.random.Generator) -> Tensor:
    """Greedy k-means++, then local search -> centres [clusters, d], all of them rows of `points`.

    Each next centre is the one of 2 + log k rows, drawn by squared distance to the centres, that
    lowers the total most. Then k / 2 rounds draw as many rows again, and swap the best pair of
    (centre out, row in) if the total falls.
    """
    n, trials = len(points), 2 + int(math.log(clusters))
    squares = points.square().sum(1)
    distance = torch.empty(n, clusters, dtype=points.dtype, device=points.device)
    chosen: list[int] = []

    def to(picks: list[int]) -> Tensor:
        out = (squares[:, None] - 2 * (points @ points[picks].T) + squares[picks]).clamp_min_(0)
        out[picks, range(len(picks))] = 0
        return out

    def draw(nearest: Tensor) -> list[int]:
        ladder = nearest.double().cumsum(0).cpu().numpy()
        places = np.searchsorted(ladder, rng.random(trials) * ladder[-1], side="right")
        if ladder[-1] <= 0:  # fewer distinct rows than clusters: the lowest row not yet chosen
            places = np.setdiff1d(np.arange(n), chosen)[:1]
        return np.minimum(places, n - 1).tolist()

    chosen.append(int(rng.integers(n)))
    nearest = to(chosen)[:, 0]
    distance[:, 0] = nearest
    while len(chosen) < clusters:
        picks = draw(nearest)
        new = to(picks)
        both = torch.minimum(new, nearest[:, None])
        best = int(both.sum(0, dtype=torch.float64).argmin())
        distance[:, len(chosen)], nearest = new[:, best], both[:, best]
        chosen.append(picks[best])
    for _ in range(clusters // 2 if 1 < clusters < n else 0):
        two = distance.topk(2, dim=1, largest=False, sorted=True)
        nearest, second, owner = two.values[:, 0], two.values[:, 1], two.indices[:, 0]
        if not bool(nearest.any()):
            break
        picks = draw(nearest)
        new = to(picks)
        kept = torch.minimum(new, nearest[:, None])
        # what the rows of a centre pay on top when it goes
        lost = torch.minimum(new, second[:, None]) - kept
        total = kept.sum(0) + torch.zeros(
            clusters, len(picks), dtype=new.dtype, device=new.device
        ).index_add_(0, owner, lost)
        out, into = divmod(int(total.argmin()), len(picks))
        if float(total[out, into]) < float(nearest.sum()):
            distance[:, out] = new[:, into]
            chosen[out] = picks[into]
    return points[chosen]
