"""What the stages of a selection saw: handed over beside its signals, so that a report never goes
back to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from gradsift.data.records import Dropped
    from gradsift.types import Rows


@dataclass(frozen=True)
class CurvatureEvidence:
    """One influence through the curvature: how it was fitted and how it was damped.

    Args:
        rows: pool rows that the curvature was fitted on; None where the fit is gone.
        damping: damping over the mean eigenvalue of a layer, {"least", "median", "most"}.
        rank: at which the target's gradients are kept; None = whole.
        agreement: Spearman correlation of low-rank scores with whole ones,
            {"rows", "targets", "least", "mean"}; None where all targets are whole.
    """

    rows: int | None
    damping: Mapping[str, float]
    rank: int | None
    agreement: Mapping[str, Any] | None


@dataclass(frozen=True)
class Vectors:
    """Rows that a selection can be drawn from, and those of the target beside them.

    Args:
        kind: what the rows are; "influence" = the scores of a row on every target row.
        pool: Rows [n, d] over the whole pool.
        usable: bool [n], the pool rows that have one.
        target: Rows [m, d] over the whole target; None where the method made none.
        target_usable: bool [m], the target rows that have one.
        adam: whether the pool's rows are Adam directions; those of the target never are.
    """

    kind: Literal["gradients", "embeddings", "features", "influence"]
    pool: Rows
    usable: np.ndarray
    target: Rows | None = None
    target_usable: np.ndarray | None = None
    adam: bool = False


@dataclass(frozen=True)
class Helped:
    """Influence on every target row, where no rows of the target are stored.

    Args:
        scores: [n, m] over the whole pool; positive = training on the pool row helps.
        target: int [m], the target rows behind the columns.
    """

    scores: Tensor
    target: np.ndarray


@dataclass(frozen=True)
class Evidence:
    """Facts about the n pool rows and about the artifacts that a method read.

    Args:
        lengths: tokens of each encoded row, int [n]; 0 where a row could not be encoded.
        supervised: supervised tokens of each row, int [n].
        norms: L2 norms of the unprojected gradients at the last checkpoint, fp32 [n]; None where
            the method read no stored rows.
        losses: mean nats per supervised token, fp32 [n]: of the base model where the method read
            that signal, else at the last checkpoint.
        mean_cosine: mean pairwise cosine of the stored rows at the last checkpoint.
        coverage: share and kinds of the layers that the gradients cover, as their stage noted.
        curvature: one record for each influence through the curvature.
        artifacts: folder name -> recipe digest of every stage that the selection read.
        warnings: shards made on several kinds of GPU, halved batches.
        seeds: of warm-up, adapter and projection.
        vectors: rows to draw a map from, and to find the nearest target row by.
        helped: influence on every target row, where it was made through the curvature.
        tuned: target group -> (optimiser steps, rows) of the training on it, where the method
            read the signal "tuned".
        warmup_losses: of every optimiser step of the warm-up, nats per supervised token; empty
            where the method read none, or where it was brought along.
        checkpoints: optimiser steps of the checkpoints that were read.
        dropped: pool rows that could not be encoded.
    """

    lengths: np.ndarray
    supervised: np.ndarray
    norms: np.ndarray | None = None
    losses: np.ndarray | None = None
    mean_cosine: float | None = None
    coverage: Mapping[str, Any] | None = None
    curvature: tuple[CurvatureEvidence, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seeds: Mapping[str, int] = field(default_factory=dict)
    vectors: Vectors | None = None
    helped: Helped | None = None
    tuned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    warmup_losses: tuple[float, ...] = ()
    checkpoints: tuple[int, ...] = ()
    dropped: tuple[Dropped, ...] = ()
