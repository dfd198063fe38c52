"""Rows that nearly repeat an earlier one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import Rows, check_finite, gather, read, sizes, spans, unit


def near(rows: Rows, threshold: float, *, order: Any = None) -> Tensor:
    """For every row of rows [n, d]: the row it repeats, or -1 for a row that is kept -> int64 [n].

    Rows are gone through in `order` (all row numbers, by default 0..n-1); a row is dropped when its
    cosine to a row kept before is at least `threshold`, and then names the first such row. A zero
    row repeats nothing. Rows are normalised inside; products in fp32, n^2 d / 2 multiply-adds at
    most, memory the kept rows and a block. Raises ValueError for a threshold outside 0..1, rows
    that are not finite, or an order that is not one of all rows.
    """
    n, _ = sizes(rows)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    sequence = torch.arange(n) if order is None else torch.as_tensor(order).long().cpu()
    if len(sequence) != n or not bool((sequence.sort().values == torch.arange(n)).all()):
        raise ValueError(f"order must name each of the {n} rows once")
    repeats = torch.full((n,), -1, dtype=torch.int64)
    least = min(threshold, 1 - 1e-5)  # the cosine of equal rows may round to just below 1
    kept: list[tuple[Tensor, Tensor]] = []
    for a, b in spans(n):
        places = sequence[a:b]
        block = unit(_at(rows, places))
        check_finite(block, "rows")
        first = torch.full((b - a,), -1, dtype=torch.int64)
        for numbers, units in kept:
            hits = block @ units.T >= least
            some = hits.any(dim=1).cpu()
            new = some & (first < 0)
            first[new] = numbers[hits.float().argmax(dim=1).cpu()[new]]
        own = (block @ block.T >= least).cpu()
        alive = first < 0
        for i in torch.nonzero(alive).flatten().tolist():
            before = own[i, :i] & alive[:i]
            if bool(before.any()):
                first[i], alive[i] = places[int(before.float().argmax())], False
        repeats[places] = first
        if bool(alive.any()):
            kept.append((places[alive], block[alive]))
    return repeats


def _at(rows: Rows, places: Tensor) -> Tensor:
    run = len(places) == int(places[-1]) - int(places[0]) + 1 and bool((places.diff() == 1).all())
    return read(rows, int(places[0]), int(places[-1]) + 1) if run else gather(rows, places)
