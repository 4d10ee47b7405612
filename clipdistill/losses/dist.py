"""DIST: match the teacher's predictions up to scale and shift, by Pearson correlation.

Source: Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022, arXiv 2205.10536).

Shape suffixes: B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clipdistill.losses._common import logit_pair, nan_where_softmax_hides_infinity, outside_autocast
from clipdistill.losses.base import Comparison, Loss, LossParts, Paper


class DIST(Loss):
    """``dist_loss`` as a term, on the logits of the entire batch."""

    loss: Literal["dist"] = "dist"
    over: Literal["prompts", "captions"] = "prompts"
    beta: float = 1.0
    """Factor of the inter-class relation, within a sample."""
    gamma: float = 1.0
    """Factor of the intra-class relation, within a class."""

    papers: ClassVar = (
        Paper(
            key="huang2022dist",
            title="Knowledge Distillation from A Stronger Teacher",
            author="Huang, Tao and You, Shan and Wang, Fei and Qian, Chen and Xu, Chang",
            year=2022,
            arxiv="2205.10536",
        ),
    )
    couples_rows: ClassVar = True

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:  # noqa: ARG002
        """One part, ``dist``."""
        student, teacher = comparison.pair
        return LossParts.single(
            "dist", dist_loss(student.logits_BC, teacher.logits_BC, beta=self.beta, gamma=self.gamma)
        )


_EPS = 1e-8  # as in the authors' code: a constant row or column has correlation 0


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float) -> Tensor:
    """``beta * (1 - mean_b pearson(q_b, p_b)) + gamma * (1 - mean_c pearson(q_:c, p_:c))``.

    With p = softmax(t) and q = softmax(s): the first term compares the classes of one sample (inter-class
    relation), the second the samples of one class (intra-class relation); arXiv 2205.10536. Unlike KL it requires
    only a linear relation between q and p, not equality. The second term couples the rows, so the loss is not a
    sum over rows: it needs the entire batch at once.

    Args:
        student_logits: (B, C), any floating type; half precision is computed in float32.
        teacher_logits: (B, C), treated as a constant.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.

    Returns:
        0-d, without unit, each term in [0, 2]; the gradient goes to the student's logits only. A logit that
        is not finite makes the loss nan.

    Raises:
        ValueError: wrong shapes or types.
    """
    student_BC, teacher_BC = logit_pair(student_logits, teacher_logits)
    with outside_autocast(student_BC):
        p_BC, q_BC = torch.softmax(teacher_BC, 1), torch.softmax(student_BC, 1)
        inter = 1 - _pearson(q_BC, p_BC, dim=1).mean()
        intra = 1 - _pearson(q_BC, p_BC, dim=0).mean()
        hidden_B = nan_where_softmax_hides_infinity(student_BC) + nan_where_softmax_hides_infinity(teacher_BC)
        return beta * inter + gamma * intra + hidden_B.sum()


def _pearson(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson correlation of x and y along ``dim``."""
    x = x - x.mean(dim, keepdim=True)
    y = y - y.mean(dim, keepdim=True)
    return (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + _EPS)
