"""Predictions of a model for a set, over its class prompts.

Shapes: N samples, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipdistill.evaluation.encoding import SetFeatures, encode_classes, encode_set
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.models.towers import Tower


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of one model for a whole set; on the CPU.

    Attributes:
        logits_NC: similarity logits, float32; NaN for unreadable images.
        readable_N: whether the image could be decoded.
        labels_N: the true classes; -1 in multi-label sets.
        truth_NC: in multi-label sets, whether a class applies to the image; else None.
        keys: of the samples.
        unreadable: one line for each unreadable image.
    """

    logits_NC: Tensor
    readable_N: Tensor
    labels_N: Tensor
    truth_NC: Tensor | None
    keys: tuple[str, ...]
    unreadable: tuple[str, ...]


@torch.no_grad()
def predict(
    tower: Tower,
    data: EvaluationSet,
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predictions:
    """Predictions of a tower for a set with class names, on this rank alone.

    Args:
        tower: the model; its mode is restored afterwards.
        data: the set.
        batch_size: images at once.
        workers: threads that decode and resize; 0: one per core.
        device: where the tower is.
        cache: folder for class features.
        progress: called with the number of samples done.

    Raises:
        InputError: as ``encode_set``.
    """
    bank_CD = encode_classes(tower, data.prompts, cache=cache, device=device)
    features = encode_set(
        tower, data, batch_size=batch_size, workers=workers, device=device, alone=True, progress=progress
    )
    return predictions_of(tower, features, bank_CD, rows=batch_size)


def predictions_of(tower: Tower, features: SetFeatures, bank_CD: Tensor, *, rows: int) -> Predictions:
    """Predictions from image features and class features, ``rows`` samples at once."""
    scale, bias = tower.clip.logit_scale.detach().exp().cpu(), tower.logit_bias()
    bank_CD, bias = bank_CD.cpu(), None if bias is None else bias.detach().cpu()
    logits_NC = torch.cat(
        [similarity_logits(rows_BD, bank_CD, scale, bias) for rows_BD in features.image_ND.split(rows)]
    )
    logits_NC[~features.readable_N] = torch.nan
    truth_NC = None
    if features.kind == "multilabel":
        truth_NC = torch.zeros(logits_NC.shape, dtype=torch.bool)
        for truth_C, classes in zip(truth_NC, features.classes, strict=True):
            truth_C[list(classes)] = True
    return Predictions(
        logits_NC=logits_NC,
        readable_N=features.readable_N,
        labels_N=features.labels_N,
        truth_NC=truth_NC,
        keys=features.keys,
        unreadable=features.unreadable,
    )
