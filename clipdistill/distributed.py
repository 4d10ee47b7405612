"""What the ranks exchange: sums, and features with their gradients. Each function is the identity on one process.

Shapes: N ranks, B rows a rank, D features.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not running."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def widest_float(device: torch.device) -> torch.dtype:
    """float64, where the device has it (Apple's MPS does not)."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise sum over all ranks, a new tensor without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class _Gather(torch.autograd.Function):
    """Concatenate over ranks; the backward pass sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        ctx.rows = len(rows_BD)
        parts = [torch.empty_like(rows_BD) for _ in range(world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_ND = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_ND)
        start = rank() * ctx.rows
        return grad_ND[start : start + ctx.rows]


def gather_rows(rows_BD: Tensor) -> Tensor:
    """Rows of all ranks, (N * B, D), in the order of ranks; every rank must bring the same shape.

    The gradient that reaches a row is the sum of the gradients of all ranks' losses towards it.
    """
    if world_size() == 1:
        return rows_BD
    return _Gather.apply(rows_BD)
