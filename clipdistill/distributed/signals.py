"""SIGTERM and SIGINT: the first signal lets the current step finish, a second one ends the process at once.

with Interruption() as interruption:
    prepare()                                  # a signal raises Interrupted here
    with interruption.deferred():
        while not interruption.number:         # a signal is only recorded
            step()
"""

import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from clipdistill.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

RELAY_SECONDS = 2.0
"""Under torchrun and `accelerate launch` a signal to the process group arrives twice, from its sender and relayed by
the launcher: a second one within this time counts as the same signal."""

WAITING_SECONDS = 10.0
"""After a signal, what is waited for may take this long to arrive."""

PATIENCE_SECONDS = 10.0
"""The main thread may take this long to exit if there is nothing to finish; it may be blocked in a library."""


class Interruption:
    """Handlers for SIGTERM and SIGINT while the block runs; outside the main thread it does nothing.

    A second signal ends the process at once, from a separate thread, as the main thread may be waiting for a device or
    for another process. Processes that are forked inside the block ignore both signals.

    Attributes:
        number: the first signal received; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferring = False
        self._received: float | None = None
        self._waiting_since: float | None = None
        self._leaving_since: float | None = None

    def __enter__(self) -> "Interruption":
        global _handling
        self._owner = threading.current_thread() is threading.main_thread()
        if self._owner:
            read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._handlers_before: dict[int, Any] = {n: signal.signal(n, self._handle) for n in SIGNALS}
            _handling = True
            threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        global _handling
        if self._owner:
            _handling = False
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._fd_before)
            os.close(self._write)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that no signal interrupts; a signal received in it is raised at its end."""
        with self._mode(deferring=True):
            yield
        self._raise_if_due()

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """A part of a deferred block with nothing to finish: a signal, even an earlier one, is raised at once."""
        with self._mode(deferring=False):
            self._raise_if_due()
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A part of a deferred block that waits for something that may never come: end it when `overdue`. If that is
        not possible, the process exits once the main thread's time is up as well."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    def overdue(self) -> bool:
        """Whether a signal was received, and what is waited for has not arrived, for `WAITING_SECONDS`."""
        if self._received is None:
            return False
        return time.monotonic() - max(self._received, self._waiting_since or 0.0) > WAITING_SECONDS

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """A block that ends the run: a first signal is ignored."""
        self._leaving_since = self._leaving_since or time.monotonic()
        with self._mode(deferring=True):
            yield

    @contextmanager
    def _mode(self, *, deferring: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, deferring
        try:
            yield
        finally:
            self._deferring = before

    def _raise_if_due(self) -> None:
        if self.number and not self._deferring:
            self._leaving_since = time.monotonic()
            raise Interrupted(stopped_by(self.number))

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._received = number, time.monotonic()
            self._raise_if_due()

    def _watch(self, read: int) -> None:
        """Run in a thread: Python writes each signal's number to a pipe at once, whatever the main thread does."""
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        first: float | None = None
        while True:
            ready, _, _ = select.select([read], [], [], 1.0)
            numbers = os.read(read, 64) if ready else b""
            if ready and not numbers:
                os.close(read)
                return
            now = time.monotonic()
            for number in filter(SIGNALS.__contains__, numbers):
                if first is not None and now - first >= RELAY_SECONDS * launched:
                    exit_now(128 + number)
                first = now if first is None else first
            unhandled = first if not self.number and not self._deferring else None
            if first is not None and (waiting := self._waiting_since) is not None:
                unhandled = max(first, waiting) + WAITING_SECONDS
            since = self._leaving_since or unhandled
            if first is not None and since is not None and now - since > PATIENCE_SECONDS:
                exit_now(Interrupted.exit_code, "clipdistill: stopped by a signal")


def stopped_by(number: int) -> str:
    """The beginning of the message about a signal."""
    return f"stopped by {signal.Signals(number).name}"


def exit_now(code: int, line: str = "") -> None:
    """End this process and its data workers without any clean-up.

    Args:
        code: the exit code.
        line: written to stderr before.
    """
    if line:
        os.write(2, f"{line}\n".encode())
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


_handling = False


def _in_child() -> None:
    """In a forked process: ignore signals, and do not write into the parent's pipe."""
    if _handling:
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_in_child)
