"""Principal directions of a few rows (a target set's gradients)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .blocks import BLOCK, Rows, check_finite, read, sizes, stream

FLAT = 1e-9  # share of the uncentred variance below which the centred variance is rounding


@dataclass(frozen=True)
class Components:
    """`directions` float32 [c, d], orthonormal, strongest first; `weights` float64 [c], their
    shares of the variance, sum 1.
    """

    directions: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.weights)


def principal(
    rows: Rows,
    keep: float = 0.5,
    *,
    by: Literal["variance", "count"] = "variance",
    centred: bool = True,
    orient: bool = True,
) -> Components:
    """The strongest principal directions of rows [m, d], rows taken as they are (not normalised).

    `by="variance"`: the fewest directions whose shares of the variance reach `keep`; `by="count"`:
    that share of the directions with any variance, rounded down, at least one (released G2IS takes
    it of d, which fails for fewer rows than that). `centred=False` keeps the mean row, the actual
    descent direction of a target set, among the directions. The sign of a direction is arbitrary:
    `orient` makes the mean projection of the (uncentred) rows >= 0; where that says nothing, and
    without `orient`, the largest entry is made positive. Source: Core knowledge of G2IS (Zhao et
    al. 2025, section 3).

    Float64 eigenvectors of the m x m Gram matrix or of the d x d covariance, whichever is smaller;
    read in blocks. Raises ValueError for `keep` outside (0, 1], for rows that are not finite, and
    when the variance is zero next to that of the uncentred rows.
    """
    m, d = sizes(rows)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if by not in ("variance", "count"):
        raise ValueError(f'by must be "variance" or "count", got {by!r}')
    total = torch.zeros(d, dtype=torch.float64)
    uncentred = 0.0
    for _, _, block in stream(rows):
        check_finite(block, "rows")
        exact = block.cpu().double()
        total += exact.sum(0)
        uncentred += float(exact.square().sum())
    mean = total / m
    shift = mean if centred else torch.zeros_like(mean)
    values, directions = _eigen(rows, m, d, shift)
    variance = float(values.sum())
    if not variance > FLAT * uncentred:
        what = (
            "rows are all alike, their centred variance is zero"
            if uncentred > 0
            else "rows are all zero"
        )
        raise ValueError(
            f"{what}: there is no principal direction"
            + (" (centred=False keeps the mean)" if centred else "")
        )
    shares = values / variance
    solid = int((shares > FLAT).sum())
    count = (
        max(1, int(keep * solid + 1e-9))
        if by == "count"
        else 1 + int((shares.cumsum(0) < keep - 1e-12).sum())
    )
    count = min(count, solid)
    directions, shares = directions(count), shares[:count]
    return Components(oriented(directions, mean if orient else None).float(), shares / shares.sum())


def _eigen(rows: Rows, m: int, d: int, shift: Tensor):
    """Eigenvalues [min(m, d)], descending, and a function count -> the first unit directions
    [count, d].
    """
    if m <= d:
        matrix = (
            torch.cat([block.cpu().double() for _, _, block in stream(rows)]) - shift
            if m <= BLOCK
            else None
        )
        gram = matrix @ matrix.T if matrix is not None else _gram(rows, m, shift)
    else:
        gram = sum(
            (block.cpu().double() - shift).T @ (block.cpu().double() - shift)
            for _, _, block in stream(rows)
        )
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)

    def directions(count: int) -> Tensor:
        if m > d:
            return vectors[:, :count].T
        found = torch.zeros(count, d, dtype=torch.float64)
        for a, b, block in stream(rows):
            found += vectors[a:b, :count].T @ (block.cpu().double() - shift)
        return found / found.norm(dim=1, keepdim=True)

    return values, directions


def _gram(rows: Rows, m: int, shift: Tensor) -> Tensor:
    gram = torch.empty(m, m, dtype=torch.float64)
    for a, b, left in stream(rows):
        for c in range(0, b, BLOCK):
            e = min(c + BLOCK, m)
            gram[a:b, c:e] = (left.cpu().double() - shift) @ (
                read(rows, c, e).cpu().double() - shift
            ).T
            gram[c:e, a:b] = gram[a:b, c:e].T
    return gram


def oriented(directions: Tensor, mean: Tensor | None) -> Tensor:
    """Directions [c, d], each with the sign of its product with `mean` [d], or of its largest entry
    without one.
    """
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True)).flatten()
    sign = torch.sign(largest)
    if mean is not None:
        projection = directions @ mean
        clear = projection.abs() > FLAT * mean.norm()
        sign = torch.where(clear, torch.sign(projection), sign)
    return directions * sign[:, None]
