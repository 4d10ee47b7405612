"""How far a student says what its teacher says, whatever the truth is.

Shapes: N samples, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from clipdistill.evaluation.predictions import Predictions

_ROWS = 4096
"""Samples at once: the ranks of a row take 8 bytes a class."""


def agreement_metrics(student: Predictions, teacher: Predictions) -> dict[str, float | int | None]:
    """Agreement on the images that can be read.

    Returns:
        ``teacher_agreement``: share of samples on which both name the same class first;
        ``teacher_kl``: mean Kullback-Leibler divergence from the teacher's softmax over classes to the student's, nats;
        ``teacher_rank_correlation``: mean over samples of Spearman's correlation between both orders of the classes
        (ties share their mean rank; 0 where one of them does not tell classes apart; None for a single class).

    Raises:
        ValueError: the predictions are of different sets.
    """
    if student.keys != teacher.keys or student.logits_NC.shape != teacher.logits_NC.shape:
        raise ValueError(f"predictions of {len(student.keys)} and {len(teacher.keys)} samples; must be of one set")
    ours_NC, theirs_NC = (each.logits_NC[student.readable_N] for each in (student, teacher))
    divergence = correlation = 0.0
    for ours_BC, theirs_BC in zip(ours_NC.split(_ROWS), theirs_NC.split(_ROWS), strict=True):
        ours_log_BC, theirs_log_BC = ours_BC.double().log_softmax(dim=1), theirs_BC.double().log_softmax(dim=1)
        divergence += float((theirs_log_BC.exp() * (theirs_log_BC - ours_log_BC)).sum())
        correlation += float(_rank_correlation(ours_BC.numpy(), theirs_BC.numpy()).sum())
    samples, classes = ours_NC.shape
    return {
        "teacher_agreement": float((ours_NC.argmax(dim=1) == theirs_NC.argmax(dim=1)).double().mean()),
        "teacher_kl": divergence / samples,
        "teacher_rank_correlation": correlation / samples if classes > 1 else None,
    }


@dataclass(frozen=True)
class ClassGain:
    """Top-1 accuracy over the samples of one class, by student and teacher."""

    name: str
    samples: int
    student: float
    teacher: float

    @property
    def gain(self) -> float:
        """What the student is better by; negative where it is worse."""
        return self.student - self.teacher


def class_gains(
    student_recall_C: torch.Tensor, teacher_recall_C: torch.Tensor, labels_N: torch.Tensor, names: tuple[str, ...]
) -> list[ClassGain]:
    """Per-class gains and losses, largest gain first; classes without samples are left out.

    Args:
        student_recall_C: from `clipdistill.evaluation.classification.recall_per_class`.
        teacher_recall_C: likewise.
        labels_N: the true classes.
        names: of the classes.
    """
    counts_C = labels_N.bincount(minlength=len(names)).tolist()
    rows = zip(names, counts_C, student_recall_C.tolist(), teacher_recall_C.tolist(), strict=True)
    return sorted((ClassGain(*row) for row in rows if row[1]), key=lambda each: (-each.gain, each.name))


def _rank_correlation(ours_BC: NDArray[np.float32], theirs_BC: NDArray[np.float32]) -> NDArray[np.float64]:
    """Spearman's correlation of each pair of rows."""
    ours, theirs = (rankdata(each, axis=1) - (each.shape[1] + 1) / 2 for each in (ours_BC, theirs_BC))
    norm_B = np.sqrt((ours**2).sum(1) * (theirs**2).sum(1))
    return np.divide((ours * theirs).sum(1), norm_B, out=np.zeros_like(norm_B), where=norm_B > 0)
