"""Two principal directions of many rows, fitted on a sample of them: the axes of a map."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import Rows, gather, sizes
from .blocks import unit as at_unit_length
from .components import oriented

SAMPLE = 1024  # rows that the directions are fitted on
BYTES = 64 << 20  # of the sample in float32: fewer rows where they are wider than 16,384 numbers
PLACED = 256  # rows that are projected at a time
FLAT = 1e-9  # share of the uncentred variance below which the centred variance is rounding


@dataclass(frozen=True)
class Plane:
    """`mean` [d] and `directions` [2, d] (float32, orthonormal, the second zero where rows vary
    along one direction alone); `shares`: of the sample's variance along each. `unit`: rows are
    brought to length 1 first.
    """

    mean: Tensor
    directions: Tensor
    shares: tuple[float, float]
    unit: bool

    def place(self, rows: Rows, indices: np.ndarray) -> np.ndarray:
        """Coordinates float64 [k, 2] of the rows at `indices` [k], 256 rows in memory at a time."""
        found = np.empty((len(indices), 2))
        for a in range(0, len(indices), PLACED):
            some = torch.as_tensor(indices[a : a + PLACED])
            block = _read(rows, some, self.unit) - self.mean
            found[a : a + len(some)] = (block @ self.directions.T).double().numpy()
        return found


def sample(among: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """At most `most` of the indices, drawn without replacement, ascending."""
    if len(among) <= most:
        return np.sort(among)
    return np.sort(rng.choice(among, size=most, replace=False))


def fit(
    rows: Rows, among: np.ndarray, *, rng: np.random.Generator, unit: bool = True
) -> Plane | None:
    """The two strongest principal directions of rows [n, d] about their mean, from at most 1,024
    rows drawn from `among`; all of them where there are fewer.

    At most 64 MiB of rows are held, and a Gram matrix of as many rows squared. The sign of a
    direction is that which makes its largest entry positive. None where the rows are all alike.
    """
    _, d = sizes(rows)
    taken = sample(among, max(2, min(SAMPLE, BYTES // (4 * d))), rng)
    if len(taken) < 2:
        return None
    block = _read(rows, torch.as_tensor(taken), unit)
    uncentred = float(block.square().sum(dtype=torch.float64))
    mean = block.mean(dim=0)
    block = block - mean
    wide = len(taken) <= d
    values, vectors = torch.linalg.eigh((block @ block.T if wide else block.T @ block).double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    variance = float(values.sum())
    if not np.isfinite(variance) or not variance > FLAT * uncentred:
        return None
    directions = torch.zeros(2, d, dtype=torch.float64)
    shares = [0.0, 0.0]
    for place in range(min(2, len(values))):
        if float(values[place]) > FLAT * variance:
            axis = vectors[:, place].float()
            direction = (block.T @ axis if wide else axis).double()
            directions[place] = oriented((direction / direction.norm())[None], None)[0]
            shares[place] = float(values[place]) / variance
    return Plane(mean, directions.float(), (shares[0], shares[1]), unit)


def nearest(
    rows: Rows, indices: np.ndarray, others: Rows, among: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each row at `indices` [k], the row of `others` among `among` whose direction is nearest:
    (its index [k], the cosine [k]). Ties go to the lowest index.
    """
    mine = _read(rows, torch.as_tensor(indices), True)
    best, which = torch.full((len(mine),), -torch.inf), torch.zeros(len(mine), dtype=torch.int64)
    for a in range(0, len(among), PLACED):
        some = torch.as_tensor(among[a : a + PLACED])
        values, at = (mine @ _read(others, some, True).T).max(dim=1)
        better = values > best
        best, which = torch.where(better, values, best), torch.where(better, some[at], which)
    return which.numpy(), best.double().numpy()


def _read(rows: Rows, indices: Tensor, unit: bool) -> Tensor:
    block = gather(rows, indices).cpu().float()
    return at_unit_length(block) if unit else block
