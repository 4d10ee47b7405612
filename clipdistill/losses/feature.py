"""Feature distillation: pull the student's features to the teacher's, by cosine or by squared distance.

Source: ``mse`` is the feature distillation (FD) of CLIP-KD, Yang et al. (CVPR 2024, arXiv 2307.12732).

Shape suffixes: B rows of a batch, D feature width.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from clipdistill.losses._common import LossSum, matching_matrices, mean_over_rows, outside_autocast

FeatureKind = Literal["cosine", "mse"]


def feature_loss(student: Tensor, teacher: Tensor, *, kind: FeatureKind = "cosine") -> Tensor:
    """Distance of the student's features from the teacher's.

        cosine:  1/B sum_b (1 - cos(student_b, teacher_b))
        mse:     1/B sum_b 1/D sum_d (student_bd - teacher_bd)^2, of the features as given

    On L2-normalised features ``mse = 2/D * cosine``. Unlike KL over class logits, no text takes part.

    Args:
        student: (B, D), any floating type; half precision is computed in float32.
        teacher: (B, D), taken as a constant.
        kind: "cosine" or "mse".

    Returns:
        0-d, without unit (cosine) or in squared feature units (mse), the mean over the batch; the gradient
        goes to the student only. A feature that is not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, an unknown kind.
    """
    return feature_sums(student, teacher, kind=kind).value


def feature_sums(student: Tensor, teacher: Tensor, *, kind: FeatureKind = "cosine") -> LossSum:
    """``feature_loss`` as a sum over rows and its denominator B."""
    student_BD, teacher_BD = matching_matrices(student=student, teacher=teacher.detach())
    with outside_autocast(student_BD):
        if kind == "cosine":
            distance_B = 1 - F.cosine_similarity(student_BD, teacher_BD, dim=1)
        elif kind == "mse":
            distance_B = (student_BD - teacher_BD).square().mean(1)
        else:
            raise ValueError(f"kind must be 'cosine' or 'mse', got {kind!r}")
        return mean_over_rows(distance_B.sum(), len(student_BD))
