"""Influence scores: what happens to a row before a dot product, and the streaming product itself.

score(i, j) = sum over checkpoints of weight_t * <A g_i, B q_j>, g_i the gradient of pool row i, q_j
of target row j. Positive = training on i helps j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gradsift.compute.cpu import matmul
from gradsift.errors import ConfigError, UserError
from gradsift.rules.blocks import BLOCK, Raw, Unit, group_means, spans, stream, unit
from gradsift.signals.backends import Backend, backend
from gradsift.types import Rows, checkpoint_weights

RIDGE = 0.1
# rows widened to fp32 at a time for so few targets: they are still in the cache when they are
# multiplied
_SLICE, _NARROW = 128, 128


def score(
    pool: Sequence[Rows], target: Sequence[Rows], weights: Sequence[float], name: str, **more: Any
) -> Tensor:
    """Scores [n, m], or [n, groups] (order of first appearance) for a backend that merges: what
    `score_blocks` yields, as one matrix.
    """
    return torch.cat(list(score_blocks(pool, target, weights, name, **more)))


def score_blocks(
    pool: Sequence[Rows],
    target: Sequence[Rows],
    weights: Sequence[float],
    name: str,
    *,
    groups: Sequence[str] = (),
    ridge: float = RIDGE,
    absolute: bool = False,
) -> Iterator[Tensor]:
    """Yields scores [b, m] of 2,048 pool rows after the other (one empty block for an empty pool),
    fp32, on the CPU.

    `pool` and `target` hold one Rows per checkpoint, all of the same projection; `weights` are
    normalised to sum 1. Raw rows are read as unit rows times their `scales`. Products accumulate in
    fp32: the result does not depend on how the pool is cut. `ridge`: of a backend that whitens, in
    units of the mean diagonal of X'X at each checkpoint, or the very number when `absolute`. Raises
    UserError if the sides differ in number of checkpoints or dimension, ConfigError where X'X +
    ridge I has no inverse.
    """
    chosen = backend(name)
    if chosen.curvature is not None:
        raise UserError(
            f"the backend {name} reads whole gradients, not stored rows",
            remedy="Use gradsift.signals.curvature.influence_scores.",
        )
    if not len(pool) == len(target) == len(weights):
        raise UserError(
            f"{len(pool)} pool stores, {len(target)} target stores and {len(weights)} weights do"
            " not pair up"
        )
    for rows, wanted in zip(pool, target, strict=True):
        if rows.shape[1] != wanted.shape[1]:
            raise UserError(
                f"pool rows have {rows.shape[1]} dimensions and target rows {wanted.shape[1]}: not"
                " the same projection"
            )
    shares = checkpoint_weights(weights)
    sides = [
        _target_side(rows, chosen, groups) * share
        for rows, share in zip(target, shares, strict=True)
    ]
    if chosen.whiten:
        sides = [
            trak_target(rows, side, ridge, relative=not absolute)
            for rows, side in zip(pool, sides, strict=True)
        ]
    return _products(pool, sides, chosen.pool)


def _products(
    pool: Sequence[Rows], sides: Sequence[Tensor], form: Literal["raw", "unit"]
) -> Iterator[Tensor]:
    n = pool[0].shape[0]
    for where in (slice(a, b) for a, b in spans(n) or [(0, 0)]):
        scores = torch.zeros(where.stop - where.start, sides[0].shape[0])
        for rows, side in zip(pool, sides, strict=True):
            scores += _product(rows, where, side, form)
        yield scores


def _product(rows: Rows, where: slice, side: Tensor, form: Literal["raw", "unit"]) -> Tensor:
    """`_in_form(rows, form)[where] @ side.T` [b, m] on the CPU: what a row is scaled by, its
    product is scaled by.
    """
    scales = getattr(rows, "scales", None)
    unscaled = rows if scales is not None else _in_form(rows, form)
    on_device = isinstance(rows, Tensor) and rows.device.type != "cpu"
    step = _SLICE if len(side) <= _NARROW and not on_device else BLOCK
    out = torch.empty(where.stop - where.start, len(side))
    for start in range(where.start, where.stop, step):
        part = slice(start, min(start + step, where.stop))
        out[start - where.start : part.stop - where.start] = matmul.linear(
            unscaled[part].float(), side
        )
    return (
        out.mul_(scales[where, None].to(out.device))
        if scales is not None and form == "raw"
        else out
    )


def _target_side(rows: Rows, chosen: Backend, groups: Sequence[str]) -> Tensor:
    """fp32 [m, d], or [groups, d] when merged. A group's mean is taken over raw rows, then brought
    to unit norm.
    """
    whole = slice(0, rows.shape[0])
    if not chosen.merge:
        return _in_form(rows, chosen.target)[whole].float()
    means, _ = group_means(Raw(rows)[whole], groups)
    return unit(means) if chosen.target == "unit" else means


def _in_form(rows: Rows, form: Literal["raw", "unit"]) -> Rows:
    """The rows at the length that a backend takes. Rows that carry `scales` are at unit length as
    they are.
    """
    if form == "raw":
        return Raw(rows)
    return Unit(rows) if getattr(rows, "scales", None) is None else rows


def trak_target(
    rows_pool: Rows, rows_target: Rows, ridge: float = 0.0, *, relative: bool = False
) -> Tensor:
    """(X^T X + ridge I)^-1 q for every target row q: fp32 [m, d]. Scores are then plain dot
    products with the raw pool rows X [n, d].

    TRAK, arXiv 2303.14186, equation 15. For its scores to mean what they do there, both sides must
    be rows of the model's output function (the margin, the log-odds of the right answer), not of
    the loss. Rows that carry `scales` (unit rows of a store) are read as raw rows. `relative`:
    ridge in units of the mean diagonal of X^T X. The Gram matrix is summed over blocks of 2,048
    rows, products in fp32, their sum in fp64; memory 16 d^2 bytes.

    Raises UserError for sides of different width, ConfigError when the matrix is not invertible
    (fewer usable rows than dimensions, no ridge).
    """
    (n, d), width = rows_pool.shape, rows_target.shape[1]
    if d != width:
        raise UserError(
            f"pool rows have {d} dimensions and target rows {width}",
            remedy="Use one projection for both.",
        )
    if not 0 <= ridge < torch.inf:
        raise ConfigError(f"ridge is {ridge}", remedy="Pass a number of 0 or more.")
    target = Raw(rows_target)[0 : rows_target.shape[0]].double()
    gram = torch.zeros(d, d, dtype=torch.float64, device=target.device)
    for _, _, block in stream(Raw(rows_pool)):
        here = block.to(target.device)
        gram += here.t() @ here
    gram.diagonal().add_(ridge * (float(gram.diagonal().mean()) if relative else 1.0))
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal()
    if bool(failed) or float(pivots.min() / pivots.max()) < 1e-7:
        what = f"the Gram matrix of {n} rows in {d} dimensions is not invertible"
        raise ConfigError(what, remedy="Pass a ridge, or use fewer dimensions.")
    return torch.cholesky_solve(target.t(), lower).t().float()
