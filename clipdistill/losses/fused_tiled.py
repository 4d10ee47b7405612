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
    if weights is None:
        needs = (False,) * 6
    converted = FeaturePair(*(x.to(problem.dtype) for x in features))
    student = _Side(*converted[:3], problem.temperature, needs[:3])
    teacher = _Side(*converted[3:], problem.temperature, needs[3:])
    image_BD, text_CD = converted[:2]
    statistics_3B = image_BD.new_empty(3, len(image_BD))
    blocks = _row_blocks(len(image_BD), text_CD)
    buffers = [text_CD.new_empty(blocks[0].stop, len(text_CD)) for _ in range(4)]
    for rows in blocks:
        student_bC, teacher_bC, p_bC, weight_bC = (buffer[: len(image_BD[rows])] for buffer in buffers)
        student.write_logits(rows, out=student_bC)
        teacher.write_logits(rows, out=teacher_bC)
        block = _gkl_block if problem.kind == "gkl" else _kl_block
        statistics_3B[:, rows], *gradients = block(student_bC, teacher_bC, p_bC, weight_bC, problem, rows, weights)
        for side, grad_bC in zip((student, teacher), gradients, strict=False):
            side.add_gradient(rows, grad_bC)
    soft, wmse, denominator = statistics_3B.sum(1)
    if weights is None:
        return Sums(soft, wmse, denominator)
    return Sums(soft, wmse, denominator, Gradients(*student.gradients(), *teacher.gradients()))


class _Side:
    """The embeddings of a model, its logits over T of a block of rows, and the gradients that these bring.

    Args:
        image_BD: image embeddings.
        text_CD: text embeddings.
        scale: multiplier of the cosines.
        temperature: T.
        needs: whether image, text and scale need a gradient.
    """

    def __init__(self, image_BD: Tensor, text_CD: Tensor, scale: Tensor, temperature: float, needs: Needs) -> None:
        self._image_BD, self._text_CD, self._temperature, self._needs = image_BD, text_CD, temperature, needs
        self._factor = scale / temperature
        self._grad_image_BD = torch.empty_like(image_BD) if needs[0] or needs[2] else None
        self._grad_text_CD = torch.zeros_like(text_CD) if needs[1] else None

    def write_logits(self, rows: slice, *, out: Tensor) -> None:
        """The logits of some rows, over T."""
        self._scaled_bD = self._image_BD[rows] * self._factor
        _multiply(self._scaled_bD, self._text_CD, out=out)

    def add_gradient(self, rows: slice, grad_bC: Tensor) -> None:
        """Take the gradient of the logits that were written last."""
        if self._grad_image_BD is not None:
            torch.mm(grad_bC, self._text_CD, out=self._grad_image_BD[rows])
        if self._grad_text_CD is not None:
            self._grad_text_CD.addmm_(grad_bC.T, self._scaled_bD)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of image, text and scale, once all rows are done."""
        grad_scale = None
        if self._grad_image_BD is not None:
            grad_scale = (self._image_BD * self._grad_image_BD).sum() / self._temperature
            self._grad_image_BD *= self._factor
        needs_image, _, needs_scale = self._needs
        return self._grad_image_BD if needs_image else None, self._grad_text_CD, grad_scale if needs_scale else None


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
) -> tuple[Tensor, ...]:
    """(3, b) soft cross-entropy, wMSE's numerator and denominator; and, with weights, the gradient of ``s/T``, in the
    two-sided form followed by that of ``t/T``.

    The inputs are logits over T. All four matrices are overwritten; one or two of them receive the gradients.
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
    statistics_3b = torch.cat((soft_b1, wmse_b1, mass_b1.square()), 1).T
    grad_bC = log_q_bC
    if weights is None:
        return (statistics_3b,)
    grad_bC.exp_().sub_(p_bC).mul_(weights[0])
    slope_b1 = weights[1] * mass_b1 * temperature**2
    if not problem.two_sided:
        return statistics_3b, grad_bC.addcmul_(weighted_bC, slope_b1, value=-1)
    opposite_bC = weighted_bC.mul_(slope_b1)
    return statistics_3b, grad_bC.sub_(opposite_bC), opposite_bC


def _kl_block(
    student_bC: Tensor,
    teacher_bC: Tensor,
    p_bC: Tensor,
    log_p_bC: Tensor,
    problem: Problem,
    _rows: slice,
    weights: Weights | None,
) -> tuple[Tensor, ...]:
    """(3, b) KL, zeros and ones, and the gradients; as ``_gkl_block``."""
    torch.log_softmax(teacher_bC, 1, out=log_p_bC)
    torch.exp(log_p_bC, out=p_bC)
    log_q_bC = torch.log_softmax(student_bC, 1, out=teacher_bC)
    ratio_bC = log_p_bC.sub_(log_q_bC)
    soft_b1 = _row_products(p_bC, ratio_bC)
    factor = problem.soft_factor
    statistics_3b = torch.cat((soft_b1 * factor, torch.zeros_like(soft_b1), torch.ones_like(soft_b1)), 1).T
    if weights is None:
        return (statistics_3b,)
    grad_bC = log_q_bC.exp_().sub_(p_bC).mul_(factor * weights[0])
    if not problem.two_sided:
        return statistics_3b, grad_bC
    return statistics_3b, grad_bC, ratio_bC.sub_(soft_b1).mul_(p_bC).mul_(factor * weights[0])


def _row_products(a_bC: Tensor, b_bC: Tensor) -> Tensor:
    """``sum_j a_bj b_bj``, (b, 1), without a product matrix."""
    return torch.bmm(a_bC[:, None], b_bC[:, :, None]).squeeze(2)
