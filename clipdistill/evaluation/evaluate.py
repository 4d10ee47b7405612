"""Towers over test sets: from images to metrics, task by task, and to records for the trainer.

All functions here are called by every rank together, and give every rank the same.
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
from clipdistill.evaluation.benchmark_format import Record, benchmark_record
from clipdistill.evaluation.calibration import reliability
from clipdistill.evaluation.classification import (
    Metrics,
    average_precision,
    classification_metrics,
    recall_per_class,
    share_of_teacher,
)
from clipdistill.evaluation.encoding import Features, encode_classes, encode_set
from clipdistill.evaluation.linear_probe import linear_probe
from clipdistill.evaluation.predictions import Predictions, predictions_of
from clipdistill.evaluation.ranks import copy_from_first_rank, from_first_rank
from clipdistill.evaluation.retrieval import retrieval_metrics
from clipdistill.evaluation.robustness import BaselineLine, robustness_metrics
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.models.towers import Tower

Details = dict[str, Any]
"""What no single number says, as JSON."""


def evaluate_sets(
    tower: Tower,
    sets: Sequence[EvaluationSet],
    *,
    model: str,
    pretrained: str = "",
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> list[Record]:
    """Evaluate a tower zero-shot; with several ranks, all call this together, and all get the records.

    Each sample is counted once. A rank encodes its share of the batches, and all class prompts: ranks are done within a
    batch of each other, and wait for the first one only while it computes the metrics. What batch normalisation has
    seen differs between the ranks of a training run: all go on with what the first one has, as DDP's next step would.

    Args:
        tower: teacher or student, with the same weights on every rank; its mode is restored afterwards.
        sets: from ``open_set``.
        model: what the records call it.
        pretrained: likewise.
        batch_size: images at once.
        workers: threads of a rank that decode and resize; 0 means one.
        device: where the tower is.
        cache: folder for class features, of use where the text tower stays the same.

    Returns:
        One CLIP_benchmark record a set; see ``classification_metrics`` and ``retrieval_metrics``.

    Raises:
        InputError: on every rank: a bad sample, a set without readable images, features that are not finite.
    """
    copy_from_first_rank(tower.clip.buffers())
    examinee = Examinee(tower, batch_size=batch_size, workers=workers, device=device, cache=cache)
    return [
        benchmark_record(data, zero_shot(examinee, data, temperature=False)[0], model=model, pretrained=pretrained)
        for data in sets
    ]


@dataclass
class Examinee:
    """A tower that is asked about sets.

    Attributes:
        tower: teacher or student.
        batch_size: images at once.
        workers: threads that decode and resize; 0 means one.
        device: where the tower is.
        cache: folder for class features.
        progress: called with a set's name, the number of its samples done by this rank, and of its share.
        remembers: whether answers are kept for the next time, as a teacher's are who is compared with several students.
    """

    tower: Tower
    batch_size: int
    workers: int
    device: torch.device | str
    cache: Path | None = None
    progress: Callable[[str, int, int], None] | None = None
    remembers: bool = False
    _features: dict[EvaluationSet, Features] = field(default_factory=dict, init=False)

    def features(self, data: EvaluationSet) -> Features:
        """See ``encode_set``."""
        if data in self._features:
            return self._features[data]
        report, share = self.progress, -(-len(data) // world_size())
        features = encode_set(
            self.tower,
            data,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            progress=None if report is None else lambda done: report(data.name, done, share),
        )
        if self.remembers:
            self._features[data] = features
        return features

    def predictions(self, data: EvaluationSet) -> Predictions:
        """Logits of the set's images over its classes."""
        return self.predictor(data)()

    def predictor(self, data: EvaluationSet) -> Callable[[], Predictions]:
        """`predictions` in two steps: all ranks compute features here; the call, on one rank, makes the logits."""
        bank_CD = encode_classes(self.tower, data.prompts, cache=self.cache, device=self.device)
        return partial(predictions_of, self.tower, self.features(data), bank_CD, rows=self.batch_size)


