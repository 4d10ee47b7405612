"""Detect ranks that die or hang, and end all ranks for the same reason, which one of them reports.

Every rank holds a TCP connection to rank 0. The kernel closes the connections of a process that dies, so rank 0 detects
it within milliseconds and notifies the others. A host that drops off the network closes nothing: its ranks are given up
when no heartbeat has arrived for half of the time-out. Collectives alone do not report which rank failed and, on GPUs,
do not return at all. (torch's TCPStore does not report that a client has disconnected.)

Messages are JSON, one per line; ``{}`` is a heartbeat.
"""

import contextlib
import hmac
import json
import logging
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.distributed.signals import exit_now
from clipdistill.errors import ReportedElsewhereError, RunError

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
"""Interval between heartbeats."""

GATHER_SECONDS = 0.3
"""Rank 0 waits this long after a failure for others of the same host, to report them together."""

CAUSE_SECONDS = 5.0
"""A rank whose error may be caused by another rank's failure waits this long for a report of it."""

FAREWELL_SECONDS = 2.0
"""Ranks wait this long for each other's shutdown message."""

GRACE_SECONDS = 15.0
"""A rank may then take this long to exit; its main thread may be blocked in a collective with a dead rank."""


@dataclass(frozen=True, kw_only=True)
class _Shutdown:
    """Reason for the end of the run: exit code of all ranks, message, and the rank that prints it."""

    code: int
    line: str
    reporter: int


@dataclass(kw_only=True, eq=False)
class _Connection:
    """One end of a connection to a peer; closed in forked processes."""

    socket: socket.socket
    peer: int
    received: bytes = b""
    heard: float = 0.0
    finished: bool = False
    lost: bool = False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. A closed connection is detected by the reader."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages received; None if the connection is closed."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        self.heard = time.monotonic()
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


