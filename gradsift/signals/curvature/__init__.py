"""Curvature-corrected influence: fit K-FAC or EK-FAC over data, stream exact influence past it, and TRAK's target side."""

from gradsift.signals.curvature.exact import Targets, influence_scores, prepare_targets, rank_agreement, score_pool
from gradsift.signals.curvature.fit import Fitting, fit
from gradsift.signals.curvature.fitted import Curvature
from gradsift.signals.influence import trak_target

__all__ = ["Curvature", "Fitting", "Targets", "fit", "influence_scores", "prepare_targets", "rank_agreement", "score_pool", "trak_target"]
