"""Curvature-corrected influence: fit K-FAC or EK-FAC over data, stream exact influence past it, and TRAK's target side."""

from gradsift.curvature.fit import Fitting, fit
from gradsift.curvature.fitted import Curvature
from gradsift.curvature.scores import Targets, influence_scores, prepare_targets, rank_agreement, score_pool
from gradsift.curvature.trak import trak_target

__all__ = ["Curvature", "Fitting", "Targets", "fit", "influence_scores", "prepare_targets", "rank_agreement", "score_pool", "trak_target"]
