"""What the tests of single methods share: giving a method its signals, and rows as a store gives
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.types import Selector, Signal, Signals, Subset


class Stored:
    """Rows as a store keeps them: unit rows by slices, their lengths in `scales`."""

    def __init__(self, rows: Tensor) -> None:
        self.scales = rows.norm(dim=1)
        self.rows, self.shape = torch.nn.functional.normalize(rows, dim=1), tuple(rows.shape)

    def __getitem__(self, where: slice) -> Tensor:
        assert isinstance(where, slice)
        return self.rows[where].clone()


def choose(
    selector: Selector,
    pool: Any,
    target: Any,
    budget: int,
    *,
    groups: Sequence[str] = (),
    seed: int = 0,
) -> Subset:
    """Runs a method on values for its signals of the pool and (None = no target given) of the
    target.
    """
    sides = {"pool": pool} if target is None else {"pool": pool, "target": target}
    values: dict[Signal, Any] = {s: sides[s.side] for s in selector.needs() if s.side in sides}
    signals = Signals(values, n=pool.shape[0], target_groups=list(groups))
    return selector.select(signals, budget, rng=np.random.default_rng(seed))


def random_rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def at_angles(*degrees: float) -> Tensor:
    """Unit rows of the plane."""
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()
