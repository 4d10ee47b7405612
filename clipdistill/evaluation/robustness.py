"""Robustness: accuracy under distribution shifts of a base set, and its part not explained by the base accuracy.

Taori et al. 2020, "Measuring Robustness to Natural Distribution Shifts in Image Classification", arXiv 2007.00644: the
accuracies of ordinary models on a base set and on a shift of it lie on a line once both are put through the logit
function. A model's effective robustness is its accuracy on the shift minus the line's prediction for its base accuracy.
The line depends on the models that it is fitted to: these are always given by the user.

Shapes: N samples, C classes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.special import expit, logit
from scipy.stats import linregress

from clipdistill.errors import InputError
from clipdistill.evaluation.classification import Metrics, top1_hits
from clipdistill.evaluation.predictions import Predictions
from clipdistill.models.class_matching import normalise

log = logging.getLogger(__name__)

TASK = "robustness"


@dataclass(frozen=True)
class BaselineLine:
    """logit(accuracy on the shift) = slope * logit(accuracy on the base) + intercept."""

    slope: float
    intercept: float
    models: int

    def expected(self, base_accuracy: float) -> float:
        """Accuracy on the shift predicted from an accuracy on the base."""
        return float(expit(self.slope * logit(base_accuracy) + self.intercept))


def robustness_metrics(
    base: tuple[Sequence[str], Predictions],
    shifts: Mapping[str, tuple[Sequence[str], Predictions]],
    lines: Mapping[str, BaselineLine] | None = None,
) -> Metrics:
    """Metrics of a base set and its shifts.

    Args:
        base: class names and predictions of the base set.
        shifts: by name, class names and predictions of each shift.
        lines: baseline of each shift by name; without one there is no effective robustness.

    Returns:
        ``base_acc1``; for each shift ``NAME/acc1``, ``NAME/base_acc1``: on the base set's samples of the shift's
        classes, over these classes alone (over all if the shift has classes that the base set lacks),
        ``NAME/drop``: their difference, and with a line ``NAME/effective_robustness``; ``mean_acc1``, ``mean_drop`` and
        ``mean_effective_robustness`` over the shifts; ``unreadable``: number of unreadable images in all sets.
    """
    base_names, base_predictions = base
    metrics: Metrics = {"base_acc1": _accuracy(base_predictions)}
    for name, (names, predictions) in shifts.items():
        accuracy = _accuracy(predictions)
        base_accuracy = _accuracy(_restricted(base_predictions, base_names, names, shift=name))
        metrics[f"{name}/acc1"] = accuracy
        metrics[f"{name}/base_acc1"] = base_accuracy
        metrics[f"{name}/drop"] = base_accuracy - accuracy
        if lines and name in lines:
            metrics[f"{name}/effective_robustness"] = accuracy - lines[name].expected(base_accuracy)
    for part in ("acc1", "drop", "effective_robustness"):
        values = [metrics[f"{name}/{part}"] for name in shifts if f"{name}/{part}" in metrics]
        if values:
            metrics[f"mean_{part}"] = sum(value for value in values if value is not None) / len(values)
    everything = [base_predictions, *(predictions for _, predictions in shifts.values())]
    metrics["unreadable"] = sum(len(predictions.unreadable) for predictions in everything)
    return metrics


def fit_lines(records: Sequence[Mapping[str, Any]], base: str, shifts: Sequence[str]) -> dict[str, BaselineLine]:
    """Fit the line of each shift to the results of other models.

    Args:
        records: results of `robustness_metrics` for each model, in CLIP_benchmark's format.
        base: name of the base set.
        shifts: names of the shifts.

    Raises:
        InputError: for a shift, fewer than two models of different base accuracy, or an accuracy of 0 or 1 (infinite
            logit).
    """
    lines = {}
    for name in shifts:
        points = [
            (record["metrics"][f"{name}/base_acc1"], record["metrics"][f"{name}/acc1"])
            for record in records
            if record["task"] == TASK and record["dataset"] == base and f"{name}/acc1" in record["metrics"]
        ]
        if len({x for x, _ in points}) < 2:
            raise InputError(
                f"--baseline: {len(points)} models with results of --task robustness on {base} and {name}; allowed: 2 "
                "or more models, of different base accuracy"
            )
        if not all(0 < value < 1 for point in points for value in point):
            raise InputError(f"--baseline: an accuracy of 0 or 1 on {base} or {name}; allowed: values between 0 and 1")
        fit = linregress([logit(x) for x, _ in points], [logit(y) for _, y in points])
        lines[name] = BaselineLine(float(fit.slope), float(fit.intercept), len(points))
    return lines


def _accuracy(predictions: Predictions) -> float:
    return float(top1_hits(predictions).double().mean())


def _restricted(predictions: Predictions, names: Sequence[str], kept: Sequence[str], *, shift: str) -> Predictions:
    """Predictions restricted to a shift's classes and their samples; unchanged, with a warning, if one of them is not
    among the names, in whatever spelling."""
    if len(kept) >= len(names):
        return predictions
    spelling = str if set(kept) <= set(names) else normalise
    number_of = {spelling(name): number for number, name in enumerate(names)}
    strangers = [name for name in kept if spelling(name) not in number_of]
    if spelling is normalise and (len(number_of) < len(names) or len(set(map(normalise, kept))) < len(kept)):
        strangers = [name for name in kept if name not in names]
    if strangers:
        log.warning(
            "--data: %d of the %d classes of %s are not among the base set's (such as %r): its drop is from the "
            "accuracy over all classes of the base set",
            len(strangers),
            len(kept),
            shift,
            strangers[0],
        )
        return predictions
    classes_K = torch.tensor([number_of[spelling(name)] for name in kept])
    new_label_C = torch.full((len(names),), -1)
    new_label_C[classes_K] = torch.arange(len(kept))
    labels_N = new_label_C[predictions.labels_N]
    inside_N = labels_N >= 0
    if not inside_N.any():
        raise InputError(
            f"--data: the base set has no sample of the {len(kept)} classes of a shift; allowed: shifts of the base set"
        )
    return replace(
        predictions,
        logits_NC=predictions.logits_NC[inside_N][:, classes_K],
        labels_N=labels_N[inside_N],
        readable_N=predictions.readable_N[inside_N],
        keys=tuple(key for key, inside in zip(predictions.keys, inside_N.tolist(), strict=True) if inside),
    )
