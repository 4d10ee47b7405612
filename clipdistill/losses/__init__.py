"""Distillation losses: tensors in, a 0-d loss out, or sums with their denominator for a trainer.

Each loss comes in two layers. ``<name>_loss`` is the whole loss of a batch. ``<name>_sums`` is the same as a
``LossSum``: add those of all micro-batches and ranks and divide once. (``dist_loss`` couples its rows and has
no sums.) ``<name>_from_features`` is the same from the embeddings, without a matrix of logits.
"""

from clipdistill.losses._common import LossSum
from clipdistill.losses.clip import clip_loss, contrastive_sums, positive_targets
from clipdistill.losses.dist import dist_loss
from clipdistill.losses.dkd import dkd_loss, dkd_sums
from clipdistill.losses.feature import FeatureKind, feature_loss, feature_sums
from clipdistill.losses.fused import (
    GKLDenominators,
    gkl_denominators_from_features,
    gkl_loss_from_features,
    gkl_sums_from_features,
    kd_loss_from_features,
    kd_sums_from_features,
    soft_ce_sums_from_features,
)
from clipdistill.losses.fused_common import FUSED_FROM, Implementation, fused_wins
from clipdistill.losses.fused_prior import TopKPrior
from clipdistill.losses.gkl import (
    GKLOutput,
    GKLSums,
    gkl_denominator,
    gkl_loss,
    gkl_sums,
    gkl_weights,
    gkl_wmse_denominator,
    soft_ce_sums,
    wmse_sums,
)
from clipdistill.losses.kd import kd_loss, kd_sums

__all__ = [
    "FUSED_FROM",
    "FeatureKind",
    "GKLDenominators",
    "GKLOutput",
    "GKLSums",
    "Implementation",
    "LossSum",
    "TopKPrior",
    "clip_loss",
    "contrastive_sums",
    "dist_loss",
    "dkd_loss",
    "dkd_sums",
    "feature_loss",
    "feature_sums",
    "fused_wins",
    "gkl_denominator",
    "gkl_denominators_from_features",
    "gkl_loss",
    "gkl_loss_from_features",
    "gkl_sums",
    "gkl_sums_from_features",
    "gkl_weights",
    "gkl_wmse_denominator",
    "kd_loss",
    "kd_loss_from_features",
    "kd_sums",
    "kd_sums_from_features",
    "positive_targets",
    "soft_ce_sums",
    "soft_ce_sums_from_features",
    "wmse_sums",
]
