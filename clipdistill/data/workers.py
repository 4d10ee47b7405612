"""Data loading processes: their setup, their end, and the messages about one that died or hangs."""

import contextlib
import copy
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset

from clipdistill.distributed.signals import exit_now
from clipdistill.errors import InputError, RunError

WORKER_TIMEOUT = 600.0
"""Seconds without an item after which a worker counts as hanging."""

_DYING_SECONDS = 5
_POLL_SECONDS = 1.0
_CLOSE_SECONDS = 2.0
"""Workers that have not ended by then are killed."""

_DEAF_SECONDS = 15.0
"""A killed worker may take this long to let go of the main thread."""


def from_workers(
    dataset: IterableDataset[Any],
    *,
    workers: int,
    max_pixels: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    timeout: float = WORKER_TIMEOUT,
    shards: Sequence[str] = (),
    give_up: Callable[[], bool] = lambda: False,
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
        give_up: Asked, in another thread, about every second without an item: whether to wait no longer.

    Raises:
        InputError: One of the items.
        RunError: A worker hangs, and was killed; the message names it and what it reads.
        RuntimeError: A worker has died (`dead_worker_message`).
        OSError, EOFError: A worker is alive but cannot be reached.
    """
    context = _context() if workers else None
    board = None if context is None else context.RawArray(ctypes.c_long, 2 * workers)
    items = iter(
        wds.WebLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin_memory,
            multiprocessing_context=context,
            worker_init_fn=partial(_start_worker, max_pixels=max_pixels, board=board),
            generator=torch.Generator(),  # else DataLoader draws a seed from the global generator
        )
    )
    patience = _Patience(board, timeout=timeout, shards=shards, give_up=give_up)
    failed = True
    try:
        while True:
            with patience:
                item = next(items, None)
            if isinstance(item, InputError):
                raise item
            if item is None:
                break
            yield item
        failed = False
    except (RuntimeError, OSError, EOFError) as error:
        if patience.fault:
            raise RunError(patience.fault) from error
        if workers and isinstance(error, OSError | EOFError):
            time.sleep(_DYING_SECONDS)
        raise
    except GeneratorExit:
        failed = False
        raise
    finally:
        patience.end()
        pids = set(board[::2]) if board is not None else set()
        with _ending([each for each in multiprocessing.active_children() if each.pid in pids], at_once=failed):
            items.close()


class _Patience:
    """A thread that watches how long the main thread waits for an item, ``with patience:``, and kills the workers if
    that is too long. The main thread may wait in the middle of receiving an item, where no time-out reaches it.

    Attributes:
        fault: why the workers were killed; empty before.
    """

    def __init__(self, board: Any, *, timeout: float, shards: Sequence[str], give_up: Callable[[], bool]) -> None:
        self.fault = ""
        self._board = board
        self._timeout = timeout
        self._shards = shards
        self._give_up = give_up
        self._given = 0
        self._since: float | None = None
        self._ended = threading.Event()
        if board is not None:
            threading.Thread(target=self._watch, name="data workers", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._since = None
        self._given += 1

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            since = self._since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited > self._timeout or (waited > _POLL_SECONDS and self._give_up()):
                self.fault = self._describe(waited)
                for pid in filter(None, self._board[::2]):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                self._ended.wait(_DEAF_SECONDS)
                if self._since == since:  # the kernel cannot end it, and the main thread waits on
                    exit_now(RunError.exit_code, f"clipdistill: {self.fault}")
                return

    def _describe(self, waited: float) -> str:
        """Which worker hangs: one that is stopped or waits in the kernel, or else the one whose turn it is."""
        pids, shards = self._board[::2], self._board[1::2]
        hanging = [number for number, pid in enumerate(pids) if pid and _state(pid) in "DTt"]
        number = hanging[0] if hanging else self._given % len(pids)
        shard = shards[number] - 1
        what = f"; it was reading {self._shards[shard]}" if 0 <= shard < len(self._shards) else ""
        return (
            f"data worker {number} ({f'pid {pids[number]}' if pids[number] else 'not started'}) has given nothing for "
            f"{waited:.0f} s (data.worker_timeout: {self._timeout:.0f}){what}"
        )


def _state(pid: int) -> str:
    """State of a process, as ps shows it: one letter; S if unknown."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    return "S"


def note_shard(number: int) -> None:
    """Note which shard this process is about to read: named, if it is a worker that hangs."""
    if _slot is not None:
        board, place = _slot
        board[place] = number + 1


_slot: tuple[Any, int] | None = None
"""Of a worker: the numbers shared with its parent, and the place of its shard's."""


@contextlib.contextmanager
def _ending(processes: Sequence[BaseProcess], *, at_once: bool) -> Iterator[None]:
    """A block that ends workers; those that hang are killed, as DataLoader would wait 10 seconds for each of them.

    PyTorch raises an error on the SIGCHLD of a killed worker, which is therefore ignored here.
    """
    if not processes or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    killing = threading.Timer(_CLOSE_SECONDS, _kill, [processes])
    try:
        if at_once:
            _kill(processes)
            for process in processes:
                process.join(_POLL_SECONDS)
        else:
            killing.start()
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
    """Set up a worker process: one thread, Ctrl-C left to the training process, Pillow's pixel limit, and no traceback
    from the thread of Python's that hands over tensors, where the training process has gone."""
    global _slot
    sys.excepthook = _report_unless_cut_off
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels
    board[2 * number] = os.getpid()
    _slot = board, 2 * number + 1


def _report_unless_cut_off(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, OSError | EOFError | AuthenticationError):
        sys.__excepthook__(kind, error, trace)


def dead_worker_message(error: BaseException) -> str | None:
    """The first line of PyTorch's error about a dead data worker; None for any other error.

    PyTorch raises it on SIGCHLD, from any line of the main thread's code.
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return str(error).splitlines()[0].rstrip(". ")
    return None
