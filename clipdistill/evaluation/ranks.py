"""Collective calls that raise the first error of any rank on every rank, so that no rank waits for a failed one."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError, RunError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank, and return all results in the order of ranks; every rank calls this.

    Raises:
        InputError, RunError: on every rank, the error of the first rank that had one.
    """
    outcome: T | InputError | RunError
    try:
        outcome = work()
    except (InputError, RunError) as error:
        outcome = type(error)(str(error))
    outcomes = gather_objects(outcome)
    for each in outcomes:
        if isinstance(each, InputError | RunError):
            raise each
    return outcomes


def with_shared_errors(work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and return this rank's result, which need not be picklable; every rank calls this.

    Raises:
        InputError, RunError: on every rank, the error of the first rank that had one.
    """
    results: list[T] = []
    on_all_ranks(lambda: results.append(work()))
    return results[0]


def from_first_rank(work: Callable[[], T]) -> T:
    """Run ``work`` on the first rank, and return its result on every rank; every rank calls this.

    Raises:
        InputError, RunError: on every rank, if the first rank raised it.
    """
    return on_all_ranks(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def broadcast_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors on every rank with the first rank's values."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
