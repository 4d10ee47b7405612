"""The fused losses in plain PyTorch: blocks of rows, whose logits exist only while the block is processed.

A block's logits over all classes suffice for the block's share of the loss and of every gradient. One pass over the
rows therefore needs as many multiplications as a loss from full matrices, but only four buffers of b rows.

Shape suffixes: B rows of a batch, b rows of a block, C classes, D and E feature widths of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipdistill.losses.fused_common import FeaturePair, Gradients, Needs, Problem, Sums, Weights
from clipdistill.losses.prior import fill_weights, weight_mass


def forward(features: FeaturePair, problem: Problem, weights: Weights | None, needs: Needs) -> Sums:
    """The sums and, with weights (0-d) of soft and wmse, the gradient of their weighted sum."""
    return _sweep(features, problem, weights, needs)


def backward(features: FeaturePair, problem: Problem, weights: Weights, needs: Needs, _state: None) -> Gradients:
    """The gradient of the weighted sum of soft and wmse, recomputed from the embeddings."""
    gradients = _sweep(features, problem, weights, needs).gradients
    assert gradients is not None
    return gradients


def _sweep(features: FeaturePair, problem: Problem, weights: Weights | None, needs: Needs) -> Sums:
    """One pass over the rows."""
    dtype, temperature = problem.dtype, problem.temperature
    image_BD, text_CD, scale, teacher_image_BE, teacher_text_CE, teacher_scale = (x.to(dtype) for x in features)
    statistics_3B = image_BD.new_empty(3, len(image_BD))
    grad_image_BD = torch.empty_like(image_BD) if weights is not None and (needs[0] or needs[2]) else None
    grad_text_CD = torch.zeros_like(text_CD) if weights is not None and needs[1] else None

    blocks = _row_blocks(len(image_BD), text_CD)
    buffers = [text_CD.new_empty(blocks[0].stop, len(text_CD)) for _ in range(4)]
    for rows in blocks:
        scaled_bD = image_BD[rows] * (scale / temperature)
        student_bC, teacher_bC, p_bC, weight_bC = (buffer[: len(scaled_bD)] for buffer in buffers)
        _multiply(scaled_bD, text_CD, out=student_bC)
        _multiply(teacher_image_BE[rows] * (teacher_scale / temperature), teacher_text_CE, out=teacher_bC)
        block = _gkl_block if problem.kind == "gkl" else _kl_block
        statistics_3B[:, rows], grad_bC = block(student_bC, teacher_bC, p_bC, weight_bC, problem, rows, weights)
        if grad_image_BD is not None:
            torch.mm(grad_bC, text_CD, out=grad_image_BD[rows])
        if grad_text_CD is not None:
            grad_text_CD.addmm_(grad_bC.T, scaled_bD)

    soft, wmse, denominator = statistics_3B.sum(1)
    if weights is None:
        return Sums(soft, wmse, denominator)
    grad_scale = None
    if grad_image_BD is not None:
        grad_scale = (image_BD * grad_image_BD).sum() / temperature
        grad_image_BD *= scale / temperature
    gradients = Gradients(grad_image_BD if needs[0] else None, grad_text_CD, grad_scale if needs[2] else None)
    return Sums(soft, wmse, denominator, gradients)


def weight_masses(features: FeaturePair, problem: Problem) -> Tensor:
    """``W_B = sum_j w_bj``, from the teacher alone."""
    dtype = problem.dtype
    image_BE, text_CE, scale = (x.to(dtype) for x in features[3:])
    mass = problem.known_mass(len(text_CE))
    if mass is not None:
        return image_BE.new_full((len(image_BE),), mass)
    if problem.prior is not None:
        assert problem.labels_B is not None
        return weight_mass(problem.prior, problem.labels_B, problem.gamma, dtype)
    blocks = _row_blocks(len(image_BE), text_CE)
    buffers = [text_CE.new_empty(blocks[0].stop, len(text_CE)) for _ in range(2)]
    mass_B = image_BE.new_empty(len(image_BE))
    for rows in blocks:
        scaled_bE = image_BE[rows] * (scale / problem.weight_temperature)
        logits_bC, weight_bC = (buffer[: len(scaled_bE)] for buffer in buffers)
        _multiply(scaled_bE, text_CE, out=logits_bC)
        torch.log_softmax(logits_bC, 1, out=weight_bC)
        mass_B[rows] = weight_bC.mul_(problem.gamma).exp_().sum(1)
    return mass_B


def _row_blocks(rows: int, text_CD: Tensor) -> list[slice]:
    """Consecutive slices of the rows: at least 64 rows, for efficient multiplications, and more with few classes.

    Four buffers of 64 rows are half as large as the text embeddings at D = 512. Devices other than a CPU need
    larger blocks.
    """
    least, elements = (64, 2**20) if text_CD.device.type == "cpu" else (256, 2**24)
    step = max(least, elements // len(text_CD))
    return [slice(start, min(start + step, rows)) for start in range(0, max(rows, 1), step)]


def _multiply(image_bD: Tensor, text_CD: Tensor, *, out: Tensor) -> None:
    """``image @ text.T``; on a CPU in tiles of classes, as MKL is half as fast with few rows and very many columns."""
    tile = 512 * torch.get_num_threads() if image_bD.device.type == "cpu" else len(text_CD)
    for start in range(0, len(text_CD), tile):
        columns = slice(start, start + tile)
        torch.mm(image_bD, text_CD[columns].T, out=out[:, columns])


def _gkl_block(
    student_bC: Tensor,
    teacher_bC: Tensor,
    p_bC: Tensor,
    weight_bC: Tensor,
    problem: Problem,
    rows: slice,
    weights: Weights | None,
) -> tuple[Tensor, Tensor]:
    """(3, b) soft cross-entropy, wMSE's numerator and denominator; and, with weights, the gradient of ``s/T``.

    The inputs are logits over T. All four matrices are overwritten; one of them receives the gradient.
    """
    gamma, temperature = problem.gamma, problem.temperature
    if problem.prior is not None:
        assert problem.labels_B is not None
        fill_weights(weight_bC, problem.prior, problem.labels_B[rows], gamma)
    elif temperature != problem.weight_temperature:
        torch.mul(teacher_bC, temperature / problem.weight_temperature, out=p_bC)
        torch.log_softmax(p_bC, 1, out=weight_bC).mul_(gamma).exp_()
    torch.log_softmax(teacher_bC, 1, out=p_bC)
    if problem.prior is None and temperature == problem.weight_temperature:
        torch.mul(p_bC, gamma, out=weight_bC).exp_()
    p_bC.exp_()

    mass_b1 = weight_bC.sum(1, keepdim=True)
    centred_bC = teacher_bC.sub_(student_bC)  # delta / T
    weighted_sum_b1 = _row_products(weight_bC, centred_bC)
    centred_bC.sub_(weighted_sum_b1 / mass_b1)
    weighted_bC = weight_bC.mul_(centred_bC)
    wmse_b1 = _row_products(weighted_bC, centred_bC) * mass_b1 * (temperature**2 / 2)

    log_q_bC = torch.log_softmax(student_bC, 1, out=centred_bC)
    # the sum of weighted deltas is not finite if a logit is not, even one that a softmax turns into 0
    soft_b1 = weighted_sum_b1 * 0 - _row_products(p_bC, log_q_bC)
    grad_bC = log_q_bC
    if weights is not None:
        grad_bC.exp_().sub_(p_bC).mul_(weights[0])
        grad_bC.addcmul_(weighted_bC, weights[1] * mass_b1 * temperature**2, value=-1)
    return torch.cat((soft_b1, wmse_b1, mass_b1.square()), 1).T, grad_bC


def _kl_block(
    student_bC: Tensor,
    teacher_bC: Tensor,
    p_bC: Tensor,
    log_p_bC: Tensor,
    problem: Problem,
    _rows: slice,
    weights: Weights | None,
) -> tuple[Tensor, Tensor]:
    """(3, b) KL, zeros and ones, and the gradient; as ``_gkl_block``."""
    torch.log_softmax(teacher_bC, 1, out=log_p_bC)
    torch.exp(log_p_bC, out=p_bC)
    log_q_bC = torch.log_softmax(student_bC, 1, out=teacher_bC)
    soft_b1 = _row_products(p_bC, log_p_bC.sub_(log_q_bC))
    grad_bC = log_q_bC
    if weights is not None:
        grad_bC.exp_().sub_(p_bC).mul_(problem.soft_factor * weights[0])
    return torch.cat((soft_b1 * problem.soft_factor, torch.zeros_like(soft_b1), torch.ones_like(soft_b1)), 1).T, grad_bC


def _row_products(a_bC: Tensor, b_bC: Tensor) -> Tensor:
    """``sum_j a_bj b_bj``, (b, 1), without a product matrix."""
    return torch.bmm(a_bC[:, None], b_bC[:, :, None]).squeeze(2)
