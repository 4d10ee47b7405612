"""Common parts of the losses from features: results, checked inputs, and the choice of an implementation.

Shape suffixes: B rows of a batch, C classes, D and E feature widths of student and teacher.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clipdistill.losses._common import LossSum, check_labels, check_temperature, common_float
from clipdistill.losses.prior import TopKPrior

FusedImplementation = Literal["auto", "tiled", "triton"]
"""Implementation of a loss from features; auto: tiled, as the kernels have not been timed on a GPU."""

FUSED_FROM = {"cpu": 2**23, "cuda": 2**24}
"""Number of elements B * C of a logit matrix from which the fused losses are faster, by type of device; others as cuda.

CPU: measured. CUDA: an estimate, at which a matrix in float32 is 64 MB; not measured yet.
"""


def fused_wins(rows: int, columns: int, device: torch.device) -> bool:
    """Whether a loss of (rows, columns) logits is faster from the features."""
    return rows * columns >= FUSED_FROM.get(device.type, FUSED_FROM["cuda"])


@dataclass(frozen=True)
class GKLOutput:
    """``loss = alpha * soft_ce + beta * wmse`` and its two parts: 0-d, in nats, each with its gradient."""

    loss: Tensor
    soft_ce: Tensor
    wmse: Tensor


class GKLSums(NamedTuple):
    """The parts of GKL, unweighted, as sums over the rows of a batch."""

    soft_ce: LossSum
    wmse: LossSum


class GKLDenominators(NamedTuple):
    """Denominators of GKL's sums, 0-d: the number of rows and ``sum_b W_b^2``."""

    soft_ce: Tensor
    wmse: Tensor


class FeaturePair(NamedTuple):
    """The embeddings of both models and the scales of their logits (0-d)."""

    student_image_BD: Tensor
    student_text_CD: Tensor
    student_scale: Tensor
    teacher_image_BE: Tensor
    teacher_text_CE: Tensor
    teacher_scale: Tensor


@dataclass(frozen=True)
class Problem:
    """The loss to compute from the features.

    Attributes:
        kind: ``gkl``: soft cross-entropy and wMSE; ``kl``: KL times T^2, with a wMSE of 0.
        dtype: type of the arithmetic, float32 or float64.
        temperature: T.
        weight_temperature: T2.
        gamma: exponent of the wMSE's weights.
        prior: the class prior; None: weights from the teacher's logits.
        labels_B: rows of the prior.
        two_sided: whether the teacher's embeddings and scale receive a gradient too: of wMSE, or of KL.
    """

    kind: Literal["gkl", "kl"]
    dtype: torch.dtype
    temperature: float
    weight_temperature: float
    gamma: float
    prior: Tensor | TopKPrior | None
    labels_B: Tensor | None
    two_sided: bool = False

    @property
    def soft_factor(self) -> float:
        """Factor of the rows of the soft part."""
        return self.temperature**2 if self.kind == "kl" else 1.0

    def known_mass(self, classes: int) -> float | None:
        """``W_b`` if it is the same for every row and every teacher, else None."""
        if self.gamma == 0:
            return classes
        return 1 if self.gamma == 1 and self.prior is None else None


Weights = tuple[Tensor | float, ...]
"""Weights of the soft part and of the wMSE in the sum to differentiate; tensors are 0-d."""

Needs = tuple[bool, ...]
"""Whether image, text and scale of the student, and then those of the teacher, need a gradient."""


class Gradients(NamedTuple):
    """Gradients of the embeddings and scales, in the arithmetic's type; None if not needed."""

    image_BD: Tensor | None
    text_CD: Tensor | None
    scale: Tensor | None
    teacher_image_BE: Tensor | None = None
    teacher_text_CE: Tensor | None = None
    teacher_scale: Tensor | None = None


class Sums(NamedTuple):
    """Results of a forward pass.

    Attributes:
        soft: sum of the soft part over the rows, 0-d.
        wmse: numerator of wMSE, 0-d.
        denominator: denominator of wMSE, 0-d.
        gradients: of the weighted sum of soft and wmse, if weights were given.
        state: saved for the backward pass.
    """

    soft: Tensor
    wmse: Tensor
    denominator: Tensor
    gradients: Gradients | None = None
    state: Any = None


@dataclass(frozen=True)
class Inputs:
    """Checked arguments.

    Attributes:
        features: of both models.
        problem: the loss to compute from them.
        no_bias: 0 with the biases' gradients, which are 0, or nan if a bias is not finite; None without biases.
        implementation: the selected implementation.
    """

    features: FeaturePair
    problem: Problem
    no_bias: Tensor | None
    implementation: Literal["tiled", "triton"]

    @property
    def gradient_comes_first(self) -> bool:
        """Whether the gradient is computed in the forward pass, while the logits are available."""
        wanted = torch.is_grad_enabled() and any(feature.requires_grad for feature in self.features)
        return wanted and self.implementation == "tiled"


