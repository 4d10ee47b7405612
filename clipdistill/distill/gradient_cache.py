"""Gradients of terms that couple rows across micro-batches (Gao et al. 2021, arXiv 2101.06983)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from clipdistill.distributed.random_state import random_state, set_random_state
from clipdistill.models.outputs import PER_SAMPLE, ModelOutputs


class GradientCache:
    """Features of all micro-batches without their graphs, and the backward pass from their gradients to the weights.

    All features are computed once without gradient; the loss of the combined batch gives each feature its gradient; a
    second forward pass of each micro-batch propagates it to the weights. Random states and buffers are restored before
    the second pass, so that both passes compute the same function.

    Args:
        student: its buffers are restored.
        forward: the student's outputs of a micro-batch, by its number.
        sizes: samples of each micro-batch.
        device: of the random states.
    """

    def __init__(
        self,
        student: nn.Module,
        forward: Callable[[int], ModelOutputs],
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sizes = sizes
        self._device = device
        before = {name: buffer.clone() for name, buffer in student.named_buffers()}
        self._random_states: list[Mapping[str, Tensor]] = []
        outputs = []
        with torch.no_grad():
            for number in range(len(sizes)):
                self._random_states.append(random_state(device))
                outputs.append(forward(number))
            for name, buffer in student.named_buffers():
                buffer.copy_(before[name])
        self.outputs = ModelOutputs.cat(outputs).map(lambda tensor: tensor.detach().requires_grad_())
        """Outputs of the combined batch: leaf tensors, which receive the gradients of the loss."""

    def surrogate(self, number: int) -> Tensor:
        """Run the second forward pass of a micro-batch; returns a 0-d tensor whose gradients are those of the loss."""
        set_random_state(self._random_states[number], self._device)
        outputs = self._forward(number)
        first = sum(self._sizes[:number])
        rows, last = slice(first, first + self._sizes[number]), number == len(self._sizes) - 1
        carried = []
        for name, value in outputs.tensors():
            grad = getattr(self.outputs, name).grad
            if grad is not None and (last or name in PER_SAMPLE):
                carried.append((value * (grad[rows] if name in PER_SAMPLE else grad)).sum())
        return torch.stack(carried).sum()
