"""Measuring a model as the field does: CLIP_benchmark's sets, metrics and records, and agreement with a teacher.

    sets.py (shard_sets, image_sets, hub_sets) ──> EvaluationSet ─┐
    models.py (transformers_clip) ──> Tower ──────────────────────┴─ encoding.py ─> Features, by all ranks together
        ├─ predictions.py ─> classification.py, calibration.py, agreement.py, robustness.py
        ├─ retrieval.py
        └─ linear_probe.py
    evaluate.py: tasks, and evaluate_sets for the trainer ─> records.py, datacomp.py
    command.py, session.py, results.py: ``clipdistill evaluate``

The names below are imported from their modules when they are first used, as ``--help`` needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.evaluation.classification import classification_metrics
    from clipdistill.evaluation.cost import image_tower_cost, images_per_second
    from clipdistill.evaluation.evaluate import evaluate_sets
    from clipdistill.evaluation.models import load_for_evaluation
    from clipdistill.evaluation.predictions import Predictions, predict
    from clipdistill.evaluation.records import benchmark_record, main_metric, mean_main_metric
    from clipdistill.evaluation.samples import EncodedSample, EvaluationSet
    from clipdistill.evaluation.sets import load_classification_set, open_set

_HOMES = {
    "classification_metrics": "classification",
    "image_tower_cost": "cost",
    "images_per_second": "cost",
    "evaluate_sets": "evaluate",
    "load_for_evaluation": "models",
    "Predictions": "predictions",
    "predict": "predictions",
    "benchmark_record": "records",
    "main_metric": "records",
    "mean_main_metric": "records",
    "EncodedSample": "samples",
    "EvaluationSet": "samples",
    "load_classification_set": "sets",
    "open_set": "sets",
}

__all__ = [
    "EncodedSample",
    "EvaluationSet",
    "Predictions",
    "benchmark_record",
    "classification_metrics",
    "evaluate_sets",
    "image_tower_cost",
    "images_per_second",
    "load_classification_set",
    "load_for_evaluation",
    "main_metric",
    "mean_main_metric",
    "open_set",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
