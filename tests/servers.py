"""Real local servers for tests: files over HTTP, with ranges and without, a Hub of one data set, and a proxy that
brings faults. Shards large enough to take several requests each, and what a stream makes of them."""

import contextlib
import functools
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from clipdistill.data import ShardIndex, StreamLoader
from tests.streams import make_stream

os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


def write_noise_shards(folder: Path) -> None:
    """Two shards of pictures of half a megabyte, 5 and 7 MB."""
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate((10, 14)):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for number in range(size):
                picture = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (410, 410, 3), np.uint8)).save(picture, "png", compress_level=0)
                tar.write({"__key__": f"{shard}-{number:02d}", "png": picture.getvalue(), "txt": f"{number}"})


def digests(index: list[ShardIndex], workers: int, steps: int = 9) -> tuple[list[str], dict[str, int]]:
    """Digests of a stream's first batches, and what was skipped."""
    loader = StreamLoader(make_stream(index, batch_size=4, image_size=8, shuffle=6, num_workers=workers))
    found = []
    for batch in islice(loader, steps):
        told = repr((batch.keys, batch.captions, batch.labels_B.tolist())).encode()
        found.append(hashlib.sha256(told + batch.image_BCHW.numpy().tobytes()).hexdigest())
    skipped = loader.skipped
    loader.close()
    return found, skipped


class NoRanges(http.server.SimpleHTTPRequestHandler):
    """Python's own server: it answers a range with the whole file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass


class Ranges(NoRanges):
    """Serves files with single byte ranges."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            return super().do_GET()
        first = int(wanted[1])
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(first)
            data = file.read(int(wanted[2]) + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        self.end_headers()
        self.wfile.write(data)
        return None


class Tagged(Ranges):
    """Ranges, with an ETag that changes with the file, and no time."""

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Last-Modified":
            keyword, value = "ETag", f'"{Path(self.translate_path(self.path)).stat().st_mtime_ns}"'
        super().send_header(keyword, value)


class Hub(Ranges):
    """What of the Hugging Face Hub it takes to read the folders of the data set owner/name."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        page = re.fullmatch(r"/api/datasets/owner/name(?:/(revision|tree)/main(?:/(.*))?)?", path)
        if page is None:
            self.path = path.removeprefix("/datasets/owner/name/resolve/main")
            return super().do_GET()
        found: Any = {"id": "owner/name", "sha": "c" * 40, "siblings": [], "private": False, "tags": []}
        if page[1] == "tree":
            root = Path(self.directory)
            folder = root / (page[2] or "")
            if not folder.is_dir():
                return self.send_error(404)
            found = [
                {"type": "file", "path": str(file.relative_to(root)), "size": file.stat().st_size, "oid": file.name}
                if file.is_file()
                else {"type": "directory", "path": str(file.relative_to(root)), "oid": file.name}
                for file in folder.iterdir()
            ]
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None


class Server(http.server.ThreadingHTTPServer):
    """A thread a connection. Clients that leave are no news."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[str]:
    """Let a server serve; gives its URL."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def age(folder: Path, seconds: float = 3600) -> None:
    """Let the files of a folder look as if written a while ago."""
    then = time.time() - seconds
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def files(folder: Path, handler: type[NoRanges] = Ranges) -> Server:
    """A server of the files of a folder."""
    return Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))


class Answer:
    """The backend's answer to one request, and the ways to spoil it."""

    def __init__(
        self, handler: http.server.BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes
    ) -> None:
        self.handler, self.status, self.headers, self.data = handler, status, headers, data

    def send(self, data: bytes, *, length: bool = True) -> None:
        """The head, and data."""
        self.handler.send_response_only(self.status)
        for name, value in self.headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.handler.send_header(name, value)
        if length:
            whole = {name.lower(): value for name, value in self.headers}.get("content-length", "0")
            self.handler.send_header("Content-Length", whole)
        self.handler.end_headers()
        self.more(data)

    def more(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.handler.wfile.write(data)
            self.handler.wfile.flush()

    def hang_up(self) -> None:
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)


Fault = Callable[[Answer], None]


def cut(at: int) -> Fault:
    """The connection breaks after so many bytes of the body."""

    def fault(answer: Answer) -> None:
        answer.send(answer.data[:at])
        answer.hang_up()

    return fault


def end_early(at: int) -> Fault:
    """The body ends after so many bytes, and the head did not say how long it would be."""

    def fault(answer: Answer) -> None:
        answer.headers.append(("Connection", "close"))
        answer.send(answer.data[:at], length=False)
        answer.hang_up()

    return fault


def refuse(status: int, **headers: str) -> Fault:
    """Another status, without a body."""

    def fault(answer: Answer) -> None:
        answer.status = status
        answer.headers = [("Content-Length", "0"), *((name.replace("_", "-"), text) for name, text in headers.items())]
        answer.send(b"")

    return fault


def hang_up(answer: Answer) -> None:
    """No answer at all."""
    answer.hang_up()


def silence(answer: Answer) -> None:
    """Nothing comes, and the connection stays."""
    answer.handler.connection.settimeout(20)
    with contextlib.suppress(OSError):
        answer.handler.connection.recv(1)
    answer.hang_up()


def stall(at: int) -> Fault:
    """After so many bytes of the body nothing more comes, and the connection stays."""

    def fault(answer: Answer) -> None:
        answer.send(answer.data[:at])
        silence(answer)

    return fault


def dawdle(answer: Answer) -> None:
    """Everything comes, in small pieces with pauses."""
    answer.send(b"")
    piece = len(answer.data) // 20 + 1
    for start in range(0, len(answer.data), piece):
        answer.more(answer.data[start : start + piece])
        time.sleep(0.01)


def shift(answer: Answer) -> None:
    """Another part of the file than the one that was asked for."""
    answer.headers = [
        (name, value.replace("bytes ", "bytes 1") if name == "Content-Range" else value)
        for name, value in answer.headers
    ]
    answer.send(answer.data)


class Faulty(Server):
    """Passes requests on to a server, and spoils the answers that `faults` says: the next of the method's list each
    time, None for a good one; all good at the list's end. `asked` counts requests by method."""

    def __init__(self, backend: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.backend = backend.removeprefix("http://")
        self.faults: dict[str, deque[Fault | None]] = defaultdict(deque)
        self.asked: dict[str, int] = defaultdict(int)


class _Pass(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def pass_on(self) -> None:
        self.server.asked[self.command] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection(self.server.backend)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            reply = connection.getresponse()
            answer = Answer(self, reply.status, reply.getheaders(), reply.read())
        finally:
            connection.close()
        faults = self.server.faults[self.command]
        try:
            fault = faults.popleft()
        except IndexError:
            fault = None
        if fault:
            fault(answer)
        else:
            answer.send(answer.data)

    do_GET = do_HEAD = do_PUT = do_POST = pass_on

    def log_message(self, *args: Any) -> None:
        pass
