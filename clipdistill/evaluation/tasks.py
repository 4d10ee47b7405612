"""The tasks that are measured on one test set. (``linear_probe`` and ``robustness`` take several sets: session.py.)

To add one: a subclass of ``Task`` in a file of its own, and an instance in ``SET_TASKS``. Nothing here imports torch
before a task is measured, so that ``evaluate --help`` is quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from clipdistill.evaluation.classification import Metrics
    from clipdistill.evaluation.evaluate import Details, Evaluator
    from clipdistill.evaluation.sets.samples import EvaluationSet, Kind


class Task(ABC):
    """A measurement of a model on a set."""

    name: ClassVar[str]
    """On the command line, and in CLIP_benchmark's records."""
    kinds: ClassVar[tuple[Kind, ...]]
    """The kinds of sets that it takes."""
    main_metrics: ClassVar[tuple[str, ...]]
    """The metrics that stand for the task, of which the first that a result has counts; higher is better."""
    automatic: ClassVar[bool] = False
    """Whether ``--task auto`` runs it on sets of its kinds."""

    @abstractmethod
    def measure(self, evaluator: Evaluator, data: EvaluationSet, teacher: Evaluator | None) -> tuple[Metrics, Details]:
        """Metrics of the set, and details for the summary; every rank calls this, and all get the same result.

        Args:
            evaluator: of the model.
            data: the set.
            teacher: evaluator of its teacher, for metrics that compare them.
        """


class ZeroShotClassification(Task):
    """Accuracy over class prompts; mean average precision on multi-label sets."""

    name = "zeroshot_classification"
    kinds = ("classification", "multilabel")
    main_metrics = ("mean_average_precision", "acc1")
    automatic = True

    def measure(self, evaluator: Evaluator, data: EvaluationSet, teacher: Evaluator | None) -> tuple[Metrics, Details]:
        """See ``evaluate.zero_shot``."""
        from clipdistill.evaluation.evaluate import zero_shot

        return zero_shot(evaluator, data, teacher)


class ZeroShotRetrieval(Task):
    """Recall of images by captions, and of captions by images."""

    name = "zeroshot_retrieval"
    kinds = ("retrieval",)
    main_metrics = ("mean_recall@1",)
    automatic = True

    def measure(self, evaluator: Evaluator, data: EvaluationSet, teacher: Evaluator | None) -> tuple[Metrics, Details]:
        """See ``evaluate.zero_shot``."""
        from clipdistill.evaluation.evaluate import zero_shot

        return zero_shot(evaluator, data, teacher)


ATTACK_TASK = "attack"
"""Accuracy under attack (attack.py), which has settings of its own."""

SET_TASKS: tuple[Task, ...] = (ZeroShotClassification(), ZeroShotRetrieval())
"""Every task on one set."""


def tasks_for(kind: Kind) -> list[Task]:
    """The tasks that take a kind of sets; the automatic one first."""
    return sorted((task for task in SET_TASKS if kind in task.kinds), key=lambda task: not task.automatic)


def main_metrics_of(name: str) -> tuple[str, ...]:
    """The main metrics of a task, also of those on several sets."""
    several = {"linear_probe": ("lp_acc1",), "robustness": ("mean_acc1",), ATTACK_TASK: ("robust_acc1",)}
    return several.get(name) or next(task.main_metrics for task in SET_TASKS if task.name == name)
