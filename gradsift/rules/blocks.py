"""How every rule reads rows (in fixed blocks), checks its arguments and breaks ties (to the lowest index)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

BLOCK = 2048  # rows; fixed, because the order of a sum depends on it
T = TypeVar("T")


class Rows(Protocol):
    """n x d rows: a Tensor, or anything with `.shape` and `[a:b] -> Tensor`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


def sizes(rows: Rows, name: str = "rows") -> tuple[int, int]:
    """(n, d) of `rows`; ValueError unless it has two dimensions and at least one row and one column."""
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
    """The rows at `indices` [k] (CPU, any order) -> [k, d] in float32 or float64. Rows that are no Tensor are read in runs."""
    if isinstance(rows, Tensor):
        block = rows[indices.to(rows.device)]
        return block if block.dtype == torch.float64 else block.to(torch.float32)
    if len(indices) == 0:
        return read(rows, 0, 1)[:0]
    order = torch.argsort(indices, stable=True)
    wanted = indices[order].tolist()
    pieces, start = [], 0
    for i in range(1, len(wanted) + 1):
        if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
            pieces.append(read(rows, wanted[start], wanted[i - 1] + 1))
            start = i
    found = torch.cat(pieces)
    return torch.empty_like(found).index_copy_(0, order.to(found.device), found)


def unit(block: Tensor) -> Tensor:
    """Rows of L2 norm 1; a zero row stays zero."""
    norms = block.norm(dim=1, keepdim=True)
    return block / torch.where(norms > 0, norms, torch.ones_like(norms))


def best(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of `values` [n], descending, ties to the lowest index -> int64 [k] on the values' device."""
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
        raise ValueError(f"budget must be a whole number between 0 and the {n} rows, got {budget!r}")
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
        raise ValueError(f"{name} must have {dims} dimension{'s' if dims > 1 else ''}, got shape {list(out.shape)}")
    check_finite(out, name)
    return out


def check_rng(rng: np.random.Generator | None) -> np.random.Generator:
    if not isinstance(rng, np.random.Generator):
        raise ValueError(f"rng must be a numpy.random.Generator, got {type(rng).__name__}")
    return rng


class Raw:
    """Rows at the length they had before the store brought them to 1. Rows that carry no `scales` are as they are."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.shape = rows, tuple(rows.shape)

    def __getitem__(self, where: slice) -> Tensor:
        block = torch.as_tensor(self.rows[where]).float()
        scales = getattr(self.rows, "scales", None)
        return block if scales is None else block * scales[where, None].to(block.device)


class Narrow:
    """Rows projected once more to `dim` numbers, by `signs`; products are kept up to noise."""

    def __init__(self, rows: Rows, dim: int) -> None:
        self.rows, self.shape, self.signs = rows, (rows.shape[0], dim), signs(rows.shape[1], dim)

    def __getitem__(self, where: slice) -> Tensor:
        block = torch.as_tensor(self.rows[where]).float()
        return block @ self.signs.to(block.device)

    @property
    def scales(self) -> Tensor | None:
        """What unit rows of a store must be multiplied by, before the projection as after it; None over rows that carry none."""
        return getattr(self.rows, "scales", None)


def signs(d: int, dim: int) -> Tensor:
    """fp32 [d, dim], +-1 / sqrt(dim): the same for every run and machine."""
    drawn = np.random.Generator(np.random.Philox(key=dim)).integers(0, 2, (d, dim), dtype=np.int8)
    return torch.from_numpy(drawn).float().mul_(2).sub_(1).div_(dim**0.5)
