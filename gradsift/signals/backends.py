"""The table of influence backends: what happens to a row of each side before the dot product. Names
and words, no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradsift.errors import UnknownName

if TYPE_CHECKING:
    from gradsift.gradients.objectives import Loss
    from gradsift.types import Signal


@dataclass(frozen=True)
class Backend:
    """One line of the table: `pool` and `target` say whether rows enter raw or at unit norm;
    `merge` whether a group's target rows are first averaged (raw) into one; `transform` what the
    pool's rows carry unless a method asks otherwise; `loss`: what the rows of both sides are
    gradients of; `whiten`: target rows are multiplied by (X'X + ridge I)^-1 of the pool rows X;
    `curvature`: settings it fixes, over those of the run, where scores go through the inverse
    curvature of whole gradients and no stored row is read.
    """

    pool: Literal["raw", "unit"]
    target: Literal["raw", "unit"]
    transform: Literal["none", "adam"] = "none"
    merge: bool = False
    source: str = ""
    loss: Loss = "cross-entropy"
    whiten: bool = False
    curvature: Mapping[str, Any] | None = None


# Token sums before the outer product, true labels, factored damping 0.5, two target rows at a time,
# an odd one lost.
RELEASED: Mapping[str, Any] = {
    "form": "reduce",
    "labels": "empirical",
    "correct": False,
    "style": "pi",
    "damping": 0.5,
    "absolute": True,
    "rank": 32,
    "target_batch": 2,
    "drop_last": True,
}

BACKENDS: dict[str, Backend] = {
    "dot": Backend("raw", "raw", source="first-order influence (TracIn, arXiv 2002.08484)"),
    "cosine": Backend("unit", "unit", source="the same at unit norm, free of length bias"),
    "less": Backend(
        "unit",
        "unit",
        transform="adam",
        source="LESS, arXiv 2402.04333; released code: one column per target row",
    ),
    "less-mean": Backend(
        "unit",
        "unit",
        transform="adam",
        merge=True,
        source="LESS as in the paper: one column per target group, its mean gradient",
    ),
    "trak": Backend(
        "raw",
        "raw",
        loss="margin",
        whiten=True,
        source="TRAK, arXiv 2303.14186, equation 15, without the weights 1 - p of pool rows",
    ),
    "ekfac": Backend(
        "raw", "raw", source="influence functions by EK-FAC, arXiv 2308.03296", curvature={}
    ),
    "kfac": Backend(
        "raw",
        "raw",
        source="the same by K-FAC, without corrected eigenvalues",
        curvature={"correct": False},
    ),
    "kfac-released": Backend(
        "raw", "raw", source="G-DIG, arXiv 2405.12915, released code", curvature=RELEASED
    ),
}


def backend(name: str) -> Backend:
    """A line of BACKENDS. Raises UnknownName."""
    if name not in BACKENDS:
        raise UnknownName("influence backend", name, BACKENDS)
    return BACKENDS[name]


def pool_transform(signal: Signal) -> str:
    """What the pool's rows of a signal carry: what it says, or what its backend takes. Raises
    UnknownName.
    """
    return (
        backend(str(signal.backend)).transform
        if signal.transform == "backend"
        else signal.transform
    )


def through_curvature(signal: Signal) -> bool:
    """Whether a signal is an influence that reads whole gradients, not stored rows. Raises
    UnknownName.
    """
    return signal.name == "influence" and backend(str(signal.backend)).curvature is not None
