"""Data loading processes: their setup, their end, and the messages about one that died or hangs."""

import contextlib
import copy
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset

from clipdistill.errors import InputError, RunError

WORKER_TIMEOUT = 600.0
"""Seconds without an item after which a worker counts as hanging."""

_DYING_SECONDS = 5
_POLL_SECONDS = 1.0
_CLOSE_SECONDS = 2.0
"""Workers that have not ended by then are killed."""


def from_workers(
    dataset: IterableDataset[Any],
    *,
    workers: int,
    max_pixels: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout: float = WORKER_TIMEOUT,
    shards: Sequence[str] = (),
    on_wait: Callable[[], None] = lambda: None,
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
        timeout: Seconds without an item after which a worker counts as hanging.
        shards: Names of the shards, for that message (`note_shard`).
        on_wait: Called every second without an item; it may raise.

    Raises:
        InputError: One of the items.
        RunError: A worker hangs; the message names it and what it reads.
        RuntimeError: A worker has died (`dead_worker_message`).
        OSError, EOFError: A worker is alive but cannot be reached.
    """
    context = _context() if workers else None
    board = None if context is None else context.RawArray(ctypes.c_long, 2 * workers)
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        timeout=_POLL_SECONDS if workers else 0,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=partial(_start_worker, max_pixels=max_pixels, board=board),
        generator=torch.Generator(),  # else DataLoader draws a seed from the global generator
    )
    others = multiprocessing.active_children()
    items = iter(loader.pipeline[0])  # the DataLoader: WebLoader's own iterator would end with the first time-out
    processes = [each for each in multiprocessing.active_children() if each not in others]
    given, since = 0, time.monotonic()
    failed = True
    try:
        while True:
            try:
                item = next(items)
            except StopIteration:
                failed = False
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                on_wait()
                if time.monotonic() - since > timeout:
                    raise RunError(_hanging(board, given % workers, shards, timeout)) from None
                continue
            if isinstance(item, InputError):
                raise item
            given += 1
            yield item
            since = time.monotonic()
    except (OSError, EOFError):
        if workers:
            time.sleep(_DYING_SECONDS)
        raise
    except GeneratorExit:
        failed = False
        raise
    finally:
        with _ending(processes, patience=0.0 if failed else _CLOSE_SECONDS):
            del items


def note_shard(number: int) -> None:
    """Note which shard this process is about to read: named, if it is a worker that hangs."""
    if _slot is not None:
        board, place = _slot
        board[place] = number + 1


_slot: tuple[Any, int] | None = None
"""Of a worker: the numbers shared with its parent, and the place of its shard's."""


def _hanging(board: Any, worker: int, shards: Sequence[str], timeout: float) -> str:
    pid, shard = board[2 * worker], board[2 * worker + 1] - 1
    what = f"; it was reading {shards[shard]}" if 0 <= shard < len(shards) else ""
    return (
        f"data worker {worker} ({f'pid {pid}' if pid else 'not started'}) has given nothing for {timeout:.0f} s "
        f"(data.worker_timeout){what}"
    )


@contextlib.contextmanager
def _ending(processes: Sequence[BaseProcess], *, patience: float) -> Iterator[None]:
    """A block that ends workers; those that hang are killed, as DataLoader would wait 10 seconds for each of them.

    PyTorch raises an error on the SIGCHLD of a killed worker, which is therefore ignored here.
    """
    if not processes or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    killing = threading.Timer(patience, _kill, [processes])
    try:
        if patience:
            killing.start()
        else:
            _kill(processes)
            for process in processes:
                process.join(_POLL_SECONDS)
        yield
    finally:
        killing.cancel()
        signal.signal(signal.SIGCHLD, handler)


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


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


def _start_worker(number: int, *, max_pixels: int, board: Any) -> None:
    """Set up a worker process: one thread, Ctrl-C left to the training process, Pillow's pixel limit."""
    global _slot
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels
    board[2 * number] = os.getpid()
    _slot = board, 2 * number + 1


def dead_worker_message(error: BaseException) -> str | None:
    """The first line of PyTorch's error about a dead data worker; None for any other error.

    PyTorch raises it on SIGCHLD, from any line of the main thread's code.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error).splitlines()[0].rstrip(". ")
    return None
