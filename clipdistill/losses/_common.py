"""Helpers of all losses: sums with their denominator, input checks, and the precision of the arithmetic.

Shape suffixes: B rows of a batch, C classes (or other columns).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """A loss as a fraction, so that parts of a batch can be added before the division.

    ``numerator`` (0-d) carries the gradient; ``denominator`` (0-d) never depends on the student. Add the sums
    of all micro-batches and ranks and divide once: the result, and its gradient, equal those of the entire
    batch.
    """

    numerator: Tensor
    denominator: Tensor

    @property
    def value(self) -> Tensor:
        """The loss, 0-d: numerator / denominator."""
        return self.numerator / self.denominator

    def __add__(self, other: LossSum) -> LossSum:
        return LossSum(self.numerator + other.numerator, self.denominator + other.denominator)


def mean_over_rows(numerator: Tensor, rows: int) -> LossSum:
    """A loss whose denominator is the number of rows."""
    return LossSum(numerator, numerator.new_full((), rows))


def outside_autocast(tensor: Tensor) -> torch.autocast:
    """Context in which operations keep the precision of their inputs, regardless of an enclosing autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def at_least_float32(**tensors: Tensor) -> list[Tensor]:
    """The tensors in one common floating type: float64 if any of them is float64, else float32."""
    dtype = common_float(**tensors)
    return [tensor.to(dtype) for tensor in tensors.values()]


def common_float(**tensors: Tensor) -> torch.dtype:
    """The type of arithmetic on the tensors: float64 if any of them is float64, else float32."""
    dtype = torch.float32
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def matching_matrices(**tensors: Tensor) -> list[Tensor]:
    """The tensors in a common type (float32 or float64), checked to be 2-D and of the same shape, C > 0."""
    check_matrices(**tensors)
    return at_least_float32(**tensors)


def check_matrices(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are 2-D and of the same shape, C > 0."""
    first, *others = tensors
    shape = tuple(tensors[first].shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{first} must be 2-D with at least one column, got shape {shape}")
    for name in others:
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} must have {first}'s shape {shape}, got {tuple(tensors[name].shape)}")


def logit_pair(student_logits: Tensor, teacher_logits: Tensor) -> list[Tensor]:
    """Student and teacher logits as ``matching_matrices``, the teacher's detached: it is a constant."""
    return matching_matrices(student_logits=student_logits, teacher_logits=teacher_logits.detach())


def check_labels(labels: Tensor, logits_BC: Tensor, *, wait_for_device: bool) -> Tensor:
    """``labels`` as int64 on the logits' device, checked to be (B,) integers in [0, C).

    Checking the range of labels on a GPU requires a synchronisation. Without ``wait_for_device``, the range is
    left to the indexing kernels, which abort the program on a bad index; labels on the CPU are always checked.
    """
    rows, classes = logits_BC.shape
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"labels must have shape ({rows},), one per row, got {tuple(labels.shape)}")
    if rows > 0 and (wait_for_device or labels.device.type == "cpu"):
        low, high = torch.stack(torch.aminmax(labels)).tolist()
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in [0, {classes}), got {low if low < 0 else high}")
    return labels.to(logits_BC.device, torch.int64, non_blocking=True)


def check_temperature(name: str, temperature: float) -> None:
    """Raise ValueError unless 0 < temperature < inf."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {temperature}")


def tempered(logits_BC: Tensor, temperature: float) -> Tensor:
    """``logits / temperature``, at no cost if the temperature is 1."""
    return logits_BC if temperature == 1 else logits_BC / temperature


def nan_where_softmax_hides_infinity(logits_BC: Tensor) -> Tensor:
    """(B,): 0 for a row without -inf and nan, nan for a row that contains one. No gradient.

    A softmax turns +inf and nan into nan, but -inf into probability 0, which hides it: a loss that depends on
    the logits only through their softmax adds this to its rows.
    """
    return logits_BC.detach().amin(1) * 0


def row_blocks(matrix_BC: Tensor) -> list[slice]:
    """Consecutive slices of the rows, small enough that a few temporary blocks fit in a CPU's cache.

    A block is large enough for all threads; it is the entire matrix on other devices, and under torch.compile, which
    fuses the passes over memory itself.
    """
    rows, columns = matrix_BC.shape
    if matrix_BC.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, rows)]
    step = max(1, 2**17 * torch.get_num_threads() // columns)
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def refuse_second_derivative(loss: str) -> None:
    """Raise RuntimeError in a backward pass that is itself recorded: a hand-written gradient is a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{loss} has no second derivative: differentiate without create_graph=True")
