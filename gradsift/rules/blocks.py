"""How every rule reads rows (in fixed blocks, as views of other rows), checks its arguments and
breaks ties (to the lowest index).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048  # rows; fixed, because the order of a sum depends on it


class Rows(Protocol):
    """n x d rows: a Tensor, or anything with `.shape` and `[a:b] -> Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class Picks:
    """What a greedy rule chose.

    `indices` int64 [k] in pick order; `gains` [k]: what each row was worth when it was picked, in
    the unit that the rule names.
    """

    indices: Tensor
    gains: Tensor

    def __len__(self) -> int:
        return len(self.indices)


def sizes(rows: Rows, name: str = "rows") -> tuple[int, int]:
    """(n, d) of `rows`; ValueError unless it has two dimensions and at least one row and one
    column.
    """
    shape = tuple(rows.shape)
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} must have shape [n, d] with n, d >= 1, got {list(shape)}")
    return int(shape[0]), int(shape[1])


def spans(n: int) -> list[tuple[int, int]]:
    """The fixed row ranges [(0, 2048), (2048, 4096), ...] of n rows."""
    return [(a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]


def read(rows: Rows, a: int, b: int) -> Tensor:
    """Rows a..b as float32 (float64 stays float64): a view where no conversion is needed."""
    block = torch.as_tensor(rows[a:b])
    return block if block.dtype == torch.float64 else block.to(torch.float32)


def stream(rows: Rows) -> Iterator[tuple[int, int, Tensor]]:
    for a, b in spans(rows.shape[0]):
        yield a, b, read(rows, a, b)


def gather(rows: Rows, indices: Tensor) -> Tensor:
    """The rows at `indices` [k] (CPU, any order) -> [k, d] in float32 or float64, read as `take`
    reads them.
    """
    block = take(rows, indices)
    return block if block.dtype == torch.float64 else block.to(torch.float32)


def take(rows: Rows, indices: Tensor, *, reach: int = 1) -> Tensor:
    """The rows at `indices` [k] in their own dtype -> [k, d].

    Args:
        rows: n x d rows. Those that are no Tensor are read in stretches, each row once.
        indices: int64 [k] on the CPU, in any order; a row may be named twice.
        reach: two rows at most this far apart belong to one stretch. 1 reads no row that is not
            asked for; more saves reads, where one costs more than a few rows.
    """
    if isinstance(rows, Tensor):
        return rows[indices.to(rows.device)]
    if not len(indices):
        return torch.as_tensor(rows[0:0])
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == last - first + 1 and bool((indices.diff() == 1).all()):
        return torch.as_tensor(rows[first : last + 1])
    ordered, back = torch.unique(indices, return_inverse=True)
    cuts = [0, *((ordered.diff() > reach).nonzero().flatten() + 1).tolist(), len(ordered)]
    parts = []
    for a, b in itertools.pairwise(cuts):
        start = int(ordered[a])
        stretch = torch.as_tensor(rows[start : int(ordered[b - 1]) + 1])
        parts.append(stretch[ordered[a:b] - start])
    taken = torch.cat(parts) if len(parts) > 1 else parts[0]
    return taken if bool((back == torch.arange(len(back))).all()) else taken[back]


def unit(block: Tensor) -> Tensor:
    """Rows of L2 norm 1; a zero row stays zero."""
    norms = block.norm(dim=1, keepdim=True)
    return block / torch.where(norms > 0, norms, torch.ones_like(norms))


def best(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of `values` [n], descending, ties to the lowest index -> int64 [k]
    on the values' device.
    """
    if k >= len(values):
        return torch.sort(values, descending=True, stable=True).indices
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    least = torch.topk(values, k, sorted=False).values.min()
    above = torch.nonzero(values > least).flatten()
    level = torch.nonzero(values == least).flatten()[: k - len(above)]
    found = torch.cat([above, level])
    found = torch.sort(found).values
    return found[torch.sort(values[found], descending=True, stable=True).indices]


def check_budget(budget: int, n: int) -> int:
    """`budget` as an int; ValueError unless 0 <= budget <= n."""
    if isinstance(budget, bool) or int(budget) != budget or not 0 <= budget <= n:
        raise ValueError(
            f"budget must be a whole number between 0 and the {n} rows, got {budget!r}"
        )
    return int(budget)


def check_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} holds NaN or infinite values")


def floating(values: Any, name: str, dims: int) -> Tensor:
    """`values` as a finite float32 (or float64) Tensor with `dims` dimensions."""
    out = torch.as_tensor(values)
    if out.dtype != torch.float64:
        out = out.to(torch.float32)
    if out.ndim != dims:
        raise ValueError(
            f"{name} must have {dims} dimension{'s' if dims > 1 else ''}, got shape"
            f" {list(out.shape)}"
        )
    check_finite(out, name)
    return out


def check_rng(rng: np.random.Generator | None) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    return rng


class Raw:
    """Rows, fp32, at the length they had before a store brought them to 1: unit rows times their
    `scales`. Rows without them are as they are.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows, self.shape = rows, tuple(rows.shape)

    def __getitem__(self, where: slice) -> Tensor:
        block = torch.as_tensor(self.rows[where]).float()
        scales = getattr(self.rows, "scales", None)
        return block if scales is None else block * scales[where, None].to(block.device)


class Unit:
    """Rows at length 1, fp32, whatever length they come with; a zero row stays zero."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.shape = rows, tuple(rows.shape)

    def __getitem__(self, where: slice) -> Tensor:
        return unit(torch.as_tensor(self.rows[where]).float())


class Narrow:
    """Rows projected once more to `dim` numbers, by `signs`; products are kept up to noise."""

    def __init__(self, rows: Rows, dim: int) -> None:
        self.rows, self.shape, self.signs = rows, (rows.shape[0], dim), signs(rows.shape[1], dim)

    def __getitem__(self, where: slice) -> Tensor:
        block = torch.as_tensor(self.rows[where]).float()
        return block @ self.signs.to(block.device)

    @property
    def scales(self) -> Tensor | None:
        """What unit rows of a store must be multiplied by, before the projection as after it; None
        over rows that carry none.
        """
        return getattr(self.rows, "scales", None)


def signs(d: int, dim: int) -> Tensor:
    """fp32 [d, dim], +-1 / sqrt(dim): the same for every run and machine."""
    drawn = np.random.Generator(np.random.Philox(key=dim)).integers(0, 2, (d, dim), dtype=np.int8)
    return torch.from_numpy(drawn).float().mul_(2).sub_(1).div_(dim**0.5)


def group_means(rows: Tensor, groups: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Mean row of each group [g, d] and the groups' names in order of first appearance; one group
    when `groups` is empty.
    """
    names = list(dict.fromkeys(groups)) or ["target"]
    of = torch.tensor([names.index(group) for group in groups] if groups else [0] * len(rows))
    return torch.stack([rows[of == g].mean(dim=0) for g in range(len(names))]), names
