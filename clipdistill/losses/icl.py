"""Interactive contrastive learning: the student's features of one modality against the teacher's of the other.

Source: CLIP-KD, Yang et al. (CVPR 2024, arXiv 2307.12732), section 3.3.4, equations 12 to 14.

Shape suffixes: B pairs, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clipdistill.losses._common import matching_matrices, outside_autocast
from clipdistill.losses.base import Comparison, Loss, LossParts
from clipdistill.losses.clip import contrastive_sums, positive_targets
from clipdistill.losses.feature import Feature


class ICL(Loss):
    """``icl_loss`` as a term; the student's features are projected where the teacher's have another width.

    The multiplier of the cosines is the student's. With ``student.text: teacher`` only the direction of the images has
    a gradient: the captions' features are the teacher's own.
    """

    loss: Literal["icl"] = "icl"
    over: Literal["captions"] = "captions"

    papers: ClassVar = Feature.papers
    needs_equal_widths: ClassVar = True

    @property
    def needs_caption_ids(self) -> bool:
        """The positives are all captions equal to the row's caption."""
        return True

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, ``icl``."""
        student, teacher = comparison.pair
        assert comparison.row_ids_B is not None
        assert comparison.column_ids_C is not None
        target_BC = positive_targets(comparison.row_ids_B, comparison.column_ids_C, dtype=student.rows_BD.dtype)
        with outside_autocast(student.rows_BD):
            logits_BC = student.scale * student.rows_BD @ teacher.columns_CD.detach().T
            if student.bias is not None:
                logits_BC = logits_BC + student.bias  # without effect; but every parameter then has a gradient
        return LossParts.single("icl", contrastive_sums(logits_BC, target_BC).numerator / rows)


def icl_loss(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *,
    logit_scale: Tensor | float,
    caption_ids: Tensor | None = None,
) -> Tensor:
    """Mean of two contrastive losses: the student's images to the teacher's texts, its texts to the teacher's images.

    ``1/(2B) sum_b (CE(y_b, softmax(s v_b^S . u^T)) + CE(y_b, softmax(s u_b^S . v^T)))`` with s the ``logit_scale``, v
    and u the features of images and texts, and y as in ``clip_loss``. Unlike in the contrastive loss of the student
    alone, the features that it is compared with are good from the first step.

    Args:
        student_image: (B, D), L2-normalised by the caller, in the teacher's space; any floating type, half precision is
            computed in float32.
        student_text: (B, D), row b matches image b.
        teacher_image: (B, D), treated as a constant.
        teacher_text: (B, D), treated as a constant.
        logit_scale: multiplies the cosine.
        caption_ids: (B,) integers, equal where captions are equal.

    Returns:
        0-d, in nats, the mean over the batch and both directions; the gradient goes to the student's features and to
        logit_scale.

    Raises:
        ValueError: wrong shapes or types.
    """
    image_BD, teacher_text_BD = matching_matrices(student_image=student_image, teacher_text=teacher_text.detach())
    text_BD, teacher_image_BD = matching_matrices(student_text=student_text, teacher_image=teacher_image.detach())
    matching_matrices(student_image=image_BD, student_text=text_BD)
    ids_B = torch.arange(len(image_BD), device=image_BD.device) if caption_ids is None else caption_ids
    if tuple(ids_B.shape) != (len(image_BD),):
        raise ValueError(f"caption_ids must have shape ({len(image_BD)},), got {tuple(ids_B.shape)}")
    target_BB = positive_targets(ids_B, ids_B, dtype=image_BD.dtype)
    with outside_autocast(image_BD):
        of_images = contrastive_sums(logit_scale * image_BD @ teacher_text_BD.T, target_BB)
        of_texts = contrastive_sums(logit_scale * text_BD @ teacher_image_BD.T, target_BB)
        return (of_images + of_texts).value
