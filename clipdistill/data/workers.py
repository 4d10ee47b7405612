"""Data loading processes: their setup, and the message about one that died."""

import copy
import ctypes
import multiprocessing
import signal
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset

from clipdistill.errors import InputError

_DYING_SECONDS = 5


def from_workers(
    dataset: IterableDataset[Any], *, workers: int, max_pixels: int, prefetch: int = 2, pin_memory: bool = False
) -> Iterator[Any]:
    """Yield the items of a dataset from worker processes, run by webdataset's ``WebLoader``.

    The sockets of a dead worker close before its parent receives SIGCHLD. A tensor fetched in between raises a socket
    error: this waits for the signal, on which PyTorch raises an error that names the worker.

    Args:
        dataset: Its items are not collated. An `InputError` among them is raised: DataLoader would bury its line in a
            traceback.
        workers: Number of processes; 0: this one.
        max_pixels: Pillow's limit in the workers.
        prefetch: Items that each worker prepares ahead.
        pin_memory: Whether to copy items into pinned memory.

    Raises:
        InputError: One of the items.
        RuntimeError: A worker has died (`dead_worker_message`).
        OSError, EOFError: A worker is alive but cannot be reached.
    """
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=partial(_start_worker, max_pixels=max_pixels),
        generator=torch.Generator(),  # else DataLoader draws a seed from the global generator
    )
    try:
        for item in loader:
            if isinstance(item, InputError):
                raise item
            yield item
    except (OSError, EOFError):
        if workers:
            time.sleep(_DYING_SECONDS)
        raise


class _LockFreeEvent:
    """A flag in shared memory: what DataLoader uses of `multiprocessing.Event`, without its lock.

    A worker checks the event all the time. If it is killed while it holds the lock, DataLoader waits for the lock
    forever, both where it reports the worker and where it stops the others.
    """

    def __init__(self, context: BaseContext) -> None:
        self._flag = context.RawValue(ctypes.c_bool, False)

    def is_set(self) -> bool:
        return bool(self._flag.value)

    def set(self) -> None:
        self._flag.value = True


def _context() -> BaseContext:
    """The default multiprocessing context, with lock-free events."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = lambda: _LockFreeEvent(context)  # type: ignore[method-assign,assignment,return-value]
    return context


def _start_worker(_: int, *, max_pixels: int) -> None:
    """Set up a worker process: one thread, Ctrl-C left to the training process, Pillow's pixel limit."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels


def dead_worker_message(error: BaseException) -> str | None:
    """The first line of PyTorch's error about a dead data worker; None for any other error.

    PyTorch raises it on SIGCHLD, from any line of the main thread's code.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error).splitlines()[0].rstrip(". ")
    return None