class Watchdog:
    """Watches the other ranks; with one rank it does nothing.

    Args:
        timeout: seconds; a rank without a heartbeat for half of it is given up.
        progress: describes the progress of the run, for the message about its end.
    """

    def __init__(self, *, timeout: float, progress: Callable[[], str] = lambda: "") -> None:
        self.progress = progress
        self._timeout = timeout
        self._rank, self._size = rank(), world_size()
        self._changed = threading.Condition()
        self._shutdown: _Shutdown | None = None
        self._announced = self._awaited = 0
        self._resolved = self._closed = False
        self._connections: list[_Connection] = []
        if self._size > 1:
            self._connect()

    @contextmanager
    def first_rank_alone(self) -> Iterator[None]:
        """A block in which rank 0 works and the others wait for it, as long as it is alive."""
        yield
        self._awaited += 1
        if not self._connections:
            gather_objects(None)
        elif self._rank == 0:
            self._broadcast({"announced": self._awaited})
        else:
            with self._changed:
                while self._announced < self._awaited:
                    if self._shutdown is not None:
                        raise RunError(self._shutdown.line)
                    self._changed.wait(HEARTBEAT_SECONDS)

    def resolve(self, error: BaseException) -> BaseException:
        """Shut all ranks down because of an error of this one, or find that another rank's failure caused it.

        Returns:
            The exception to raise: the error; a RunError about other ranks; or ReportedElsewhereError, if another rank
            reports.
        """
        if not self._connections:
            return error
        if isinstance(error, RuntimeError) and not isinstance(error, RunError):
            self._wait(lambda: self._shutdown is not None, CAUSE_SECONDS)
            if re.search(r"Timed out waiting \d+ms", str(error)):
                error = RunError(
                    f"rank {self._rank} of {self._size} waited {self._timeout:.0f} s for the others "
                    "(train.rank_timeout); all send heartbeats, so the late rank is unknown; "
                    f"{self.progress()}"
                )
        line = str(error) or type(error).__name__
        mine = _Shutdown(code=getattr(error, "exit_code", 1), line=line.splitlines()[0], reporter=self._rank)
        shutdown = self._propose(mine)
        self._resolved = True
        if self._rank == 0:
            self._wait(lambda: all(c.finished or c.lost for c in self._connections), FAREWELL_SECONDS)
        if shutdown == mine:
            return error
        return RunError(shutdown.line) if shutdown.reporter == self._rank else ReportedElsewhereError(shutdown.code)

    def finish(self) -> None:
        """Wait until all ranks have finished, then stop expecting heartbeats."""
        if self._connections:
            gather_objects(None)
            self._broadcast({"bye": True})

    def close(self) -> None:
        """Stop watching."""
        self._closed = True

    # Between the ranks.

    def _connect(self) -> None:
        """Connect every rank with rank 0, or none if a rank cannot reach it."""
        me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        server = None
        if self._rank == 0:
            server = _server(self._size)
            me |= {"port": server.getsockname()[1], "key": secrets.token_hex()}
        self._who = gather_objects(me)
        first, fault = self._who[0], ""
        if server is None:
            address = os.environ.get("MASTER_ADDR", first["host"]), first["port"]
            try:
                mine = socket.create_connection(address, timeout=30)
                self._connections = [_Connection(socket=mine, peer=0)]
                self._broadcast({"key": first["key"], "rank": self._rank})
            except OSError as error:
                fault = f"rank {self._rank} cannot reach rank 0 at {address[0]}:{address[1]}: {error}"
        faults = [fault for fault in gather_objects(fault) if fault]
        if not faults and server is not None:
            self._accept(server, first["key"])
        if server is not None:
            server.close()
        if faults:
            self._connections = []
            log.warning("a rank that dies may be detected late: %s", faults[0])
            return
        for connection in self._connections:
            connection.heard = time.monotonic()
            _open_sockets.append(connection.socket)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _accept(self, server: socket.socket, key: str) -> None:
        """Accept the ranks' connections; one without the key is closed."""
        while len(self._connections) < self._size - 1:
            connection = _Connection(socket=server.accept()[0], peer=0)
            connection.socket.settimeout(30)
            with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
                hello = (connection.receive() or [])[0]
                if hmac.compare_digest(hello["key"], key):
                    connection.peer = int(hello["rank"])
                    self._connections.append(connection)
                    continue
            connection.socket.close()

    def _watch(self) -> None:
        """Run in a thread: receive, send heartbeats, detect failures, and exit if the main thread does not."""
        lost_at = before = beat = time.monotonic()
        gone: dict[int, float] = {}
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            while not self._closed:
                for key, _ in selector.select(GATHER_SECONDS):
                    if not self._listen(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - before > 5 * HEARTBEAT_SECONDS:  # this process was suspended, perhaps with all others
                    for connection in self._connections:
                        connection.heard = now
                if now - beat >= HEARTBEAT_SECONDS:
                    self._broadcast({})
                    beat = now
                before = now
                for connection in self._connections:
                    silence = now - connection.heard
                    lost = connection.lost or silence > self._timeout / 2
                    if lost and not connection.finished and connection.peer not in gone:
                        gone[connection.peer] = 0.0 if connection.lost else silence
                        lost_at = now
                if gone and self._shutdown is None and (self._rank > 0 or now - lost_at >= GATHER_SECONDS):
                    self._settle(
                        _Shutdown(code=RunError.exit_code, line=self._failure_message(gone), reporter=self._rank)
                    )
                if self._shutdown is not None and now - self._settled_at > GRACE_SECONDS:
                    reported = self._resolved or self._shutdown.reporter != self._rank
                    exit_now(self._shutdown.code, "" if reported else f"clipdistill: {self._shutdown.line}")
        for connection in self._connections:
            _open_sockets.remove(connection.socket)
            connection.socket.close()

    def _listen(self, connection: _Connection) -> bool:
        """Process a connection's messages; False if it is closed."""
        messages = connection.receive()
        with self._changed:
            for message in messages or ():
                if "shutdown" in message:
                    self._settle(_Shutdown(**message["shutdown"]))
                self._announced = message.get("announced", self._announced)
                connection.finished |= "bye" in message
            connection.lost = messages is None
            self._changed.notify_all()
        return messages is not None

    def _propose(self, shutdown: _Shutdown) -> _Shutdown:
        """Agree on a shutdown: this one, or an earlier one known to rank 0."""
        if self._rank > 0 and not self._connections[0].lost:
            self._broadcast({"shutdown": asdict(shutdown)})
            self._wait(lambda: self._shutdown is not None, FAREWELL_SECONDS)
        return self._settle(shutdown)

    def _settle(self, shutdown: _Shutdown) -> _Shutdown:
        with self._changed:
            if self._shutdown is None:
                self._shutdown, self._settled_at = shutdown, time.monotonic()
                self._broadcast({"shutdown": asdict(shutdown)} if self._rank == 0 else {"bye": True})
                self._changed.notify_all()
            return self._shutdown

    def _broadcast(self, message: dict[str, Any]) -> None:
        with self._changed:
            for connection in self._connections:
                connection.send(message)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(condition, seconds)

    def _failure_message(self, gone: Mapping[int, float]) -> str:
        """The message about ranks that died, or sent no heartbeat for some seconds."""
        names = ", ".join(map(str, sorted(gone)))
        silence = max(gone.values())
        what = f"gave no sign of life for {silence:.0f} s" if silence else "is gone" if len(gone) == 1 else "are gone"
        where = "; ".join(f"host {self._who[peer]['host']}, pid {self._who[peer]['pid']}" for peer in sorted(gone))
        return f"rank{'s' * (len(gone) > 1)} {names} of {self._size} {what} ({where}); {self.progress()}"


def _server(backlog: int) -> socket.socket:
    """A listening socket for IPv6 and IPv4, or IPv4 alone."""
    with contextlib.suppress(OSError):
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


_open_sockets: list[socket.socket] = []


def _close_in_child() -> None:
    """In a forked process: a connection must end with the rank that made it, not with its data workers."""
    for connection in _open_sockets:
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)
