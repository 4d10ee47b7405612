"""Feature distillation: match the student's features to the teacher's, by cosine or squared distance.

Source: ``mse`` is the feature distillation (FD) of CLIP-KD, Yang et al. (CVPR 2024, arXiv 2307.12732).

Shape suffixes: B rows of a batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from clipdistill.losses._common import LossSum, matching_matrices, mean_over_rows, outside_autocast
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper

FeatureKind = Literal["cosine", "mse"]


class Feature(Loss):
    """``feature_loss`` as a term: on the images' features, or on the images' and the captions'."""

    loss: Literal["feature"] = "feature"
    over: Literal["images", "captions"] = "images"
    kind: FeatureKind = "cosine"
    """cosine, or mse: mean squared difference over the dimensions."""

    papers: ClassVar = (
        Paper(
            key="yang2023clipkd",
            title="CLIP-KD: An Empirical Study of CLIP Model Distillation",
            author="Yang, Chuanguang and An, Zhulin and Huang, Libo and Bi, Junyu and Yu, Xinqiang and Yang, Han and "
            "Diao, Boyu and Xu, Yongjun",
            year=2023,
            arxiv="2307.12732",
        ),
    )
    needs_logits: ClassVar = False
    needs_equal_widths: ClassVar = True

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, named after its kind."""
        student, teacher = comparison.pair
        return LossParts.single(
            self.kind, feature_sums(student.rows_BD, teacher.rows_BD, kind=self.kind).numerator / rows
        )


def feature_loss(student: Tensor, teacher: Tensor, *, kind: FeatureKind = "cosine") -> Tensor:
    """Distance of the student's features from the teacher's.

        cosine:  1/B sum_b (1 - cos(student_b, teacher_b))
        mse:     1/B sum_b 1/D sum_d (student_bd - teacher_bd)^2, of the features as given

    On L2-normalised features ``mse = 2/D * cosine``. Unlike KL over class logits, it uses no text features.

    Args:
        student: (B, D), any floating type; half precision is computed in float32.
        teacher: (B, D), treated as a constant.
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
