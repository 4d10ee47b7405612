"""Who of the ranks is there, and for which reason they all end: a connection of its own from each rank to the first.

The kernel closes the connections of a process that dies, so the first rank knows within milliseconds who is gone,
tells the others, and all end with the same exit code, one of them with a line that says why. A host that drops off the
network closes nothing: its ranks are given up when they gave no sign of life for half of the time-out. The processes'
collectives alone would not tell who is gone nor, on GPUs, that anybody is.

Messages are JSON, one a line; ``{}`` is a sign of life.
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
from clipdistill.errors import AlreadyToldError, RunError

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Between two signs of life."""

GATHER_SECONDS = 0.3
"""How long the first rank waits after it has lost one for others of the same host to follow."""

CLUE_SECONDS = 5.0
"""How long a rank whose error may come from another one waits to hear of that."""

FAREWELL_SECONDS = 2.0
"""How long the ranks wait for each other to hear why they end."""

GRACE_SECONDS = 15.0
"""How long a rank may take to end after that; its main thread may wait for a device that waits for the dead."""


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """Why the run ends: exit code of all ranks, line, and the rank that tells it."""

    code: int
    line: str
    teller: int


@dataclass(kw_only=True, eq=False)
class _Connection:
    """One end of a connection to a peer; closed in processes that are forked off."""

    socket: socket.socket
    peer: int
    received: bytes = b""
    heard: float = 0.0
    parted: bool = False
    lost: bool = False

    def send(self, message: dict[str, Any]) -> None:
        """Send a message. That the peer is gone is noticed where it is read."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the connection."""
        try:
            data = self.socket.recv(65536)
        except OSError:
            data = b""
        self.heard = time.monotonic()
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


