"""An exponential moving average of a student."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from clipdistill.models.towers import Student


class MovingAverage:
    """The average of a student's weights and of its buffers, such as batch-norm statistics.

    The decay is lower at first: for update n, from 0, it is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, student: Student, *, decay: float) -> None:
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay

    def shared_state(self) -> dict[str, Tensor]:
        """The averages, the same on all ranks."""
        return self.average.state_dict()

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore saved averages."""
        self.average.load_state_dict(dict(tensors))

    @torch.no_grad()
    def update(self, student: Student, number: int) -> None:
        """Update the averages with the weights after optimizer step ``number``."""
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        pairs = list(zip(self.average.state_dict().values(), student.state_dict().values(), strict=True))
        floating = [(mean, current) for mean, current in pairs if mean.is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floating], [current for _, current in floating], share)
        for mean, current in pairs:
            if not mean.is_floating_point():
                mean.copy_(current)
