"""Distillation losses: tensors in, a 0-d loss out, or sums with their denominator for a trainer.

Each loss has its own file. ``<name>_loss`` is the loss of a batch; ``<name>_sums`` the same as a ``LossSum``, to be
summed over micro-batches and ranks and divided once (``dist_loss`` couples its rows and has none). A subclass of
``base.Loss`` is its term in the objective: settings, needs, papers. ``<name>_loss_from_features`` computes it from the
embeddings, without a logit matrix.
"""

from typing import TYPE_CHECKING

from clipdistill.losses._common import LossSum
from clipdistill.losses.base import Comparison, Implementation, Loss, LossParts, Paper
from clipdistill.losses.clip import CLIP, adjusted_logits, clip_loss, contrastive_sums, positive_targets
from clipdistill.losses.dist import DIST, dist_loss
from clipdistill.losses.dkd import DKD, dkd_loss, dkd_sums
from clipdistill.losses.feature import Feature, FeatureKind, feature_loss, feature_sums
from clipdistill.losses.fused import gkl_denominators_from_features, gkl_loss_from_features, kd_loss_from_features
from clipdistill.losses.fused_common import (
    FUSED_FROM,
    FusedImplementation,
    GKLDenominators,
    GKLOutput,
    GKLSums,
    fused_wins,
)
from clipdistill.losses.gkl import GKL, gkl_denominator, gkl_loss, gkl_sums
from clipdistill.losses.icl import ICL, icl_loss
from clipdistill.losses.kd import KL, kd_loss, kd_sums
from clipdistill.losses.prior import ClassPrior, TopKPrior
from clipdistill.settings import union_of

LOSSES: tuple[type[Loss], ...] = (GKL, KL, DKD, DIST, CLIP, Feature, ICL)
"""All losses that a config may name."""

if TYPE_CHECKING:
    Term = Loss
else:
    Term = union_of(LOSSES, "loss")
"""Settings of one term of the objective; ``loss`` names the loss."""

__all__ = [
    "FUSED_FROM",
    "LOSSES",
    "ClassPrior",
    "Comparison",
    "FeatureKind",
    "FusedImplementation",
    "GKLDenominators",
    "GKLOutput",
    "GKLSums",
    "Implementation",
    "Loss",
    "LossParts",
    "LossSum",
    "Paper",
    "Term",
    "TopKPrior",
    "adjusted_logits",
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
    "icl_loss",
    "kd_loss",
    "kd_loss_from_features",
    "kd_sums",
    "positive_targets",
]
