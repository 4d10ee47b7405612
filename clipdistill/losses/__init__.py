"""Distillation losses: tensors in, a 0-d loss out, or sums with their denominator for a trainer.

Each loss comes in two layers. ``<name>_loss`` is the whole loss of a batch. ``<name>_sums`` is the same as a
``LossSum``: add those of all micro-batches and ranks and divide once. (``dist_loss`` couples its rows and has
no sums.)
"""

from clipdistill.losses._common import LossSum
from clipdistill.losses.clip import clip_loss, contrastive_sums, positive_targets
from clipdistill.losses.dist import dist_loss
from clipdistill.losses.dkd import dkd_loss, dkd_sums
from clipdistill.losses.feature import FeatureKind, feature_loss, feature_sums
from clipdistill.losses.gkl import (
    GKLOutput,
    gkl_loss,
    gkl_weights,
    gkl_wmse_denominator,
    soft_ce_sums,
    wmse_sums,
)
from clipdistill.losses.kd import kd_loss, kd_sums

__all__ = [
    "FeatureKind",
    "GKLOutput",
    "LossSum",
    "clip_loss",
    "contrastive_sums",
    "dist_loss",
    "dkd_loss",
    "dkd_sums",
    "feature_loss",
    "feature_sums",
    "gkl_loss",
    "gkl_weights",
    "gkl_wmse_denominator",
    "kd_loss",
    "kd_sums",
    "positive_targets",
    "soft_ce_sums",
    "wmse_sums",
]
