"""Collectives: sums, features with their gradients, plain values. All are the identity on one process.

Plain values use a separate gloo group, so that they synchronise no device.

Shapes: N ranks, B rows per rank, D features.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from clipdistill.distributed.launcher import check_number_of_processes
from clipdistill.errors import InputError

_LONGEST_WAIT = timedelta(days=1)
"""For commands without a trainer: rank 0 may do long work alone, such as fitting a linear probe."""


def world_size() -> int:
    """Number of ranks; 1 if torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the ranks, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def widest_float(device: torch.device) -> torch.dtype:
    """float64 if the device supports it (Apple's MPS does not), else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise sum over all ranks, a new tensor without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        on_host = total.device.type == "cpu" and dist.get_backend() == "nccl"
        dist.all_reduce(total, group=_hosts if on_host else None)
    return total


_hosts: Any = None
"""The process group of plain values; None: the default group."""


def open_host_group(timeout: float) -> None:
    """Create the group of plain values; every rank calls this after the default group was created.

    Args:
        timeout: seconds after which a rank that waits for another raises RuntimeError.
    """
    global _hosts
    if world_size() > 1:
        _hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def forget_host_group() -> None:
    """Forget the group: it is destroyed, or about to be."""
    global _hosts
    _hosts = None


@contextmanager
def launched(device: str | None) -> Iterator[str]:
    """Connect the processes of a launcher for a command without a trainer; yields this process's device.

    Args:
        device: from the command line; None: a GPU if available.

    Raises:
        InputError: no such device, or the launcher has started another number of processes than it was asked for.
    """
    check_number_of_processes()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield available_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return
    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    open_host_group(_LONGEST_WAIT.total_seconds())
    try:
        yield available_device(str(state.device) if device in (None, "cuda") else device)
    finally:
        forget_host_group()
        state.destroy_process_group()


def available_device(device: str) -> str:
    """Check that a device from the command line exists, and return it.

    Raises:
        InputError: no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: not available here; allowed: cpu, or a device of torch") from error
    return device


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_hosts)
    return gathered


def own_part(parts: Sequence[Tensor]) -> Tensor:
    """This rank's part of a sum that was saved in parts, one per rank. With another number of ranks, rank 0 gets the
    total and the others zeros."""
    if len(parts) == world_size():
        return parts[rank()].clone()
    total = torch.stack(list(parts)).sum(dim=0)
    return total if rank() == 0 else torch.zeros_like(total)


class AsyncMax:
    """Asynchronous all-reduce (max) of a number, available one call later; with one rank, at once.

    A rank blocks only if another is more than one call behind; devices are never synchronised.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        """Contribute a number; returns the maximum of the previous call (with one rank: of this one)."""
        if world_size() == 1:
            return number
        maximum = self.close()
        contribution = torch.tensor([number])
        work = dist.all_reduce(contribution, dist.ReduceOp.MAX, group=_hosts, async_op=True)
        self._pending = contribution, work
        return maximum

    def close(self) -> int:
        """The maximum of the last call."""
        if self._pending is None:
            return 0
        contribution, work = self._pending
        self._pending = None
        work.wait()
        return int(contribution)


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
    """Rows of all ranks, (N * B, D), in the order of ranks; every rank must contribute the same shape.

    The gradient of a row is the sum of the gradients of all ranks' losses with respect to it.
    """
    if world_size() == 1:
        return rows_BD
    return _Gather.apply(rows_BD)
