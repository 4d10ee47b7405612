"""Tasks on test sets, from a tower to metrics.

Every rank calls the functions here together, and all get the same result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipdistill.distributed.collectives import world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.agreement import class_gains
from clipdistill.evaluation.calibration import reliability
from clipdistill.evaluation.classification import (
    Metrics,
    average_precision,
    classification_metrics,
    recall_per_class,
    share_of_teacher,
)
from clipdistill.evaluation.encoding import SetFeatures, encode_classes, encode_set
from clipdistill.evaluation.linear_probe import linear_probe
from clipdistill.evaluation.predictions import Predictions, predictions_of
from clipdistill.evaluation.ranks import from_first_rank
from clipdistill.evaluation.retrieval import retrieval_metrics
from clipdistill.evaluation.robustness import BaselineLine, robustness_metrics
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.evaluation.shots import head_to_tail
from clipdistill.models.towers import Tower

Details = dict[str, Any]
"""Results beyond single numbers, as JSON values: per-class results, unreadable images."""


@dataclass
class Evaluator:
    """Computes a model's features and predictions for sets.

    Attributes:
        tower: the model.
        batch_size: images at once.
        workers: threads that decode and resize; 0: one per core.
        device: where the tower is.
        cache: folder for class features.
        progress: called with a set's name, the size of this rank's share of it, and how many of these samples are done.
        keep_features: keep each set's features for the next call, as for a teacher compared with several students.
    """

    tower: Tower
    batch_size: int
    workers: int
    device: torch.device | str
    cache: Path | None = None
    progress: Callable[[str, int, int], None] | None = None
    keep_features: bool = False
    _features: dict[EvaluationSet, SetFeatures] = field(default_factory=dict, init=False)

    def features(self, data: EvaluationSet) -> SetFeatures:
        """Features of a set; see ``encode_set``."""
        if data in self._features:
            return self._features[data]
        report, share = self.progress, -(-len(data) // world_size())
        features = encode_set(
            self.tower,
            data,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            progress=None if report is None else partial(report, data.name, share),
        )
        if self.keep_features:
            self._features[data] = features
        return features

    def predictions(self, data: EvaluationSet) -> Predictions:
        """Logits of the set's images over its classes."""
        return self.predictor(data)()

    def predictor(self, data: EvaluationSet) -> Callable[[], Predictions]:
        """`predictions` in two steps: all ranks compute the features here, the returned function the logits."""
        bank_CD = encode_classes(self.tower, data.prompts, cache=self.cache, device=self.device)
        return partial(predictions_of, self.tower, self.features(data), bank_CD, rows=self.batch_size)


def zero_shot(
    evaluator: Evaluator, data: EvaluationSet, teacher: Evaluator | None = None, *, temperature: bool = True
) -> tuple[Metrics, Details]:
    """Zero-shot classification or retrieval, by the kind of the set.

    Args:
        evaluator: of the model.
        data: the set.
        teacher: evaluator of its teacher, for agreement metrics and per-class gains.
        temperature: as in ``classification_metrics``.
    """
    if data.kind == "retrieval":
        features = evaluator.features(data)
        metrics = from_first_rank(lambda: retrieval_metrics(features))
        if teacher is not None:
            teacher_features = teacher.features(data)
            metrics |= _share("mean_recall@1", metrics, from_first_rank(lambda: retrieval_metrics(teacher_features)))
        return metrics, _samples(features)
    predict = evaluator.predictor(data)
    predict_teacher = None if teacher is None else teacher.predictor(data)

    def compare() -> tuple[Metrics, Details]:
        predictions, teacher_predictions = predict(), None if predict_teacher is None else predict_teacher()
        metrics = classification_metrics(
            predictions, teacher_predictions, temperature=temperature, class_counts=data.class_counts
        )
        return metrics, _samples(predictions) | _classes(data, predictions, teacher_predictions)

    return from_first_rank(compare)


