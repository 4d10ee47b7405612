"""Optimizers: settings, parameter groups, and the learning rate of each step.

To add one: a subclass of ``Optimizer`` with a ``name`` of its own, and its entry in ``OPTIMIZERS``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from clipdistill.settings import CountOrZero, NonNegative, Positive, Settings, union_of

Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Settings):
    """Settings of every optimizer; biases, norms, position embeddings and the logit scale are not decayed."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices and convolutions."""
    clip_norm: Positive | None = 1.0
    """Largest global gradient norm; empty: no clipping."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps of linear warm-up; then the rate decays to 0 along a cosine."""

    def make(self, student: nn.Module, device: torch.device) -> torch.optim.Optimizer:
        """The optimizer of the student's trainable parameters."""
        raise NotImplementedError


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    """Selects this optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay rates of the running averages of gradients and of their squares."""
    eps: Positive = 1e-8
    """Added to the square root of the second running average."""

    def make(self, student: nn.Module, device: torch.device) -> torch.optim.AdamW:
        """The optimizer of the student's trainable parameters."""
        return torch.optim.AdamW(
            parameter_groups(student, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=device.type in ("cuda", "cpu") or None,  # on a CPU, one pass over memory in place of about ten
        )


OPTIMIZERS: tuple[type[Optimizer], ...] = (AdamW,)
"""All optimizers that a config may name."""

if TYPE_CHECKING:
    AnyOptimizer = Optimizer
else:
    AnyOptimizer = union_of(OPTIMIZERS, "name", default="adamw")


def parameter_groups(student: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and convolutions are decayed; vectors and scales (of any number of dimensions), positions,
    class tokens and the logit scale are not. ``lr_scale`` multiplies the schedule's rate.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            position = name.endswith(("positional_embedding", "pos_embed", "class_embedding", "cls_token"))
            vector = sum(size > 1 for size in parameter.shape) < 2
            (free if vector or position else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": free, "weight_decay": 0.0, "lr_scale": 1.0},
    ]


@torch.no_grad()
def match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give a restored optimizer's state the memory layout of its parameters: fused updates on a CPU take parameter,
    gradient and state for equally laid out, and compute something else where they are not."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set each group's learning rate: ``rate`` times the group's own ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then a cosine that would reach 0 one step after the last.

    Attributes:
        peak: the highest learning rate.
        warmup_steps: optimizer steps of the warm-up.
        total_steps: length of the run.
        anchor_step: the end of the warm-up; or the step at which a run was resumed with another length, as the number
            of steps per epoch depends on the number of ranks.
        anchor: completed share of the cosine at ``anchor_step``.
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
        return self.peak * (0.5 * (1 + math.cos(math.pi * self.progress(step))))

    def progress(self, step: int) -> float:
        """The completed share of the cosine."""
        share = (step - self.anchor_step) / max(1, self.total_steps - self.anchor_step)
        return self.anchor + (1 - self.anchor) * share

    def resumed(self, before: "Cosine", step: int) -> "Cosine":
        """This schedule, continued from another one at a step."""
        if self.total_steps == before.total_steps or step <= self.warmup_steps:
            return replace(self, anchor_step=before.anchor_step, anchor=before.anchor)
        return replace(self, anchor_step=step, anchor=before.progress(step))


class Schedule:
    """The learning rates of a run, as a component of its checkpoints.

    Args:
        optimizer: peak and warm-up.
        total_steps: length of the run.
        step: step at which the run is resumed; 0: a new run.
    """

    def __init__(self, optimizer: Optimizer, *, total_steps: int, step: int = 0) -> None:
        self.total_steps = total_steps
        self._step = step
        self._curve = Cosine(
            peak=optimizer.lr,
            warmup_steps=optimizer.warmup_steps,
            total_steps=total_steps,
            anchor_step=optimizer.warmup_steps,
        )

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, from 0."""
        return self._curve.rate(step)

    def state_dict(self) -> dict[str, Any]:
        """The curve."""
        return asdict(self._curve)

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue the curve of a run, which may have had another length."""
        self._curve = self._curve.resumed(Cosine(**states[0]), self._step)
