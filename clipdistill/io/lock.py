"""A lock file: one process at a time writes an output, and others learn who.

The kernel's lock on the file (flock) ends with its holder, however that dies. Where the kernel cannot tell, as between
the hosts of some network file systems, the holder's heartbeat does: it renews the file's time, and a file that is not
renewed for `STALE_SECONDS` belongs to nobody.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clipdistill.errors import InputError, RunError
from clipdistill.io.files import space_left, why
from clipdistill.io.processes import machine, start_of

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
"""Name of the lock file in a folder."""

STALE_SECONDS = 60.0
"""A holder on another machine is given up when its heartbeat is this old."""

_REAPED_SECONDS = 10.0
"""A dying process of this machine may take this long to leave its lock."""

_KILLED_SECONDS = 1.0
"""A process that was just killed may seem alive for this long."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class InUseError(InputError):
    """Another process holds the lock."""


class Lock:
    """A lock that this process holds, from its creation to `release`; forked children do not hold it.

    Args:
        file: the lock file, deleted at the end. Its folder is created if necessary, and deleted if it is empty then.
        what: what is locked, for messages, such as ``output: runs/a``.
        stale_after: see `STALE_SECONDS`.

    Raises:
        InUseError: another process holds it.
        InputError: the file cannot be written.
        RunError: the disk is full.
    """

    def __init__(self, file: Path, what: str, *, stale_after: float = STALE_SECONDS) -> None:
        self._file = file
        self._what = what
        self._stale_after = stale_after
        self._released = threading.Event()
        self._contested_since: float | None = None
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": start_of(os.getpid()),
            "machine": machine(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._new_folder = not file.parent.exists()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            while (handle := self._try()) is None:
                time.sleep(0.05)
        except OSError as error:
            if error.errno in _NO_SPACE:
                left = space_left(file.parent)
                raise RunError(f"{what}: {file.name} could not be written: {why(error)} ({left})") from error
            raise InputError(f"{what}: cannot be written: {why(error)}; allowed: a folder that can be") from error
        self._handle = handle
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._heart.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Make sure that the lock is still this process's: one that was suspended for long may have lost it.

        Raises:
            RunError: another process has taken it over, or it was deleted.
        """
        if not _is_at(self._file, self._handle):
            raise RunError(f"{self._what}: another process has taken it over, as this one gave no sign of life")

    def release(self) -> None:
        """Delete the lock file."""
        if self._released.is_set() or self._me["pid"] != os.getpid():
            return
        self._released.set()
        self._heart.join()
        if _is_at(self._file, self._handle):
            self._file.unlink(missing_ok=True)
            if self._new_folder:
                with contextlib.suppress(OSError):
                    self._file.parent.rmdir()
        _close(self._handle)

    def _try(self) -> int | None:
        """A handle of the file, which is now this process's; None: try again."""
        handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _handles.add(handle)
        try:
            if self._is_free(handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(self._me).encode(), 0)
                os.fsync(handle)
                return handle
        except BaseException:
            _close(handle)
            raise
        _close(handle)
        return None

    def _is_free(self, handle: int) -> bool:
        """Whether the file's last holder is gone, and this handle is of the file that others will find.

        Raises:
            InputError: its holder lives.
        """
        unlocked = _flock(handle)
        if not _is_at(self._file, handle):
            return False
        holder = _read(handle)
        if holder is None or holder["machine"] == self._me["machine"]:
            alive = holder is not None and start_of(holder["pid"]) == holder["started"]
            if unlocked is False:
                self._wait_for_the_dead(holder, alive=alive)
                return False
            if unlocked is None and alive:
                raise InUseError(self._refusal(holder))
        elif self._beats():
            raise InUseError(self._refusal(holder))
        elif unlocked is False:  # a server keeps the lock of a host that is gone
            self._file.unlink(missing_ok=True)
            return False
        if holder is not None:
            log.warning("%s: taken over from %s, which is gone", self._what, _name(holder))
        return True

    def _wait_for_the_dead(self, holder: dict[str, Any] | None, *, alive: bool) -> None:
        """Return while the holder may have died, and be about to leave its lock."""
        self._contested_since = self._contested_since or time.monotonic()
        own = holder is not None and holder["pid"] == os.getpid()
        patience = 0.0 if own else _KILLED_SECONDS if alive else _REAPED_SECONDS
        if time.monotonic() - self._contested_since >= patience:
            raise InUseError(self._refusal(holder))

    def _beats(self) -> bool:
        """Whether the holder renews the file's time; takes up to `stale_after` seconds."""
        first = self._time()
        if first is not None and time.time() - first > 10 * self._stale_after:  # the clocks of two hosts may differ
            return False
        deadline = time.monotonic() + self._stale_after
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale_after / 10))
            if self._time() != first:
                return True
        return False

    def _time(self) -> float | None:
        """The time of the file now; opened, as network file systems remember that of a path."""
        try:
            with self._file.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        """Run in a thread: renew the file's time."""
        while not self._released.wait(self._stale_after / 6):
            with contextlib.suppress(OSError):
                os.utime(self._handle)

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        if holder is None:
            who = "another process"
        else:
            seconds = max(0.0, time.time() - (self._time() or time.time()))
            who = (
                f"{_name(holder)} ({holder['command']}, since {holder['since']}, last sign of life {seconds:.0f} s ago)"
            )
        return f"{self._what}: in use by {who}; allowed: another output, or this one when that process has ended"


def _name(holder: dict[str, Any]) -> str:
    return f"pid {holder['pid']} on host {holder['host']}"


def _flock(handle: int) -> bool | None:
    """Lock a file; False if another process has, None if the file system cannot."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: Path, handle: int) -> bool:
    """Whether a handle's file is the one at a path."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read(handle: int) -> dict[str, Any] | None:
    """The holder in a file; None if there is none yet, or it is unreadable."""
    try:
        holder = json.loads(os.pread(handle, 1 << 16, 0))
        return holder if {"host", "pid", "started", "machine", "command", "since"} <= holder.keys() else None
    except (ValueError, AttributeError):
        return None


_handles: set[int] = set()
"""Open lock files: a forked child would keep them locked."""


def _close(handle: int) -> None:
    _handles.discard(handle)
    os.close(handle)


def _close_in_child() -> None:
    while _handles:
        os.close(_handles.pop())


os.register_at_fork(after_in_child=_close_in_child)
