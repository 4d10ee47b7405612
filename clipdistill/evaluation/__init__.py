"""Evaluation as the field does it: CLIP_benchmark's sets, metrics and records, and agreement with a teacher.

    sets/ (shards, images, hub) ────> EvaluationSet ─┐
    models.py ─> Tower ─────────────────────────────┴─ encoding.py ─> SetFeatures, by all ranks together
        ├─ predictions.py ─> classification.py, calibration.py, agreement.py, robustness.py
        ├─ retrieval.py
        └─ linear_probe.py
    evaluate.py, tasks.py: what is measured on a set ─> benchmark_format.py, datacomp.py
    during_training.py: evaluate_sets, for the trainer
    command.py, session.py, results.py: ``clipdistill evaluate``

The names below are imported from their modules on first use: ``--help`` needs none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipdistill.evaluation.benchmark_format import benchmark_record, main_metric, mean_main_metric
    from clipdistill.evaluation.classification import classification_metrics
    from clipdistill.evaluation.cost import image_tower_cost, images_per_second
    from clipdistill.evaluation.during_training import evaluate_sets
    from clipdistill.evaluation.models import load_for_evaluation
    from clipdistill.evaluation.predictions import Predictions, predict
    from clipdistill.evaluation.sets.open import load_classification_set, open_set
    from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet

_MODULES = {
    "classification_metrics": "classification",
    "image_tower_cost": "cost",
    "images_per_second": "cost",
    "evaluate_sets": "during_training",
    "load_for_evaluation": "models",
    "Predictions": "predictions",
    "predict": "predictions",
    "benchmark_record": "benchmark_format",
    "main_metric": "benchmark_format",
    "mean_main_metric": "benchmark_format",
    "EncodedSample": "sets.samples",
    "EvaluationSet": "sets.samples",
    "load_classification_set": "sets.open",
    "open_set": "sets.open",
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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
