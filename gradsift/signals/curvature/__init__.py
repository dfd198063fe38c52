"""Curvature-corrected influence: fit K-FAC or EK-FAC over data, stream exact influence past it, and
TRAK's target side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsift.types import lazy_face

if TYPE_CHECKING:
    from gradsift.signals.curvature.exact import (
        Targets,
        influence_scores,
        prepare_targets,
        rank_agreement,
        score_pool,
    )
    from gradsift.signals.curvature.fit import Fitting
    from gradsift.signals.curvature.fitted import Curvature
    from gradsift.signals.influence import trak_target

_HOMES = {
    "Curvature": "fitted",
    "Fitting": "fit",
    "Targets": "exact",
    "influence_scores": "exact",
    "prepare_targets": "exact",
    "rank_agreement": "exact",
    "score_pool": "exact",
    "trak_target": ".influence",
}

# Not `fit`: the function would hide the module `gradsift.signals.curvature.fit` that holds it.
__all__ = [
    "Curvature",
    "Fitting",
    "Targets",
    "influence_scores",
    "prepare_targets",
    "rank_agreement",
    "score_pool",
    "trak_target",
]
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
