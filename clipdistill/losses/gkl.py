"""Generalized Kullback-Leibler divergence (GKL): soft cross-entropy plus weighted MSE of logit differences.

Sources: Cui et al., "Decoupled Kullback-Leibler Divergence Loss" (NeurIPS 2024, arXiv 2305.13948) and
"Generalized Kullback-Leibler Divergence Loss" (arXiv 2503.08038).

The papers write the weighted MSE over pairs of classes. With ``W_b = sum_j w_bj``, ``delta = t - s`` and the
weighted mean ``mu_b = sum_j w_bj delta_bj / W_b`` the sum over pairs is a variance,

    1/4 sum_jk w_bj w_bk (delta_bj - delta_bk)^2  =  1/2 W_b sum_j w_bj (delta_bj - mu_b)^2

so time and memory are O(B C), not O(B C^2).

Shape suffixes: B rows of a batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipdistill.losses._common import (
    LossSum,
    at_least_float32,
    check_labels,
    check_temperature,
    logit_pair,
    matching_matrices,
    mean_over_rows,
    nan_where_softmax_hides_infinity,
    outside_autocast,
    tempered,
)


@dataclass(frozen=True)
class GKLOutput:
    """``loss = alpha * soft_ce + beta * wmse`` and its two parts: 0-d, in nats, each with its gradient."""

    loss: Tensor
    soft_ce: Tensor
    wmse: Tensor


def gkl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | None = None,
    labels: Tensor | None = None,
) -> GKLOutput:
    """GKL divergence of the student from the teacher: ``alpha * soft_ce + beta * wmse``.

        soft_ce = -1/B sum_b sum_j softmax(t/T)_bj log_softmax(s/T)_bj
        wmse    = 1/4 sum_b sum_jk w_bj w_bk (Dt_bjk - Ds_bjk)^2  /  sum_b sum_jk w_bj w_bk

    with ``Dt_bjk = t_bj - t_bk``, ``Ds_bjk = s_bj - s_bk`` and weights ``w = softmax(t/T2)^gamma``, or with
    class-wise information ``w_b = class_prior[labels_b]^gamma``. There is no factor T^2, and wmse sees the
    raw logits. GKL of arXiv 2503.08038; ``gamma=1`` is IKL of arXiv 2305.13948.

    Relation to plain KL: by Theorem 1 of arXiv 2305.13948, KL has the gradients of ``soft_ce + wmse``
    (``gamma=1``) with the gradient of wmse stopped at the student. A frozen teacher therefore leaves wmse
    idle in KL; here it trains the student. ``beta=0`` has KL's gradient.

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C).
        alpha: weight of the soft cross-entropy.
        beta: weight of the weighted MSE.
        gamma: in [0, 1]; 1 weights by the teacher's probabilities, 0 uniformly.
        temperature: T of the soft cross-entropy, above 0.
        weight_temperature: T2 of the weights, above 0. Has no effect with a class prior.
        class_prior: (C, C), row c the mean teacher prediction over the samples of class c. Zero entries are
            allowed; a row of zeros has no weighted mean and makes the loss nan.
        labels: (B,) integers in [0, C): the class of each row. Given together with class_prior or not at all.
            On a GPU the check of their range waits for the device; labels on the CPU do not.

    Returns:
        GKLOutput with ``loss``, ``soft_ce`` and ``wmse``: 0-d, in nats, means over the batch as above. The
        gradient goes to the student's logits only. A logit that is not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, gamma outside [0, 1], a temperature not above 0, labels outside
            [0, C), class_prior without labels or the reverse.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0, 0.0]])
        >>> out = gkl_loss(student, teacher, beta=0.5, gamma=0.6)
        >>> out.loss.backward()
        >>> [round(x, 4) for x in (out.soft_ce.item(), out.wmse.item(), out.loss.item())]
        [0.3607, 0.2435, 0.4824]
    """
    student_BC, teacher_BC = logit_pair(student_logits, teacher_logits)
    if labels is not None:
        labels = check_labels(labels, student_BC, wait_for_device=True)
    weight_BC = gkl_weights(
        teacher_BC, gamma=gamma, weight_temperature=weight_temperature, class_prior=class_prior, labels=labels
    )
    soft_ce = soft_ce_sums(student_BC, teacher_BC, temperature=temperature).value
    wmse = wmse_sums(student_BC, teacher_BC, weight_BC).value
    return GKLOutput(alpha * soft_ce + beta * wmse, soft_ce, wmse)


@torch.no_grad()
def gkl_weights(
    teacher_logits: Tensor,
    *,
    gamma: float,
    weight_temperature: float,
    class_prior: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """The weights of wMSE: ``softmax(t/T2)^gamma``, or ``class_prior[labels]^gamma``; arXiv 2503.08038.

    A probability 0 in the prior is weight 0, or weight 1 for ``gamma = 0`` (uniform weights).

    Args:
        teacher_logits: (B, C).
        gamma: in [0, 1].
        weight_temperature: T2, above 0. Has no effect with a class prior.
        class_prior: (C, C), given together with labels or not at all.
        labels: (B,) integers in [0, C). No GPU synchronisation: the range of labels on a GPU is left to the
            indexing kernel, which stops the program on a bad label.

    Returns:
        (B, C), float32 or float64, without gradient.

    Raises:
        ValueError: as ``gkl_loss``.
    """
    (teacher_BC,) = matching_matrices(teacher_logits=teacher_logits)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    check_temperature("weight_temperature", weight_temperature)
    if (class_prior is None) != (labels is None):
        missing = "class_prior" if class_prior is None else "labels"
        raise ValueError(f"class_prior and labels must be given together or not at all, got {missing}=None")
    with outside_autocast(teacher_BC):
        if class_prior is None or labels is None:
            log_weight_BC = torch.log_softmax(tempered(teacher_BC, weight_temperature), 1)
            return log_weight_BC.mul_(gamma).exp_()
        square = (teacher_BC.shape[1], teacher_BC.shape[1])
        if tuple(class_prior.shape) != square:
            raise ValueError(f"class_prior must have shape {square}, got {tuple(class_prior.shape)}")
        labels = check_labels(labels, teacher_BC, wait_for_device=False)
        prior_CC, _ = at_least_float32(class_prior=class_prior, teacher_logits=teacher_BC)
        return prior_CC.index_select(0, labels).pow_(gamma)


def gkl_wmse_denominator(weight_BC: Tensor) -> Tensor:
    """The denominator of wMSE, ``sum_b W_b^2 = sum_b sum_jk w_bj w_bk``: 0-d, from (B, C) weights.

    It is a sum over the whole batch: add it up over micro-batches and ranks before dividing.
    """
    (weight_BC,) = matching_matrices(weight_BC=weight_BC)
    return weight_BC.sum(1).square().sum()


def soft_ce_sums(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> LossSum:
    """Soft cross-entropy, ``-sum_b sum_j softmax(t/T)_bj log_softmax(s/T)_bj`` over B; no factor T^2.

    The alpha term of GKL (arXiv 2503.08038). It differs from KL by the teacher's entropy, so its gradient is
    KL's.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C), taken as a constant.
        temperature: T, above 0.

    Returns:
        LossSum in nats; the gradient goes to the student's logits only.

    Raises:
        ValueError: wrong shapes or types, a temperature not above 0.
    """
    student_BC, teacher_BC = logit_pair(student_logits, teacher_logits)
    check_temperature("temperature", temperature)
    with outside_autocast(student_BC):
        p_BC = torch.softmax(tempered(teacher_BC, temperature), 1)
        log_q_BC = torch.log_softmax(tempered(student_BC, temperature), 1)
        rows_B = nan_where_softmax_hides_infinity(teacher_BC) - (p_BC * log_q_BC).sum(1)
        return mean_over_rows(rows_B.sum(), len(rows_B))


def wmse_sums(student_logits: Tensor, teacher_logits: Tensor, weight_BC: Tensor) -> LossSum:
    """Weighted MSE of logit differences, ``1/4 sum_b sum_jk w_bj w_bk (Dt - Ds)_bjk^2`` over ``sum_b W_b^2``.

    The beta term of GKL (arXiv 2503.08038), in the closed form of this module's docstring, on raw logits.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        weight_BC: (B, C) weights from ``gkl_weights``, taken as constants.

    Returns:
        LossSum in nats. The gradient goes to the student's logits and, where they require it, with
        the opposite sign to the teacher's (KL's own wMSE trains the teacher alone: detach the student). There
        is no second derivative.

    Raises:
        ValueError: wrong shapes or types.
    """
    student_BC, teacher_BC, weight_BC = matching_matrices(
        student_logits=student_logits, teacher_logits=teacher_logits, weight_BC=weight_BC
    )
    with outside_autocast(student_BC):
        return LossSum(*_WMSE.apply(student_BC, teacher_BC, weight_BC))


class _WMSE(torch.autograd.Function):
    """Numerator and denominator of wMSE; the gradient is ``-W_b w_bj (delta_bj - mu_b)``."""

    @staticmethod
    def forward(ctx: Any, student_BC: Tensor, teacher_BC: Tensor, weight_BC: Tensor) -> tuple[Tensor, Tensor]:
        total_B1 = weight_BC.sum(1, keepdim=True)
        delta_BC = teacher_BC - student_BC
        centred_BC = delta_BC.sub_((weight_BC * delta_BC).sum(1, keepdim=True) / total_B1)
        weighted_BC = weight_BC * centred_BC
        ctx.save_for_backward(weighted_BC, total_B1)
        variance_B1 = centred_BC.mul_(weighted_BC).sum(1, keepdim=True)
        numerator, denominator = (total_B1 * variance_B1).sum() / 2, total_B1.square().sum()
        ctx.mark_non_differentiable(denominator)
        return numerator, denominator

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("wMSE has no second derivative: differentiate without create_graph=True")
        weighted_BC, total_B1 = ctx.saved_tensors
        grad_BC = weighted_BC * (-grad * total_B1)
        to_student, to_teacher, _ = ctx.needs_input_grad
        return grad_BC if to_student else None, -grad_BC if to_teacher else None, None