Side = tuple[Tensor, Tensor, Tensor | float, Tensor | float | None]
"""Image and text embeddings, scale and bias of a model."""


def read_inputs(
    kind: Literal["gkl", "kl"],
    student: Side,
    teacher: Side,
    *,
    temperature: float,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    class_prior: Tensor | TopKPrior | None = None,
    labels: Tensor | None = None,
    implementation: FusedImplementation = "auto",
    wait_for_device: bool = False,
    two_sided: bool = False,
) -> Inputs:
    """Check the arguments of a fused loss; raises ValueError for an invalid one."""
    check_temperature("temperature", temperature)
    check_temperature("weight_temperature", weight_temperature)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    _check_embeddings(student[:2], teacher[:2])
    image, classes = student[0], len(student[1])
    dtype = common_float(
        student_image=image, student_text=student[1], teacher_image=teacher[0], teacher_text=teacher[1]
    )
    if (class_prior is None) != (labels is None):
        missing = "class_prior" if class_prior is None else "labels"
        raise ValueError(f"class_prior and labels must be given together or not at all, got {missing}=None")
    if class_prior is not None:
        _check_prior(class_prior, classes, image.device)
    if labels is not None:
        labels = check_labels(labels, image.new_empty(()).expand(len(image), classes), wait_for_device=wait_for_device)
    problem = Problem(
        kind,
        dtype,
        temperature,
        weight_temperature,
        gamma,
        class_prior,
        labels,
        two_sided,
    )
    of_teacher = (teacher[0], teacher[1], _scalar("teacher_scale", teacher[2], image.device, dtype))
    features = FeaturePair(
        image,
        student[1],
        _scalar("student_scale", student[2], image.device, dtype),
        *(of_teacher if two_sided else (part.detach() for part in of_teacher)),
    )
    no_bias = None
    if student[3] is not None or teacher[3] is not None:
        student_bias, teacher_bias = (0.0 if side[3] is None else side[3] for side in (student, teacher))
        no_bias = 0 * _scalar("student_bias", student_bias, image.device, dtype)
        no_bias = no_bias + 0 * _scalar("teacher_bias", teacher_bias, image.device, dtype).detach()
    return Inputs(features, problem, no_bias, _choose(implementation, image.device, problem))


def _check_embeddings(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> None:
    named = dict(
        zip(("student_image", "student_text", "teacher_image", "teacher_text"), (*student, *teacher), strict=True)
    )
    for name, embedding in named.items():
        if embedding.ndim != 2:
            raise ValueError(f"{name} must be 2-D, got shape {tuple(embedding.shape)}")
        if embedding.device != student[0].device:
            raise ValueError(f"{name} must be on student_image's device {student[0].device}, got {embedding.device}")
    for name, (image, text) in (("student", student), ("teacher", teacher)):
        if text.shape[1] != image.shape[1]:
            raise ValueError(f"{name}_text must have {name}_image's width {image.shape[1]}, got {text.shape[1]}")
    if len(student[1]) == 0:
        raise ValueError(f"student_text must have at least one row, got shape {tuple(student[1].shape)}")
    for kind, of_student, of_teacher in zip(("image", "text"), student, teacher, strict=True):
        if len(of_teacher) != len(of_student):
            raise ValueError(
                f"teacher_{kind} must have as many rows as student_{kind}, {len(of_student)}, got {len(of_teacher)}"
            )


def _check_prior(prior: Tensor | TopKPrior, classes: int, device: torch.device) -> None:
    if tuple(prior.shape) != (classes, classes):
        raise ValueError(f"class_prior must have shape {(classes, classes)}, got {tuple(prior.shape)}")
    if prior.device != device:
        raise ValueError(f"class_prior must be on the embeddings' device {device}, got {prior.device}")
    if not isinstance(prior, TopKPrior):
        common_float(class_prior=prior)


def _scalar(name: str, value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The value as a 0-d tensor on the device; a tensor keeps its type and its gradient."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    common_float(**{name: value})
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
    return value.reshape(()).to(device)


def _choose(implementation: FusedImplementation, device: torch.device, problem: Problem) -> Literal["tiled", "triton"]:
    match implementation:
        case "triton":
            if obstacle := _triton_obstacle(device, problem):
                raise ValueError(f"implementation 'triton' needs {obstacle}")
            return "triton"
        case "auto" | "tiled":
            return "tiled"
    raise ValueError(f"implementation must be auto, tiled or triton, got {implementation!r}")


def _triton_obstacle(device: torch.device, problem: Problem) -> str | None:
    """Unmet requirement of the kernels, if any. Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU."""
    if not _triton_is_installed():
        return "the package triton"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"embeddings on CUDA, got {device}"
    if problem.dtype == torch.float64:
        return "embeddings of at most 32 bits, got torch.float64"
    if isinstance(problem.prior, TopKPrior):
        return "a dense class_prior, got a TopKPrior"
    if problem.two_sided:
        return "a one-sided loss"
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
