"""Results in CLIP_benchmark's JSON, one record a model and set."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from clipdistill.evaluation.retrieval import RECALL_AT
from clipdistill.evaluation.sets.samples import Kind

Record = dict[str, Any]

TASKS: dict[Kind, str] = {
    "classification": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
}
"""CLIP_benchmark's name for what a set is evaluated on."""

MEAN = "evaluation/mean"
"""In a run's metrics, the mean of the main metrics of its sets."""

RISING: dict[Kind, tuple[str, ...]] = {
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "multilabel": ("mean_average_precision",),
    "retrieval": (
        "mean_recall@1",
        *(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in RECALL_AT),
    ),
}
"""Metrics of a set of which more is better."""

_MAIN = {
    "zeroshot_classification": ("mean_average_precision", "acc1"),
    "zeroshot_retrieval": ("mean_recall@1",),
    "linear_probe": ("lp_acc1",),
    "robustness": ("mean_acc1",),
}


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...


def benchmark_record(
    data: _Named, metrics: Mapping[str, Any], *, model: str, pretrained: str, task: str | None = None
) -> Record:
    """One result in CLIP_benchmark's JSON format; a metric that does not apply is None.

    Args:
        data: the set.
        metrics: flat.
        model: what the user called it.
        pretrained: tag or checkpoint.
        task: the one that belongs to the set's kind by default.
    """
    return {
        "dataset": data.name,
        "model": model,
        "pretrained": pretrained,
        "task": task or TASKS[data.kind],
        "metrics": dict(metrics),
        "language": "en",
    }


def main_metric(record: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of the one metric that stands for a result; more is better."""
    name = next(name for name in _MAIN[record["task"]] if name in record["metrics"])
    return name, record["metrics"][name]


def mean_main_metric(records: Iterable[Mapping[str, Any]]) -> float:
    """Mean of the main metrics of several sets."""
    values = [main_metric(record)[1] for record in records]
    return sum(values) / len(values)