class Peers:
    """The other ranks as seen from this one; with one rank, or before it was started, there is nothing to see.

    Args:
        timeout: seconds; half of it without a sign of life, and a rank is given up.
        progress: says how far the run has come, for the line about its end.
    """

    def __init__(self, *, timeout: float, progress: Callable[[], str] = lambda: "") -> None:
        self.progress = progress
        self._timeout = timeout
        self._rank, self._size = rank(), world_size()
        self._news = threading.Condition()
        self._verdict: _Verdict | None = None
        self._announced = self._awaited = 0
        self._accounted = self._closed = False
        self._connections: list[_Connection] = []
        if self._size > 1:
            self._connect()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """A block in which the first rank works and the others wait for it, as long as it lives."""
        yield
        self._awaited += 1
        if not self._connections:
            gather_objects(None)
        elif self._rank == 0:
            self._broadcast({"announced": self._awaited})
        else:
            with self._news:
                while self._announced < self._awaited:
                    if self._verdict is not None:
                        raise RunError(self._verdict.line)
                    self._news.wait(BEAT_SECONDS)

    def account_for(self, error: BaseException) -> BaseException:
        """Let all ranks end because of an error of this one, or find that it comes from another one's end.

        Returns:
            What to raise: the error; a RunError that tells of others; or AlreadyToldError, if another rank does.
        """
        if not self._connections:
            return error
        if isinstance(error, RuntimeError) and not isinstance(error, RunError):
            self._wait(lambda: self._verdict is not None, CLUE_SECONDS)
            if re.search(r"Timed out waiting \d+ms", str(error)):
                error = RunError(
                    f"rank {self._rank} of {self._size} waited {self._timeout:.0f} s for the others "
                    "(train.rank_timeout); all give signs of life, and which of them is late cannot be known; "
                    f"{self.progress()}"
                )
        line = str(error) or type(error).__name__
        mine = _Verdict(code=getattr(error, "exit_code", 1), line=line.splitlines()[0], teller=self._rank)
        verdict = self._propose(mine)
        self._accounted = True
        if self._rank == 0:
            self._wait(lambda: all(c.parted or c.lost for c in self._connections), FAREWELL_SECONDS)
        if verdict == mine:
            return error
        return RunError(verdict.line) if verdict.teller == self._rank else AlreadyToldError(verdict.code)

    def part(self) -> None:
        """All ranks have come to the end: nobody needs to be watched any more."""
        if self._connections:
            gather_objects(None)
            self._broadcast({"bye": True})

    def close(self) -> None:
        """Stop watching."""
        self._closed = True

    # Between the ranks.

    def _connect(self) -> None:
        """Connect every rank with the first, or none if one of them cannot be reached."""
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
            log.warning("a rank that dies may be noticed late: %s", faults[0])
            return
        for connection in self._connections:
            connection.heard = time.monotonic()
            _open_sockets.append(connection.socket)
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def _accept(self, server: socket.socket, key: str) -> None:
        """Take the connections, which are made already; a stranger's is closed."""
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
        """In a thread: listen, give signs of life, find out who is gone, and end a rank that does not end by itself."""
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
                if now - before > 5 * BEAT_SECONDS:  # this process was suspended, perhaps with all others
                    for connection in self._connections:
                        connection.heard = now
                if now - beat >= BEAT_SECONDS:
                    self._broadcast({})
                    beat = now
                before = now
                for connection in self._connections:
                    silence = now - connection.heard
                    lost = connection.lost or silence > self._timeout / 2
                    if lost and not connection.parted and connection.peer not in gone:
                        gone[connection.peer] = 0.0 if connection.lost else silence
                        lost_at = now
                if gone and self._verdict is None and (self._rank > 0 or now - lost_at >= GATHER_SECONDS):
                    self._settle(_Verdict(code=RunError.exit_code, line=self._obituary(gone), teller=self._rank))
                if self._verdict is not None and now - self._settled_at > GRACE_SECONDS:
                    told = self._accounted or self._verdict.teller != self._rank
                    exit_now(self._verdict.code, "" if told else f"clipdistill: {self._verdict.line}")
        for connection in self._connections:
            _open_sockets.remove(connection.socket)
            connection.socket.close()

    def _listen(self, connection: _Connection) -> bool:
        """Take a connection's messages in; whether more may come."""
        messages = connection.receive()
        with self._news:
            for message in messages or ():
                if "verdict" in message:
                    self._settle(_Verdict(**message["verdict"]))
                self._announced = message.get("announced", self._announced)
                connection.parted |= "bye" in message
            connection.lost = messages is None
            self._news.notify_all()
        return messages is not None

    def _propose(self, verdict: _Verdict) -> _Verdict:
        """Settle on a verdict, or on the one that the first rank heard of earlier."""
        if self._rank > 0 and not self._connections[0].lost:
            self._broadcast({"verdict": asdict(verdict)})
            self._wait(lambda: self._verdict is not None, FAREWELL_SECONDS)
        return self._settle(verdict)

    def _settle(self, verdict: _Verdict) -> _Verdict:
        with self._news:
            if self._verdict is None:
                self._verdict, self._settled_at = verdict, time.monotonic()
                self._broadcast({"verdict": asdict(verdict)} if self._rank == 0 else {"bye": True})
                self._news.notify_all()
            return self._verdict

    def _broadcast(self, message: dict[str, Any]) -> None:
        with self._news:
            for connection in self._connections:
                connection.send(message)

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._news:
            self._news.wait_for(condition, seconds)

    def _obituary(self, gone: Mapping[int, float]) -> str:
        """The line about ranks that are gone, or silent for some seconds."""
        names = ", ".join(map(str, sorted(gone)))
        silence = max(gone.values())
        what = f"gave no sign of life for {silence:.0f} s" if silence else "is gone" if len(gone) == 1 else "are gone"
        where = "; ".join(f"host {self._who[peer]['host']}, pid {self._who[peer]['pid']}" for peer in sorted(gone))
        return f"rank{'s' * (len(gone) > 1)} {names} of {self._size} {what} ({where}); {self.progress()}"


def _server(backlog: int) -> socket.socket:
    """A listening socket of IPv6 and IPv4, where there are both."""
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
