"""What the stages of a selection saw: handed over beside its signals, so that a report never goes
back to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


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
