"""Adversarial weight perturbation (AWP): the gradients of a step are taken where the weights are worse.

Source: Wu et al. 2020, Adversarial weight perturbation helps robust generalization (arXiv 2004.05884).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipdistill.models.towers import Student


class WeightAttack:
    """Moves the student's weights along the gradient of its loss.

    Each matrix, kernel or embedding ``w`` with the gradient ``g`` moves by ``radius |w| g / |g|``; biases, scales and
    what is frozen stay.

    Args:
        student: whose weights are moved.
        radius: relative to the norm of each weight tensor.
        from_step: first optimizer step, from 0, in which they are moved.
    """

    def __init__(self, student: Student, *, radius: float, from_step: int) -> None:
        self._student = student
        self._radius = radius
        self._from_step = from_step

    def is_active(self, step: int) -> bool:
        """Whether the weights of an optimizer step are moved."""
        return step >= self._from_step

    @contextmanager
    def moved(self, accumulate_gradients: Callable[[], object]) -> Iterator[None]:
        """The weights moved within the block, and then as they were, to the bit; the student's gradients begin empty.

        Args:
            accumulate_gradients: leaves the gradients of the loss, summed over all ranks, in the student. What it
                changes of statistics, as those of batch norm, is undone.
        """
        statistics = [buffer.clone() for buffer in self._student.buffers()]
        accumulate_gradients()
        with torch.no_grad():
            for buffer, before in zip(self._student.buffers(), statistics, strict=True):
                buffer.copy_(before)
            kept: list[tuple[nn.Parameter, Tensor]] = []
            for weight in self._student.parameters():
                gradient, weight.grad = weight.grad, None
                if gradient is not None and weight.ndim > 1 and (length := gradient.norm()) > 0:
                    kept.append((weight, weight.clone()))
                    weight.add_(gradient * (self._radius * weight.norm() / length))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in kept:
                    weight.copy_(before)
