"""An exponential moving average of a student."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from clipdistill.models.towers import Student


class MovingAverage:
    """The average of a student's weights and of its buffers, such as batch-norm statistics.

    Parameters that are frozen when it is made are not updated.

    The decay is lower at first: for update n, from 0, it is min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, student: Student, *, decay: float) -> None:
        self.average = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay
        self._student = student
        pairs = list(zip(self.average.parameters(), student.parameters(), strict=True))
        self._trained = [(mean, current) for mean, current in pairs if current.requires_grad]
        parameters = {name for name, _ in student.named_parameters(remove_duplicate=False)}
        self._buffers = [name for name in student.state_dict() if name not in parameters]

    def shared_state(self) -> dict[str, Tensor]:
        """The averages, without frozen parameters; the same on all ranks."""
        frozen = self._student.frozen_state()
        return {name: tensor for name, tensor in self.average.state_dict().items() if name not in frozen}

    def load_shared_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore saved averages; the student must be restored before."""
        self.average.load_state_dict({**self._student.frozen_state(), **tensors})

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Update the averages with the student's weights after optimizer step ``number``."""
        share = 1 - min(self.decay, (1 + number) / (10 + number))
        torch._foreach_lerp_([mean for mean, _ in self._trained], [current for _, current in self._trained], share)
        for name in self._buffers:
            mean, current = self.average.get_buffer(name), self._student.get_buffer(name)
            if mean.is_floating_point():
                mean.lerp_(current, share)
            else:
                mean.copy_(current)
