"""The processes that load data: how they start, and how one that dies is told."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from PIL import Image

T = TypeVar("T")

_DYING_SECONDS = 5


def start_worker(_: int, *, max_pixels: int) -> None:
    """Set a worker process up: one thread, Ctrl-C left to the training process, Pillow's own limit of
    pixels."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels


def from_workers(loader: Iterable[T], workers: int) -> Iterator[T]:
    """What a DataLoader's workers make; 0 of them: what it makes itself.

    The sockets of a worker that dies close before its parent is told of the death. Who fetches a tensor at that moment
    gets an error of the socket: this waits for the signal, upon which PyTorch raises an error that names the worker.

    Raises:
        RuntimeError: A worker is gone (`told_of_worker`).
        OSError, EOFError: A worker cannot be spoken to, though it lives.
    """
    try:
        yield from loader
    except (OSError, EOFError):
        if workers:
            time.sleep(_DYING_SECONDS)
        raise


def told_of_worker(error: BaseException) -> str | None:
    """The line about a worker that is gone, if the error is PyTorch's about one.

    It comes with SIGCHLD, so that any line of the main thread's code may raise it.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error).splitlines()[0].rstrip(". ")
    return None
