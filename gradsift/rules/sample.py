"""Weighted sampling without replacement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blocks import best, check_budget, check_rng

if TYPE_CHECKING:
    import numpy as np


def gumbel_topk(log_weights: Any, budget: int, *, rng: np.random.Generator) -> Tensor:
    """Draw `budget` rows one by one, each with probability proportional to exp(log_weights) [n]
    among those left -> int64 [budget].

    The largest of log weight + Gumbel noise (Kool et al. 2019, section 2.3; used by DSIR and
    DATE-LM). Adding a constant to all log weights changes nothing; -inf rows are never drawn; a
    larger budget with the same rng state only appends. Raises ValueError for NaN or +inf, and for a
    budget over the rows that can be drawn.
    """
    weights = torch.as_tensor(log_weights).detach().cpu().double()
    if weights.ndim != 1:
        raise ValueError(f"log_weights must have one dimension, got shape {list(weights.shape)}")
    if bool((weights.isnan() | weights.isposinf()).any()):
        raise ValueError("log_weights holds NaN or +infinity")
    budget = check_budget(budget, len(weights))
    drawable = int(torch.isfinite(weights).sum())
    if budget > drawable:
        raise ValueError(
            f"budget is {budget}, but only {drawable} rows have a log weight above -infinity"
        )
    noise = torch.from_numpy(check_rng(rng).gumbel(size=len(weights)))
    return best(weights + noise, budget)
