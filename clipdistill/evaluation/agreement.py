"""Agreement of a student's predictions with its teacher's, independent of the labels.

Shapes: N samples, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from clipdistill.evaluation.predictions import Predictions

_ROWS = 4096
"""Samples per chunk: the ranks of a row take 8 bytes a class."""


def agreement_metrics(student: Predictions, teacher: Predictions) -> dict[str, float | int | None]:
    """Agreement of student and teacher on the readable images.

    Returns:
        ``teacher_agreement``: share of samples with the same top-1 class;
        ``teacher_kl``: mean Kullback-Leibler divergence from the teacher's softmax over classes to the student's, nats;
        ``teacher_rank_correlation``: mean over samples of Spearman's correlation between both rankings of the classes
        (ties share their mean rank; 0 where all logits of a row are equal; None for a single class).

    Raises:
        ValueError: the predictions are of different sets.
    """
    if student.keys != teacher.keys or student.logits_NC.shape != teacher.logits_NC.shape:
        raise ValueError(f"predictions of {len(student.keys)} and {len(teacher.keys)} samples; allowed: one set")
    student_NC, teacher_NC = (each.logits_NC[student.readable_N] for each in (student, teacher))
    divergence = correlation = 0.0
    for student_BC, teacher_BC in zip(student_NC.split(_ROWS), teacher_NC.split(_ROWS), strict=True):
        student_log_BC, teacher_log_BC = (each.double().log_softmax(dim=1) for each in (student_BC, teacher_BC))
        divergence += float((teacher_log_BC.exp() * (teacher_log_BC - student_log_BC)).sum())
        correlation += float(_rank_correlation(student_BC.numpy(), teacher_BC.numpy()).sum())
    samples, classes = student_NC.shape
    return {
        "teacher_agreement": float((student_NC.argmax(dim=1) == teacher_NC.argmax(dim=1)).double().mean()),
        "teacher_kl": divergence / samples,
        "teacher_rank_correlation": correlation / samples if classes > 1 else None,
    }


@dataclass(frozen=True)
class ClassGain:
    """Top-1 accuracy of student and teacher over the samples of one class."""

    name: str
    samples: int
    student: float
    teacher: float

    @property
    def gain(self) -> float:
        """The student's accuracy minus the teacher's."""
        return self.student - self.teacher


def class_gains(
    student_recall_C: torch.Tensor, teacher_recall_C: torch.Tensor, labels_N: torch.Tensor, names: tuple[str, ...]
) -> list[ClassGain]:
    """Per-class gains and losses, largest gain first; classes without samples are left out.

    Args:
        student_recall_C: from `clipdistill.evaluation.classification.recall_per_class`.
        teacher_recall_C: the same of the teacher.
        labels_N: the true classes.
        names: of the classes.
    """
    counts_C = labels_N.bincount(minlength=len(names)).tolist()
    rows = zip(names, counts_C, student_recall_C.tolist(), teacher_recall_C.tolist(), strict=True)
    return sorted((ClassGain(*row) for row in rows if row[1]), key=lambda each: (-each.gain, each.name))


def _rank_correlation(student_BC: NDArray[np.float32], teacher_BC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spearman's correlation of each pair of rows; shape (B,)."""
    student, teacher = (rankdata(each, axis=1) - (each.shape[1] + 1) / 2 for each in (student_BC, teacher_BC))
    norm_B = np.sqrt((student**2).sum(1) * (teacher**2).sum(1))
    return np.divide((student * teacher).sum(1), norm_B, out=np.zeros_like(norm_B), where=norm_B > 0)