def zero_shot(
    examinee: Examinee, data: EvaluationSet, teacher: Examinee | None = None, *, temperature: bool = True
) -> tuple[Metrics, Details]:
    """Zero-shot classification or retrieval, as the set asks for.

    Args:
        examinee: who is asked.
        data: the set.
        teacher: who else is asked, for the metrics of agreement and per-class gains.
        temperature: as in ``classification_metrics``.
    """
    if data.kind == "retrieval":
        features = examinee.features(data)
        metrics = from_first_rank(lambda: retrieval_metrics(features))
        if teacher is not None:
            theirs = teacher.features(data)
            metrics |= _share("mean_recall@1", metrics, from_first_rank(lambda: retrieval_metrics(theirs)))
        return metrics, _samples(features)
    predict = examinee.predictor(data)
    predict_theirs = None if teacher is None else teacher.predictor(data)

    def compare() -> tuple[Metrics, Details]:
        ours, taught = predict(), None if predict_theirs is None else predict_theirs()
        metrics = classification_metrics(ours, taught, temperature=temperature)
        return metrics, _samples(ours) | _classes(data, ours, taught)

    return from_first_rank(compare)


def probe(
    examinee: Examinee, data: EvaluationSet, train: EvaluationSet, teacher: Examinee | None = None
) -> tuple[Metrics, Details]:
    """Linear probe; see ``linear_probe``.

    Raises:
        InputError: a set that is not of single labels, or splits of different classes.
    """
    for split in (data, train):
        _need_labels(split)
    if data.prompts.classnames != train.prompts.classnames:
        raise InputError(f"data {data.name}: its training split has other classes; allowed: the same")

    def measure(student: Examinee) -> Metrics:
        fitted_on, features = student.features(train), student.features(data)
        return from_first_rank(lambda: linear_probe(fitted_on, features, classes=data.prompts.num_classes))

    metrics = measure(examinee)
    if teacher is not None:
        metrics |= _share("lp_acc1", metrics, measure(teacher))
    return metrics, {"samples": len(data), "samples_train": len(train)}


def robustness(
    examinee: Examinee,
    sets: Sequence[EvaluationSet],
    teacher: Examinee | None = None,
    *,
    lines: Mapping[str, BaselineLine] | None = None,
) -> tuple[Metrics, Details]:
    """Robustness of the first set to the others, its shifts; see ``robustness_metrics``.

    Raises:
        InputError: a set that is not of single labels.
    """
    for data in sets:
        _need_labels(data)

    def measure(student: Examinee) -> Metrics:
        predictors = [student.predictor(data) for data in sets]

        def compare() -> Metrics:
            said = [(data.prompts.classnames, predict()) for data, predict in zip(sets, predictors, strict=True)]
            named = {data.name: shift for data, shift in zip(sets[1:], said[1:], strict=True)}
            return robustness_metrics(said[0], named, lines)

        return from_first_rank(compare)

    metrics = measure(examinee)
    if teacher is not None:
        metrics |= _share("mean_acc1", metrics, measure(teacher))
    details: Details = {"samples": {data.name: len(data) for data in sets}}
    return metrics, details | {"lines": {name: asdict(line) for name, line in (lines or {}).items()}}


def _share(main: str, ours: Metrics, theirs: Metrics) -> Metrics:
    return share_of_teacher(main, ours[main], theirs[main])


def _need_labels(data: EvaluationSet) -> None:
    if data.kind != "classification":
        raise InputError(f"data {data.name}: a {data.kind} set; allowed for this task: one with a class for each image")


def _samples(answers: Features | Predictions) -> Details:
    """How many samples there are, and a line for each whose image cannot be read."""
    return {"samples": len(answers.keys), "unreadable": list(answers.unreadable)}


def _classes(data: EvaluationSet, predictions: Predictions, teacher: Predictions | None) -> Details:
    """Results by class (against a teacher, the largest gain first), and the reliability diagram of single labels."""
    names = data.prompts.classnames
    if predictions.truth_NC is not None:
        counts_C = predictions.truth_NC.sum(0).tolist()
        rows = zip(names, counts_C, average_precision(predictions).tolist(), strict=True)
        return {"classes": [{"name": n, "samples": count, "average_precision": value} for n, count, value in rows]}
    recall_C = recall_per_class(predictions)
    diagram = [asdict(each) for each in reliability(predictions.logits_NC, predictions.labels_N)]
    if teacher is not None:
        gains = class_gains(recall_C, recall_per_class(teacher), predictions.labels_N, names)
        return {"classes": [asdict(each) | {"gain": each.gain} for each in gains], "reliability": diagram}
    counts_C = predictions.labels_N.bincount(minlength=len(names)).tolist()
    rows = zip(names, counts_C, recall_C.tolist(), strict=True)
    seen = [{"name": n, "samples": count, "recall": recall} for n, count, recall in rows if count]
    return {"classes": seen, "reliability": diagram}
