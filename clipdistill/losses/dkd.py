"""Decoupled knowledge distillation (DKD): KL split into target class versus the rest, and within the rest.

Source: Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022, arXiv 2203.08679).

Shape suffixes: B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.losses._common import (
    LossSum,
    check_labels,
    check_temperature,
    logit_pair,
    matching_matrices,
    mean_over_rows,
    outside_autocast,
    tempered,
)
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper
from clipdistill.settings import Positive


class DKD(Loss):
    """``dkd_loss`` as a term."""

    loss: Literal["dkd"] = "dkd"
    over: Literal["prompts", "captions"] = "prompts"
    alpha: float = 1.0
    """Factor of the target-class part (TCKD)."""
    beta: float = 1.0
    """Factor of the part within the other classes (NCKD)."""
    temperature: Positive = 1.0
    """Temperature of the logits; the loss is multiplied by its square."""

    papers: ClassVar = (
        Paper(
            key="zhao2022dkd",
            title="Decoupled Knowledge Distillation",
            author="Zhao, Borui and Cui, Quan and Song, Renjie and Qiu, Yiyu and Liang, Jiajun",
            year=2022,
            arxiv="2203.08679",
        ),
    )

    @property
    def needs_labels(self) -> bool:
        """Only over prompts: over captions, the target is the row's matching pair."""
        return self.over == "prompts"

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, ``dkd``."""
        student, teacher = comparison.pair
        assert comparison.target_B is not None
        sums = dkd_sums(
            student.logits_BC,
            teacher.logits_BC,
            comparison.target_B,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
        return LossParts.single("dkd", sums.numerator / rows)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """``T^2 / B * sum_b (alpha * TCKD_b + beta * NCKD_b)``.

    With p = softmax(t/T), q = softmax(s/T) and y the label, the terms of arXiv 2203.08679 are

        TCKD = KL([p_y, 1 - p_y] || [q_y, 1 - q_y])        target class versus the rest
        NCKD = KL(p restricted to j != y || q restricted to j != y), both renormalised to sum to 1

    Relation to plain KL: ``KL(p || q) = TCKD + (1 - p_y) NCKD``; DKD removes the factor ``1 - p_y`` of NCKD,
    which is small when the teacher is confident.

    Args:
        student_logits: (B, C) with C >= 2, any floating type; half precision is computed in float32.
        teacher_logits: (B, C), treated as a constant.
        labels: (B,) integers in [0, C). On a GPU the check of their range waits for the device; labels on the
            CPU do not.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, above 0.

    Returns:
        0-d, in nats, the mean over the batch; the gradient goes to the student's logits only. A logit that is
        not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, C < 2, labels outside [0, C), a temperature not above 0.
    """
    (student_BC,) = matching_matrices(student_logits=student_logits)
    labels = check_labels(labels, student_BC, wait_for_device=True)
    return dkd_sums(student_BC, teacher_logits, labels, alpha=alpha, beta=beta, temperature=temperature).value


def dkd_sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> LossSum:
    """``dkd_loss`` as a sum over rows and its denominator B.

    No GPU synchronisation: the range of labels on a GPU is left to the indexing kernels, which abort the
    program on a bad label.
    """
    student_BC, teacher_BC = logit_pair(student_logits, teacher_logits)
    if student_BC.shape[1] < 2:
        raise ValueError(f"student_logits must have at least 2 classes, got shape {tuple(student_BC.shape)}")
    check_temperature("temperature", temperature)
    target_B1 = check_labels(labels, student_BC, wait_for_device=False)[:, None]
    with outside_autocast(student_BC):
        is_target_BC = torch.zeros_like(student_BC, dtype=torch.bool).scatter_(1, target_B1, True)
        margin_s_B, log_q_BC = _split(tempered(student_BC, temperature), target_B1, is_target_BC)
        margin_t_B, log_p_BC = _split(tempered(teacher_BC, temperature), target_B1, is_target_BC)
        tckd = _kl(F.logsigmoid(margin_s_B), F.logsigmoid(margin_t_B))
        tckd = tckd + _kl(F.logsigmoid(-margin_s_B), F.logsigmoid(-margin_t_B))
        nckd = _kl(log_q_BC, log_p_BC)
        return mean_over_rows(temperature**2 * (alpha * tckd + beta * nckd), len(student_BC))


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _split(logits_BC: Tensor, target_B1: Tensor, is_target_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds of target versus rest (B,), and log-probabilities within the rest (B, C), 0 at the target."""
    rest_BC = logits_BC.masked_fill(is_target_BC, -torch.inf)
    margin_B = logits_BC.gather(1, target_B1).squeeze(1) - rest_BC.logsumexp(1)
    return margin_B, torch.log_softmax(rest_BC, 1).masked_fill(is_target_BC, 0)
