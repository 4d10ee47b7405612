"""Classical knowledge distillation (KD): temperature-scaled KL divergence.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.

Shape suffixes: B rows of a batch, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.losses._common import (
    LossSum,
    check_temperature,
    logit_pair,
    mean_over_rows,
    outside_autocast,
    tempered,
)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """``T^2 / B * sum_b KL(softmax(t_b/T) || softmax(s_b/T))``.

    Section 2 of arXiv 1503.02531, whose factor T^2 keeps the gradient's size when T changes.
    ``temperature=1`` is plain KL. The soft cross-entropy of GKL (``soft_ce_sums``) has no such factor and
    leaves out the teacher's entropy.

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C), taken as a constant.
        temperature: T, above 0.

    Returns:
        0-d, in nats, the mean over the batch; the gradient goes to the student's logits only. A logit that is
        not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, a temperature not above 0.
    """
    return kd_sums(student_logits, teacher_logits, temperature=temperature).value


def kd_sums(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> LossSum:
    """``kd_loss`` as a sum over rows and its denominator B."""
    student_BC, teacher_BC = logit_pair(student_logits, teacher_logits)
    check_temperature("temperature", temperature)
    with outside_autocast(student_BC):
        log_p_BC = torch.log_softmax(tempered(teacher_BC, temperature), 1)
        log_q_BC = torch.log_softmax(tempered(student_BC, temperature), 1)
        divergence = F.kl_div(log_q_BC, log_p_BC, reduction="sum", log_target=True)
        return mean_over_rows(temperature**2 * divergence, len(student_BC))
