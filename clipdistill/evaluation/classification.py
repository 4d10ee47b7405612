"""Accuracy metrics, under CLIP_benchmark's names.

An unreadable image counts as wrong: it stays in every denominator.

Shapes: N samples, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipdistill.evaluation.agreement import agreement_metrics
from clipdistill.evaluation.calibration import calibration_metrics, expected_calibration_error
from clipdistill.evaluation.predictions import Predictions
from clipdistill.evaluation.shots import shot_metrics

Metrics = dict[str, float | int | None]


def classification_metrics(
    predictions: Predictions,
    teacher: Predictions | None = None,
    *,
    temperature: bool = False,
    class_counts: Sequence[int] | None = None,
) -> Metrics:
    """Metrics of one set.

    Args:
        predictions: of the model, on a single- or multi-label set.
        teacher: of its teacher, on the same set.
        temperature: also fit ``temperature`` and compute ``ece_tempered``.
        class_counts: training samples of each class, if known: also the metrics of `shot_metrics`.

    Returns:
        Of a single-label set ``acc1``, ``acc5`` (None below 5 classes), ``mean_per_class_recall`` over the classes
        present (the balanced accuracy), and ``ece`` (see `clipdistill.evaluation.calibration`); of a multi-label set
        ``mean_average_precision``; always ``unreadable``: the number of unreadable images. With a teacher, also its
        main metric under the prefix ``teacher_``, ``share_of_teacher``: the model's main metric over the teacher's
        (None where that is 0), and the metrics of `clipdistill.evaluation.agreement.agreement_metrics`.
    """
    metrics: Metrics
    if predictions.truth_NC is not None:
        main = "mean_average_precision"
        metrics = {main: float(average_precision(predictions).mean())}
    else:
        main = "acc1"
        hits_N, recall_C = top1_hits(predictions), recall_per_class(predictions)
        metrics = {
            main: float(hits_N.double().mean()),
            "acc5": top5_accuracy(predictions),
            "mean_per_class_recall": float(recall_C[recall_C.isfinite()].mean()),
            "ece": expected_calibration_error(predictions.logits_NC, predictions.labels_N),
        }
        if class_counts is not None:
            metrics |= shot_metrics(recall_C, class_counts)
        if temperature:
            metrics |= calibration_metrics(predictions.logits_NC, predictions.labels_N)
    metrics["unreadable"] = len(predictions.unreadable)
    if teacher is not None:
        teacher_value = classification_metrics(teacher)[main]
        metrics |= share_of_teacher(main, metrics[main], teacher_value) | agreement_metrics(predictions, teacher)
    return metrics


def top1_hits(predictions: Predictions) -> Tensor:
    """Whether the top-1 class is the label (N,); False for an unreadable image."""
    top1_N = predictions.logits_NC.argmax(dim=1)
    return (top1_N == predictions.labels_N) & predictions.readable_N


def top5_accuracy(predictions: Predictions) -> float | None:
    """Share of samples whose label is among the top 5 classes; None for fewer than 5 classes."""
    if predictions.logits_NC.shape[1] < 5:
        return None
    top = predictions.logits_NC.topk(5, dim=1).indices
    hits_N = (top == predictions.labels_N[:, None]).any(dim=1) & predictions.readable_N
    return float(hits_N.double().mean())


def recall_per_class(predictions: Predictions) -> Tensor:
    """Top-1 accuracy over the samples of each class (C,), float64; NaN for a class without samples."""
    classes = predictions.logits_NC.shape[1]
    hits_N = top1_hits(predictions).double()
    seen_C = torch.zeros(classes, dtype=torch.float64).index_add_(0, predictions.labels_N, torch.ones_like(hits_N))
    return torch.zeros(classes, dtype=torch.float64).index_add_(0, predictions.labels_N, hits_N) / seen_C


def average_precision(predictions: Predictions) -> Tensor:
    """Average precision of each class of a multi-label set (C,), float64.

    As in CLIP_benchmark: the mean of the precision at the positive samples, sorted by descending logit; 0 for a class
    without positives. Positives among unreadable images count as never found.
    """
    assert predictions.truth_NC is not None
    logits_NC = predictions.logits_NC[predictions.readable_N]
    truth_NC = predictions.truth_NC[predictions.readable_N]
    found_NC = truth_NC.gather(0, logits_NC.argsort(dim=0, descending=True)).double()
    precision_NC = found_NC.cumsum(0) / torch.arange(1, len(found_NC) + 1, dtype=torch.float64)[:, None]
    return (precision_NC * found_NC).sum(0) / predictions.truth_NC.sum(0).clamp(min=1)


def share_of_teacher(main: str, student: float | int | None, teacher: float | int | None) -> Metrics:
    """The teacher's main metric, and the student's as a share of it (None where the teacher's is 0)."""
    share = student / teacher if student is not None and teacher else None
    return {f"teacher_{main}": teacher, "share_of_teacher": share}