def probe(
    evaluator: Evaluator, data: EvaluationSet, train: EvaluationSet, teacher: Evaluator | None = None
) -> tuple[Metrics, Details]:
    """Linear probe; see ``linear_probe``.

    Raises:
        InputError: a set without single labels, or splits with different classes.
    """
    for split in (data, train):
        _need_labels(split)
    if data.prompts.classnames != train.prompts.classnames:
        raise InputError(f"data {data.name}: its training split has other classes; allowed: the same classes")

    def measure(model: Evaluator) -> Metrics:
        train_features, test_features = model.features(train), model.features(data)
        return from_first_rank(lambda: linear_probe(train_features, test_features, classes=data.prompts.num_classes))

    metrics = measure(evaluator)
    if teacher is not None:
        metrics |= _share("lp_acc1", metrics, measure(teacher))
    return metrics, {"samples": len(data), "samples_train": len(train)}


def robustness(
    evaluator: Evaluator,
    sets: Sequence[EvaluationSet],
    teacher: Evaluator | None = None,
    *,
    lines: Mapping[str, BaselineLine] | None = None,
) -> tuple[Metrics, Details]:
    """Robustness of the first set to the others, its shifts; see ``robustness_metrics``.

    Raises:
        InputError: a set without single labels.
    """
    for data in sets:
        _need_labels(data)

    def measure(model: Evaluator) -> Metrics:
        predictors = [model.predictor(data) for data in sets]

        def compare() -> Metrics:
            pairs = zip(sets, predictors, strict=True)
            base, *shifts = [(data.prompts.classnames, predict()) for data, predict in pairs]
            return robustness_metrics(base, {data.name: s for data, s in zip(sets[1:], shifts, strict=True)}, lines)

        return from_first_rank(compare)

    metrics = measure(evaluator)
    if teacher is not None:
        metrics |= _share("mean_acc1", metrics, measure(teacher))
    details: Details = {"samples": {data.name: len(data) for data in sets}}
    return metrics, details | {"lines": {name: asdict(line) for name, line in (lines or {}).items()}}


def _share(main: str, student: Metrics, teacher: Metrics) -> Metrics:
    return share_of_teacher(main, student[main], teacher[main])


def _need_labels(data: EvaluationSet) -> None:
    if data.kind != "classification":
        raise InputError(f"data {data.name}: a {data.kind} set; allowed for this task: a classification set")


def _samples(results: SetFeatures | Predictions) -> Details:
    """Number of samples, and a line for each unreadable image."""
    return {"samples": len(results.keys), "unreadable": list(results.unreadable)}


def _classes(data: EvaluationSet, predictions: Predictions, teacher: Predictions | None) -> Details:
    """Per-class results (with a teacher, largest gain first), and for single labels the reliability diagram."""
    names = data.prompts.classnames
    if predictions.truth_NC is not None:
        counts_C = predictions.truth_NC.sum(0).tolist()
        rows = zip(names, counts_C, average_precision(predictions).tolist(), strict=True)
        return {"classes": [{"name": n, "samples": count, "average_precision": value} for n, count, value in rows]}
    recall_C = recall_per_class(predictions)
    curves: Details = {
        "reliability": [asdict(each) for each in reliability(predictions.logits_NC, predictions.labels_N)]
    }
    if data.class_counts is not None:
        curves["head_to_tail"] = [asdict(each) for each in head_to_tail(recall_C, data.class_counts)]
    if teacher is not None:
        gains = class_gains(recall_C, recall_per_class(teacher), predictions.labels_N, names)
        return {"classes": [asdict(each) | {"gain": each.gain} for each in gains], **curves}
    counts_C = predictions.labels_N.bincount(minlength=len(names)).tolist()
    rows = zip(names, counts_C, recall_C.tolist(), strict=True)
    seen = [{"name": n, "samples": count, "recall": recall} for n, count, recall in rows if count]
    return {"classes": seen, **curves}
