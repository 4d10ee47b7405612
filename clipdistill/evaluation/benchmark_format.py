"""Results in CLIP_benchmark's JSON: one record per model and set."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from clipdistill.evaluation.retrieval import RECALL_AT
from clipdistill.evaluation.sets.samples import Kind
from clipdistill.evaluation.tasks import main_metrics_of, tasks_for

Record = dict[str, Any]

MEAN = "evaluation/mean"
"""Name, in a run's metrics, of the mean over its sets of their main metrics."""

RISING: dict[Kind, tuple[str, ...]] = {
    "classification": ("acc1", "acc5", "mean_per_class_recall"),
    "multilabel": ("mean_average_precision",),
    "retrieval": (
        "mean_recall@1",
        *(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in RECALL_AT),
    ),
}
"""Metrics of each kind of set for which higher is better."""


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
        metrics: name -> value.
        model: name given by the user.
        pretrained: tag or checkpoint.
        task: by default the automatic one of the set's kind.
    """
    return {
        "dataset": data.name,
        "model": model,
        "pretrained": pretrained,
        "task": task or tasks_for(data.kind)[0].name,
        "metrics": dict(metrics),
        "language": "en",
    }


def main_metric(record: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of a result's main metric; higher is better."""
    name = next(name for name in main_metrics_of(record["task"]) if name in record["metrics"])
    return name, record["metrics"][name]


def named_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Metrics of several sets under the names of a run's metrics, ``evaluation/SET/METRIC``, and their mean."""
    named = {
        f"evaluation/{record['dataset']}/{name}": value
        for record in records
        for name, value in record["metrics"].items()
    }
    return {**named, MEAN: mean_main_metric(records)}


def mean_main_metric(records: Iterable[Mapping[str, Any]]) -> float:
    """Mean of the main metrics of several sets."""
    values = [main_metric(record)[1] for record in records]
    return sum(values) / len(values)
