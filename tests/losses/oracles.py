"""What GKL and KL must be, written plainly from their formulas: the reference of the tests, differentiated by autograd.

Sources: Cui et al., arXiv 2305.13948 and 2503.08038. Nothing here is taken from ``clipdistill``.

Shapes: B rows, C classes.
"""

import torch
from torch import Tensor


def weights(
    teacher_BC: Tensor,
    *,
    gamma: float = 1.0,
    weight_temperature: float = 1.0,
    class_prior: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """``softmax(t / T2)^gamma`` or ``prior[y]^gamma``, (B, C), constants."""
    base_BC = (teacher_BC / weight_temperature).softmax(1) if class_prior is None else class_prior[labels]
    return base_BC.detach() ** gamma


def soft_ce(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``-mean_b sum_j softmax(t/T)_bj log_softmax(s/T)_bj``, with no factor T^2."""
    target_BC = (teacher_BC / temperature).softmax(1).detach()
    return -(target_BC * (student_BC / temperature).log_softmax(1)).sum(1).mean()


def kl(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T^2 mean_b sum_j p_bj (log p_bj - log q_bj)``, whose gradient goes to both arguments."""
    log_p_BC, log_q_BC = ((logits_BC / temperature).log_softmax(1) for logits_BC in (teacher_BC, student_BC))
    return temperature**2 * (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(1).mean()


def pairwise_wmse(student_BC: Tensor, teacher_BC: Tensor, weight_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of wMSE by definition, over all pairs of classes: (B, C, C) tensors.

    ``1/4 sum_b sum_jk w_bj w_bk (Dt_bjk - Ds_bjk)^2`` and ``sum_b sum_jk w_bj w_bk``; gradients to both arguments.
    """
    teacher_BCC = teacher_BC[:, :, None] - teacher_BC[:, None, :]
    student_BCC = student_BC[:, :, None] - student_BC[:, None, :]
    weight_BCC = weight_BC[:, :, None] * weight_BC[:, None, :]
    return (weight_BCC * (teacher_BCC - student_BCC) ** 2).sum() / 4, weight_BCC.sum()


def closed_wmse(student_BC: Tensor, teacher_BC: Tensor, weight_BC: Tensor) -> tuple[Tensor, Tensor]:
    """As ``pairwise_wmse``, in closed form: ``1/2 sum_b W_b sum_j w_bj (delta_bj - mu_b)^2`` and ``sum_b W_b^2``."""
    delta_BC = teacher_BC - student_BC
    mass_B = weight_BC.sum(1)
    mean_B = (weight_BC * delta_BC).sum(1) / mass_B
    square_B = (weight_BC * (delta_BC - mean_B[:, None]) ** 2).sum(1)
    return (mass_B * square_B).sum() / 2, (mass_B**2).sum()


def wmse(student_BC: Tensor, teacher_BC: Tensor, weight_BC: Tensor) -> Tensor:
    """wMSE by definition: the quotient of ``pairwise_wmse``."""
    numerator, denominator = pairwise_wmse(student_BC, teacher_BC, weight_BC)
    return numerator / denominator


def dense_of_top_k(values_CK: Tensor, indices_CK: Tensor, rest_C: Tensor) -> Tensor:
    """The (C, C) prior of which only the largest entries of every row are told apart, one entry at a time."""
    prior_CC = torch.empty(len(rest_C), len(rest_C), dtype=values_CK.dtype, device=values_CK.device)
    for row, (values_K, indices_K, rest) in enumerate(zip(values_CK, indices_CK.tolist(), rest_C, strict=True)):
        prior_CC[row] = rest
        for value, column in zip(values_K, indices_K, strict=True):
            prior_CC[row, column] = value
    return prior_CC
