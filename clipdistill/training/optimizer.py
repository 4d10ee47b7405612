"""What the optimizer is given: groups of parameters, and a learning rate for each step."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's two groups: decayed are matrices and convolutions; not vectors and scales (of whatever number of
    dimensions), positions, class tokens, the logit scale.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            position = name.endswith(("positional_embedding", "pos_embed", "class_embedding", "cls_token"))
            vector = sum(size > 1 for size in parameter.shape) < 2
            (free if vector or position else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then a cosine that would reach 0 one step after the last.

    Attributes:
        peak: the highest learning rate.
        warmup_steps: optimizer steps of the warm-up.
        total_steps: length of the run.
        anchor_step: the step at which
        anchor: this share of the cosine has been gone through: the end of the warm-up, or where a run went on that
            has become shorter or longer, since other processes make other numbers of steps of an epoch.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    anchor_step: int
    anchor: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, from 0."""
        if step < self.warmup_steps:
            return self.peak * ((step + 1) / self.warmup_steps)
        return self.peak * (0.5 * (1 + math.cos(math.pi * self._progress(step))))

    def _progress(self, step: int) -> float:
        share = (step - self.anchor_step) / max(1, self.total_steps - self.anchor_step)
        return self.anchor + (1 - self.anchor) * share

    def resumed(self, state: Mapping[str, Any], step: int) -> "Schedule":
        """This schedule, where it goes on at a step after the one whose ``asdict`` is ``state``."""
        before = Schedule(**state)
        if self.total_steps == before.total_steps or step <= self.warmup_steps:
            return replace(self, anchor_step=before.anchor_step, anchor=before.anchor)
        return replace(self, anchor_step=step, anchor=before._progress(step))

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)
