"""Accuracy on frequent and rare classes, by the number of their training samples.

Shapes: C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.models.class_counts import SHOTS, shot_of

_POINTS = 20


def shot_metrics(recall_C: Tensor, class_counts: Sequence[int]) -> dict[str, float | int | None]:
    """Means of the classes' accuracies: ``many_shot_acc1``, ``medium_shot_acc1``, ``few_shot_acc1``.

    None for a shot without classes. The mean over all classes is ``mean_per_class_recall``, the balanced accuracy.

    Args:
        recall_C: from `clipdistill.evaluation.classification.recall_per_class`; NaN for a class without test samples.
        class_counts: training samples of each class.
    """
    shots = [shot_of(count) for count in class_counts]
    metrics: dict[str, float | int | None] = {}
    for shot in SHOTS:
        of_shot = recall_C[torch.tensor([each == shot for each in shots])]
        of_shot = of_shot[of_shot.isfinite()]
        metrics[f"{shot}_shot_acc1"] = float(of_shot.mean()) if len(of_shot) else None
    return metrics


@dataclass(frozen=True, kw_only=True)
class TailPoint:
    """A group of classes of similar frequency.

    Attributes:
        classes: number of classes.
        training_samples: their mean number of training samples.
        recall: the mean of their accuracies.
    """

    classes: int
    training_samples: float
    recall: float


def head_to_tail(recall_C: Tensor, class_counts: Sequence[int]) -> list[TailPoint]:
    """The accuracy from the most frequent classes to the rarest, in groups of about equally many classes.

    Classes without test samples are left out.
    """
    present = [number for number, recall in enumerate(recall_C.tolist()) if recall == recall]
    ranked = sorted(present, key=lambda number: -class_counts[number])
    points = []
    for group in torch.tensor(ranked).tensor_split(min(_POINTS, max(1, len(ranked)))):
        if len(group):
            counts = [class_counts[number] for number in group.tolist()]
            points.append(
                TailPoint(
                    classes=len(group),
                    training_samples=sum(counts) / len(counts),
                    recall=float(recall_C[group].mean()),
                )
            )
    return points
