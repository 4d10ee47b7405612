"""The contrastive image-text loss of CLIP, with several positives for repeated captions.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (arXiv
2103.00020), figure 3.

Shape suffixes: B pairs (rows), N pairs gathered over ranks (columns), C columns of any kind, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from clipdistill.losses._common import LossSum, matching_matrices, mean_over_rows, outside_autocast
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper
from clipdistill.settings import Positive


class CLIP(Loss):
    """``clip_loss`` as a term: no teacher. Over prompts, the cross-entropy with the labels."""

    loss: Literal["clip"] = "clip"
    over: Literal["captions", "prompts"] = "captions"
    adjustment: Positive | None = None
    """Over prompts: strength of the logit adjustment, for training sets whose classes differ in frequency (needs
    ``labels: dataset``); see ``adjusted_logits``. 1: consistent with the balanced error; empty: none."""

    @field_validator("adjustment")
    @classmethod
    def _adjustment_is_of_prompts(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("over") != "prompts":
            raise ValueError("empty, or a number with over: prompts")
        return value

    papers: ClassVar = (
        Paper(
            key="radford2021clip",
            title="Learning Transferable Visual Models From Natural Language Supervision",
            author="Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and "
            "Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and "
            "Krueger, Gretchen and Sutskever, Ilya",
            year=2021,
            arxiv="2103.00020",
        ),
    )

    @property
    def needs_teacher(self) -> bool:
        """The targets are labels or captions."""
        return False

    @property
    def needs_labels(self) -> bool:
        """Over prompts, the positive is the sample's class."""
        return self.over == "prompts"

    @property
    def needs_class_counts(self) -> bool:
        """The adjustment is by the classes' frequencies."""
        return self.adjustment is not None

    @property
    def needs_caption_ids(self) -> bool:
        """Over captions, the positives are all captions equal to the row's caption."""
        return self.over == "captions"

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, ``clip``."""
        assert comparison.student is not None
        logits_BC = comparison.student.logits_BC
        if comparison.row_ids_B is not None and comparison.column_ids_C is not None:
            positive_BC = positive_targets(comparison.row_ids_B, comparison.column_ids_C, dtype=logits_BC.dtype)
        else:
            assert comparison.target_B is not None
            positive_BC = F.one_hot(comparison.target_B, logits_BC.shape[1]).to(logits_BC)
        if self.adjustment is not None:
            assert comparison.class_counts_C is not None
            logits_BC = adjusted_logits(logits_BC, comparison.class_counts_C, strength=self.adjustment)
        return LossParts.single("clip", contrastive_sums(logits_BC, positive_BC).numerator / rows)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    caption_ids: Tensor | None = None,
) -> Tensor:
    """Symmetric contrastive loss: the mean of the image-to-text and the text-to-image cross-entropy.

    With ``logits = logit_scale * image @ text.T + logit_bias`` (arXiv 2103.00020, figure 3) and y the target
    distribution, ``loss = 1/(2B) sum_b (CE(y_b, softmax(logits_b)) + CE(y_b, softmax(logits.T_b)))``. y is
    one-hot at the matching pair; with ``caption_ids`` it is uniform over the pairs whose caption id is the row's,
    so that equal captions do not repel each other. It uses no teacher: KL compares with a teacher's
    distribution, this loss with y.

    Args:
        image_features: (B, D), L2-normalised by the caller, any floating type; half precision is computed in
            float32.
        text_features: (B, D), also L2-normalised; row b matches image b.
        logit_scale: multiplies the cosine: a model's ``logit_scale.exp()``, 0-d or a number.
        logit_bias: added to the logits, 0-d or a number. A softmax ignores it.
        caption_ids: (B,) integers, equal where captions are equal.

    Returns:
        0-d, in nats, the mean over the batch and both directions; the gradient goes to both features and to
        logit_scale. A feature that is not finite makes the loss nan.

    Raises:
        ValueError: wrong shapes or types.
    """
    image_BD, text_BD = matching_matrices(image_features=image_features, text_features=text_features)
    rows = len(image_BD)
    if caption_ids is None:
        target_BB = torch.eye(rows, device=image_BD.device)
    elif tuple(caption_ids.shape) == (rows,):
        target_BB = positive_targets(caption_ids, caption_ids, dtype=image_BD.dtype)
    else:
        raise ValueError(f"caption_ids must have shape ({rows},), got {tuple(caption_ids.shape)}")
    with outside_autocast(image_BD):
        logits_BB = logit_scale * image_BD @ text_BD.T
        if logit_bias is not None:
            logits_BB = logits_BB + logit_bias
        both_directions = contrastive_sums(logits_BB, target_BB) + contrastive_sums(logits_BB.T, target_BB)
        return both_directions.value


def adjusted_logits(logits_BC: Tensor, class_counts_C: Tensor, *, strength: float = 1.0) -> Tensor:
    """``logits + strength * log(frequency)``: the logits of a cross-entropy that treats rare classes as frequent ones.

    Equation 10 of Menon et al. 2021, Long-tail learning via logit adjustment (arXiv 2007.07314): a softmax over them is
    that of the training set's frequencies, so the logits themselves become those of equally frequent classes. Only the
    loss uses them; predictions use the logits. GKL's class prior holds no frequencies and does not replace this.

    Args:
        logits_BC: (B, C).
        class_counts_C: (C,) training samples of each class, as often as training sees them; a class without any counts
            as one sample.
        strength: tau.

    Returns:
        (B, C), with the gradient of the logits.

    Raises:
        ValueError: wrong shapes.
    """
    if tuple(class_counts_C.shape) != (logits_BC.shape[1],):
        raise ValueError(f"class_counts_C must have shape ({logits_BC.shape[1]},), got {tuple(class_counts_C.shape)}")
    counts_C = class_counts_C.to(logits_BC.device, torch.float32).clamp(min=1)
    return logits_BC + strength * (counts_C / counts_C.sum()).log()


def positive_targets(row_ids_B: Tensor, column_ids_N: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Target distributions (B, N): row b uniform over the columns with its caption id.

    A row whose id no column has is nan.

    Raises:
        ValueError: ids that are not 1-D integers.
    """
    for ids in (row_ids_B, column_ids_N):
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"caption ids must be 1-D integers, got {ids.dtype} of shape {tuple(ids.shape)}")
    positive_BN = (row_ids_B[:, None] == column_ids_N[None, :]).to(dtype)
    return positive_BN / positive_BN.sum(1, keepdim=True)


def contrastive_sums(logits_BC: Tensor, target_BC: Tensor) -> LossSum:
    """Cross-entropy to given distributions, ``-sum_b sum_j y_bj log_softmax(logits)_bj`` over B.

    One direction of ``clip_loss``. Rows are independent: pass the logits of the local rows and the columns gathered
    over all ranks.

    Args:
        logits_BC: (B, C) scaled similarities.
        target_BC: (B, C), rows sum to 1, treated as constants; see ``positive_targets``.

    Returns:
        LossSum in nats; the gradient goes to the logits.

    Raises:
        ValueError: wrong shapes or types.
    """
    logits_BC, target_BC = matching_matrices(logits_BC=logits_BC, target_BC=target_BC.detach())
    with outside_autocast(logits_BC):
        return mean_over_rows(-(target_BC * torch.log_softmax(logits_BC, 1)).sum(), len(logits_BC))
