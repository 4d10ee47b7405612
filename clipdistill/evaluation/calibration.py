"""Calibration: whether predictions made with a confidence of 80 % are right in 80 % of the cases.

Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599: expected calibration error over 15
equally wide bins (eq. 3), and temperature scaling (section 4.2). Unreadable images
have no confidence and are left out.

Shapes: N samples, C classes, K bins.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BINS = 15
_WIDEST = 1000.0
"""Temperatures are searched from 1 / 1000 to 1000."""


@dataclass(frozen=True)
class Bin:
    """A bin of the reliability diagram; its means are None where it is empty."""

    samples: int
    confidence: float | None
    accuracy: float | None


def reliability(logits_NC: Tensor, labels_N: Tensor, *, bins: int = BINS) -> list[Bin]:
    """The reliability diagram: samples by the confidence of their top-1 class, in bins of equal width from 0 to 1.

    Args:
        logits_NC: rows of NaN are left out.
        labels_N: the true classes.
        bins: K; a confidence on an edge belongs to the lower bin, as in the paper.
    """
    known_N = ~logits_NC[:, 0].isnan()
    confidence_N, top1_N = _top1(logits_NC[known_N])
    hit_N = (top1_N == labels_N[known_N]).double()
    bin_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    result = []
    for number in range(bins):
        inside_N = bin_N == number
        count = int(inside_N.sum())
        means = (float(values_N[inside_N].mean()) if count else None for values_N in (confidence_N, hit_N))
        result.append(Bin(count, *means))
    return result


def expected_calibration_error(logits_NC: Tensor, labels_N: Tensor, *, bins: int = BINS) -> float:
    """Mean over samples of the gap between confidence and accuracy of their bin, from 0 to 1."""
    diagram = reliability(logits_NC, labels_N, bins=bins)
    filled = [each for each in diagram if each.confidence is not None and each.accuracy is not None]
    gaps = sum(each.samples * abs(each.confidence - each.accuracy) for each in filled)  # type: ignore[operator]
    return gaps / sum(each.samples for each in filled)


def fit_temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The temperature T > 0 that minimises the cross-entropy of softmax(logits / T): a convex problem in 1 / T."""

    def cross_entropy(log_temperature: float) -> float:
        return float(F.cross_entropy(logits_NC / math.exp(log_temperature), labels_N))

    widest = math.log(_WIDEST)
    return math.exp(minimize_scalar(cross_entropy, bounds=(-widest, widest), method="bounded").x)


def calibration_metrics(logits_NC: Tensor, labels_N: Tensor) -> dict[str, float | int | None]:
    """Calibration error after temperature scaling, cross-fitted on two halves.

    One temperature is fitted on the samples at even positions and applied to those at odd positions, and vice versa.

    Returns:
        ``temperature``: the geometric mean of both; ``ece_tempered``: the calibration error over all scaled samples.
        Both None for fewer than 2 samples.
    """
    known_N = ~logits_NC[:, 0].isnan()
    logits_NC, labels_N = logits_NC[known_N], labels_N[known_N]
    if len(labels_N) < 2:
        return {"temperature": None, "ece_tempered": None}
    tempered_NC = torch.empty_like(logits_NC)
    logs = []
    for half in (0, 1):
        temperature = fit_temperature(logits_NC[1 - half :: 2], labels_N[1 - half :: 2])
        tempered_NC[half::2] = logits_NC[half::2] / temperature
        logs.append(math.log(temperature))
    return {
        "temperature": math.exp(sum(logs) / 2),
        "ece_tempered": expected_calibration_error(tempered_NC, labels_N),
    }


def _top1(logits_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Probability (N,), float64, and index (N,) of the top-1 class."""
    highest_N, top1_N = logits_NC.max(dim=1)
    return (highest_N - logits_NC.logsumexp(dim=1)).double().exp(), top1_N
