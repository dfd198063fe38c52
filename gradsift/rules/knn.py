"""The graph of nearest neighbours by cosine, in blocks: exact, or with bfloat16 products and a
float32 re-rank.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import Rows, check_finite, check_rng, gather, read, sizes, spans, stream, unit

EXTRA = 16  # candidates beyond k that the bfloat16 pass keeps for the re-rank
SIDE = 16  # columns of a product that are passed over together
PIECE = 1 << 19  # numbers gathered at a time by the re-rank: what a core's own cache holds
# a block adds at most so many candidates per row by threshold; else the best are taken first
WIDE = 64
# bytes of normalised rows kept between block products; larger ones are read again (same numbers)
RESIDENT = 1 << 30

Map = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


def graph(rows: Rows, k: int, *, exact: bool = True, map: Map = map) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of every row by cosine -> (neighbours int64 [n, k], similarity
    float32 [n, k]), most similar first.

    A row is never its own neighbour; a zero row has similarity 0 to all. Ties go to the lowest
    index. Each pair of 2,048-row blocks is multiplied once and serves both sides: n^2 d
    multiply-adds in all, memory n x k and a few blocks. Another `map` than the built-in one is
    given the blocks of rows to do by themselves: the same bytes for twice the multiply-adds, on as
    many machines as it has.

    `exact=True`: products in float32. `exact=False`: products in bfloat16 (faster only where the
    processor has it), then the best k + 16 candidates of each row are compared again in float32; a
    neighbour can be missed: `recall` measures how many were not. Raises ValueError for k outside
    1..n-1 and rows that are not finite.
    """
    n, _ = sizes(rows)
    if isinstance(k, bool) or int(k) != k or not 1 <= k < n:
        raise ValueError(
            f"k must be a whole number between 1 and {n - 1} (rows less one), got {k!r}"
        )
    k = int(k)
    for _, _, block in stream(rows):
        check_finite(block.sum(1), "rows")
    keep = k if exact else min(n - 1, k + EXTRA)
    units = _Units(rows, torch.float32 if exact else torch.bfloat16)
    if map is not builtins.map:
        found = list(map(_Alone(rows, units, k, keep, exact), range(len(units.spans))))
        return torch.cat([columns for columns, _ in found]), torch.cat(
            [values for _, values in found]
        )
    lists = [_Best(b - a, keep, exact) for a, b in spans(n)]
    for i, (a, b) in enumerate(spans(n)):
        left = units[i]
        for j in range(i, len(lists)):
            c = spans(n)[j][0]
            product = left @ units[j].T
            if i == j:
                product.fill_diagonal_(-torch.inf)
            lists[i].add(product, c)
            if i != j:
                # rows meet their columns in ascending order either way, so that a later tie is a
                # higher index
                lists[j].add(product, a, down=True)
        if not exact:
            lists[i].rank(rows, (a, b))
    neighbours = torch.cat([entry.columns[:, :k].cpu() for entry in lists])
    return neighbours, torch.cat([entry.values[:, :k].cpu() for entry in lists])


def recall(rows: Rows, neighbours: Tensor, *, sample: int = 256, rng: np.random.Generator) -> float:
    """The share of the true nearest neighbours that `neighbours` [n, k] holds, over `sample` rows
    drawn from `rng` (all, if n is smaller).

    A neighbour counts as found when its float32 cosine reaches that of the true k-th (less 1e-6).
    1.0 = nothing was missed.
    """
    n, _ = sizes(rows)
    k = neighbours.shape[1]
    if len(neighbours) != n or sample < 1:
        raise ValueError(
            f"neighbours must have {n} rows and sample must be >= 1, got {len(neighbours)} and"
            f" {sample}"
        )
    queries = torch.from_numpy(
        np.sort(check_rng(rng).choice(n, size=min(n, sample), replace=False))
    )
    points = unit(gather(rows, queries))
    similarity = torch.cat([(points @ unit(block).T).cpu() for _, _, block in stream(rows)], dim=1)
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    least = similarity.topk(k, dim=1).values[:, -1:]
    return float((similarity.gather(1, neighbours[queries]) >= least - 1e-6).double().mean())


class _Alone:
    """The neighbours of one block of rows by itself: as `graph` finds them, every product made on
    the side where it makes it.
    """

    def __init__(self, rows: Rows, units: _Units, k: int, keep: int, exact: bool) -> None:
        self.rows, self.units, self.k, self.keep, self.exact = rows, units, k, keep, exact

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        units, span = self.units, self.units.spans[i]
        best = _Best(span[1] - span[0], self.keep, self.exact)
        for j, (first, _) in enumerate(units.spans):
            product = units[i] @ units[j].T if i <= j else units[j] @ units[i].T
            if i == j:
                product.fill_diagonal_(-torch.inf)
            best.add(product, first, down=i > j)
        if not self.exact:
            best.rank(self.rows, span)
        return (
            best.columns[:, : self.k].cpu().contiguous(),
            best.values[:, : self.k].cpu().contiguous(),
        )


