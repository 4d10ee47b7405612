"""Work that every rank takes its share of, with what stops one told by all of them, so that none waits in vain."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError, RunError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives on each rank, in the order of ranks; every rank calls this.

    Raises:
        InputError, RunError: on every rank, the first that any rank met.
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


def in_step(work: Callable[[], T]) -> T:
    """What ``work`` gives on this rank, of a kind that need not travel; every rank calls this.

    Raises:
        InputError, RunError: on every rank, the first that any rank met.
    """
    results: list[T] = []
    on_all_ranks(lambda: results.append(work()))
    return results[0]


def from_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first rank; the others wait for it.

    Raises:
        InputError, RunError: on every rank, where the first rank met it.
    """
    return on_all_ranks(lambda: work() if rank() == 0 else None)[0]  # type: ignore[return-value]


def copy_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of every rank the first one's values."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
