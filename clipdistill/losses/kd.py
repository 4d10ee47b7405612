"""Classical knowledge distillation (KD): temperature-scaled KL divergence.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.

Shape suffixes: B rows of a batch, b rows of a block, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from clipdistill.losses._common import (
    LossSum,
    check_matrices,
    check_temperature,
    common_float,
    mean_over_rows,
    refuse_second_derivative,
    row_blocks,
    tempered,
)
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper
from clipdistill.losses.fused import kd_loss_from_features
from clipdistill.settings import Positive


class KL(Loss):
    """``kd_loss`` as a term."""

    loss: Literal["kl"] = "kl"
    over: Literal["prompts", "captions"] = "prompts"
    temperature: Positive = 1.0
    """Temperature of the logits; the loss is multiplied by its square."""
    two_sided: bool | None = None
    """In adversarial training, over prompts: the student's own clean images in place of a teacher's (TRADES); the
    gradient goes to both sides."""

    papers: ClassVar = (
        Paper(
            key="hinton2015distilling",
            title="Distilling the Knowledge in a Neural Network",
            author="Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
            year=2015,
            arxiv="1503.02531",
        ),
    )

    @field_validator("two_sided")
    @classmethod
    def _two_sided_is_of_prompts(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("over") != "prompts":
            raise ValueError("true only with over: prompts")
        return value

    @property
    def is_two_sided(self) -> bool:
        """As the setting says."""
        return bool(self.two_sided)

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, ``kl``."""
        student, teacher = comparison.pair
        if (fused := comparison.fused_implementation) is not None:
            loss = kd_loss_from_features(
                **comparison.features,
                temperature=self.temperature,
                rows=rows,
                two_sided=self.is_two_sided,
                implementation=fused,
            )
        else:
            sums = kd_sums(
                student.logits_BC, teacher.logits_BC, temperature=self.temperature, two_sided=self.is_two_sided
            )
            loss = sums.numerator / rows
        return LossParts.single("kl", loss)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, two_sided: bool = False) -> Tensor:
    """``T^2 / B * sum_b KL(softmax(t_b/T) || softmax(s_b/T))``.

    Section 2 of arXiv 1503.02531, whose factor T^2 keeps the gradient's size when T changes.
    ``temperature=1`` is plain KL. The soft cross-entropy of GKL has no such factor and
    omits the teacher's entropy.

    The two-sided form is the KL of TRADES (Zhang et al. 2019, arXiv 1901.08573): one network's logits of clean images
    in place of a teacher's, and a gradient to both.

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C).
        temperature: T, above 0.
        two_sided: whether the gradient also goes to the teacher's logits.

    Returns:
        0-d, in nats, the mean over the batch; the gradient goes to the student's logits only, and to the teacher's if
        ``two_sided``; there is no second derivative. A logit that is not finite makes the loss nan or inf.

    Raises:
        ValueError: wrong shapes or types, a temperature not above 0.
    """
    return kd_sums(student_logits, teacher_logits, temperature=temperature, two_sided=two_sided).value


def kd_sums(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, two_sided: bool = False) -> LossSum:
    """``kd_loss`` as a sum over rows and its denominator B."""
    check_matrices(student_logits=student_logits, teacher_logits=teacher_logits)
    check_temperature("temperature", temperature)
    dtype = common_float(student_logits=student_logits, teacher_logits=teacher_logits)
    teacher_logits = teacher_logits if two_sided else teacher_logits.detach()
    divergence = _KL.apply(student_logits, teacher_logits, dtype, temperature)
    return mean_over_rows(temperature**2 * divergence, len(student_logits))


class _KL(torch.autograd.Function):
    """``sum_b KL(p || q)``; its gradients, ``(q - p) / T`` and ``p (log p - log q - KL) / T``, are computed from the
    logits over blocks of rows."""

    @staticmethod
    def forward(ctx: Any, student_BC: Tensor, teacher_BC: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
        divergences = []
        for rows in row_blocks(student_BC):
            log_p_bC = torch.log_softmax(tempered(teacher_BC[rows].to(dtype), temperature), 1)
            log_q_bC = torch.log_softmax(tempered(student_BC[rows].to(dtype), temperature), 1)
            p_bC = log_p_bC.exp()
            divergences.append(log_p_bC.sub_(log_q_bC).mul_(p_bC).sum(1))
        ctx.save_for_backward(student_BC, teacher_BC)
        ctx.dtype, ctx.temperature = dtype, temperature
        return torch.cat(divergences).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("kd_loss")
        student_BC, teacher_BC = ctx.saved_tensors
        factor = grad / ctx.temperature
        grad_BC = torch.empty_like(student_BC) if ctx.needs_input_grad[0] else None
        opposite_BC = torch.empty_like(teacher_BC) if ctx.needs_input_grad[1] else None
        for rows in row_blocks(student_BC):
            student_bC = tempered(student_BC[rows].to(ctx.dtype), ctx.temperature)
            teacher_bC = tempered(teacher_BC[rows].to(ctx.dtype), ctx.temperature)
            p_bC = torch.softmax(teacher_bC, 1)
            if opposite_BC is not None:
                ratio_bC = torch.log_softmax(teacher_bC, 1).sub_(torch.log_softmax(student_bC, 1))
                ratio_bC.sub_((p_bC * ratio_bC).sum(1, keepdim=True))
                torch.mul(ratio_bC.mul_(p_bC), factor, out=opposite_BC[rows])
            if grad_BC is not None:
                torch.mul(torch.softmax(student_bC, 1).sub_(p_bC), factor, out=grad_BC[rows])
        return grad_BC, opposite_BC, None, None
