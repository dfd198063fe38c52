"""TRAK's target side: rows of a margin, multiplied by the inverse of the pool rows' Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from gradsift.errors import ConfigError, UserError
from gradsift.types import Rows

BLOCK = 2048


def trak_target(rows_pool: Rows, rows_target: Rows, ridge: float = 0.0, *, relative: bool = False) -> Tensor:
    """(X^T X + ridge I)^-1 q for every target row q: fp32 [m, d]. Scores are then plain dot products with the raw pool rows X [n, d].

    TRAK, arXiv 2303.14186, equation 15. For its scores to mean what they do there, both sides must be rows of the model's output function
    (the margin, the log-odds of the right answer), not of the loss. Rows that carry `scales` (unit rows of a store) are read as raw rows.
    `relative`: ridge in units of the mean diagonal of X^T X. The Gram matrix is summed over blocks of 2,048 rows, products in fp32, their
    sum in fp64; memory 16 d^2 bytes.

    Raises UserError for sides of different width, ConfigError when the matrix is not invertible (fewer usable rows than dimensions, no
    ridge).
    """
    (n, d), width = rows_pool.shape, rows_target.shape[1]
    if d != width:
        raise UserError(f"pool rows have {d} dimensions and target rows {width}", remedy="Use one projection for both.")
    if not 0 <= ridge < torch.inf:
        raise ConfigError(f"ridge is {ridge}", remedy="Pass a number of 0 or more.")
    target = _raw(rows_target, slice(0, rows_target.shape[0])).double()
    gram = torch.zeros(d, d, dtype=torch.float64, device=target.device)
    for start in range(0, n, BLOCK):
        block = _raw(rows_pool, slice(start, min(start + BLOCK, n))).to(target.device)
        gram += block.t() @ block
    gram.diagonal().add_(ridge * (float(gram.diagonal().mean()) if relative else 1.0))
    lower, failed = torch.linalg.cholesky_ex(gram)
    spread = float(lower.diagonal().min() / lower.diagonal().max()) if not bool(failed) else 0.0
    if spread < 1e-7:
        what = f"the Gram matrix of {n} rows in {d} dimensions is not invertible"
        raise ConfigError(what, remedy="Pass a ridge, or use fewer dimensions.")
    return torch.cholesky_solve(target.t(), lower).t().float()


def _raw(rows: Rows, where: slice) -> Tensor:
    block, scales = rows[where].float(), getattr(rows, "scales", None)
    return block if scales is None else block * scales[where, None].to(block.device)
