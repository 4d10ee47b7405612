"""The processes that load data: their setup, and the message about one that dies."""

import signal
import time
from collections.abc import Iterator
from functools import partial
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
    """The items of a dataset, made by worker processes; webdataset's ``WebLoader`` runs them.

    The sockets of a worker that dies close before its parent receives SIGCHLD. A tensor fetched in between raises an
    error of the socket: this waits for the signal, upon which PyTorch raises an error that names the worker.

    Args:
        dataset: Its items are not collated. An `InputError` among them is raised: DataLoader would bury its line in a
            traceback.
        workers: Number of processes; 0: this one.
        max_pixels: Pillow's limit in the workers.
        prefetch: Items that each worker makes ahead.
        pin_memory: Whether items come in pinned memory.

    Raises:
        InputError: One of the items.
        RuntimeError: A worker has died (`dead_worker_message`).
        OSError, EOFError: A worker cannot be reached, though it is alive.
    """
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=partial(_start_worker, max_pixels=max_pixels),
        generator=torch.Generator(),  # DataLoader draws a seed from the global generator otherwise
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


def _start_worker(_: int, *, max_pixels: int) -> None:
    """Set up a worker process: one thread, Ctrl-C left to the training process, the limit of pixels."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels


def dead_worker_message(error: BaseException) -> str | None:
    """The message about a dead data worker, if the error is PyTorch's about one.

    It is raised on SIGCHLD, by any line of the main thread's code.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error).splitlines()[0].rstrip(". ")
    return None