class _Units:
    """Blocks of rows of length 1 in the precision of the products."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        self.rows, self.dtype, self.spans = rows, dtype, spans(rows.shape[0])
        self.kept: dict[int, Tensor] | None = (
            {} if rows.shape[0] * rows.shape[1] * dtype.itemsize <= RESIDENT else None
        )

    def __getitem__(self, block: int) -> Tensor:
        if self.kept is not None and block in self.kept:
            return self.kept[block]
        out = unit(read(self.rows, *self.spans[block])).to(self.dtype)
        if self.kept is not None:
            self.kept[block] = out
        return out


class _Best:
    """The best `keep` columns met so far by each row of a block, descending, ties to the lowest
    column.
    """

    def __init__(self, rows: int, keep: int, strict: bool) -> None:
        self.keep, self.strict = keep, strict
        self.values = torch.full((rows, 0), -torch.inf)
        self.columns = torch.zeros((rows, 0), dtype=torch.int64)

    def add(self, product: Tensor, first: int, *, down: bool = False) -> None:
        """product [rows, w]: similarities to the columns first .. first + w - 1, all of them higher
        than those met before.

        `down`: the same as [w, rows]. A product serves both its sides as it was computed: turning
        it would cost more than looking through it.
        """
        found = self._above(product, down) if self.values.shape[1] == self.keep else None
        if found is None:
            values, places = _top(
                (product.T if down else product).float(),
                min(self.keep, product.shape[0 if down else 1]),
                self.strict,
            )
        else:
            values, places = found
            if values.shape[1] == 0:
                return
        values = torch.cat([self.values.to(values.device), values], dim=1)
        columns = torch.cat([self.columns.to(values.device), places + first], dim=1)
        order = values.sort(dim=1, descending=True, stable=True)
        self.values = order.values[:, : self.keep].contiguous()
        self.columns = columns.gather(1, order.indices[:, : self.keep])

    def _above(self, product: Tensor, down: bool) -> tuple[Tensor, Tensor] | None:
        """What beats the last kept value of its row, padded with -infinity: after a few blocks that
        is little. None = it is a lot.

        Most of the product is passed over by the maximum of every `stride`-th column, a sixteenth
        of it, which vector instructions find.
        """
        rows, width = (
            (product.shape[1], product.shape[0]) if down else (product.shape[0], product.shape[1])
        )
        side = SIDE if width % SIDE == 0 else 1
        stride = width // side
        least = self.values[:, -1]
        peaks = (
            product.view(side, stride, rows).amax(0).T
            if down
            else product.view(rows, side, stride).amax(1)
        )
        row, offset = torch.nonzero(peaks > least[:, None], as_tuple=True)
        part = (
            product.view(side, stride, rows)[:, offset, row].T
            if down
            else product.view(rows, side, stride)[row, :, offset]
        )
        hit, place = torch.nonzero(part > least[row, None], as_tuple=True)
        value, row, column = part[hit, place].float(), row[hit], place * stride + offset[hit]
        counts = torch.bincount(row, minlength=rows)
        most = int(counts.max())
        if most > max(WIDE, self.keep):
            return None
        order = torch.argsort(row * width + column)
        value, row, column = value[order], row[order], column[order]
        rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        values = torch.full((rows, most), -torch.inf, device=product.device)
        columns = torch.zeros((rows, most), dtype=torch.int64, device=product.device)
        values[row, rank] = value
        columns[row, rank] = column
        return values, columns

    def rank(self, rows: Rows, span: tuple[int, int]) -> None:
        """Replace the values by float32 cosines, and sort again."""
        mine = unit(read(rows, *span))
        for a, b, block in stream(rows):
            row, place = torch.nonzero((self.columns >= a) & (self.columns < b), as_tuple=True)
            if len(row) == 0:
                continue
            others = unit(block)
            step = max(1, PIECE // block.shape[1])
            for part in range(0, len(row), step):
                i, p = row[part : part + step], place[part : part + step]
                pairs = mine.index_select(0, i) * others.index_select(0, self.columns[i, p] - a)
                self.values[i, p] = pairs.sum(1).float()
        by_column = self.columns.sort(dim=1)
        values = self.values.gather(1, by_column.indices)
        order = values.sort(dim=1, descending=True, stable=True)
        self.values, self.columns = order.values, by_column.values.gather(1, order.indices)


def _top(product: Tensor, keep: int, strict: bool) -> tuple[Tensor, Tensor]:
    """The best `keep` columns of each row, in ascending column order where values tie.

    At the last place top-k does not say which of the equals it takes: `strict` takes the lowest
    ones. (Products in bfloat16 tie by the dozen for no reason; there it is the re-rank that
    orders.)
    """
    values, places = product.topk(keep, dim=1)
    torn = (
        torch.nonzero((product >= values[:, -1:]).sum(1) > keep).flatten()
        if strict
        else places[:0, 0]
    )
    if len(torn):
        full = product[torn].sort(dim=1, descending=True, stable=True)
        values[torn], places[torn] = full.values[:, :keep], full.indices[:, :keep]
    by_column = places.sort(dim=1)
    values = values.gather(1, by_column.indices)
    order = values.sort(dim=1, descending=True, stable=True)
    return order.values, by_column.values.gather(1, order.indices)
