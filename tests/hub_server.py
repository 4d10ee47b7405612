"""A Hugging Face Hub of one folder's depth, over real HTTP: enough of its API to push a model and to download it."""

import base64
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import Server, serving

TOKEN = "hf_the_token_that_must_never_be_printed"
LARGE = (".safetensors", ".onnx")


@dataclass
class Repo:
    """A model repo: its commits, each with all files of that moment."""

    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match.

    Attributes:
        method: of the request.
        path: a part of its path.
        kind: ``cut`` before anything happens; ``cut after`` the request has had its effect, but before the answer;
            or a status such as ``503``.
        times: how often.
    """

    method: str
    path: str
    kind: str
    times: int = 1


@dataclass
class Hub:
    """The server's state, which tests read and set."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    may_write: bool = True
    bad_card: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; ``hub`` is set on the class that ``serve`` makes."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_POST = do_PUT = do_HEAD = do_GET

    def serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.fault(path)
        if fault == "cut":
            return self.cut()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault is not None and fault.isdigit():
            return self.answer(int(fault), b"<html>a proxy's page</html>", kind="text/html")
        with self.hub.lock:
            status, answer, headers = self.respond(path, body)
        if fault == "cut after":
            return self.cut()
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        return self.answer(status, content, headers=headers)

    def fault(self, path: str) -> str | None:
        for fault in self.hub.faults:
            if fault.method == self.command and fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault.kind
        return None

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: bytes, *, kind: str = "application/json", headers: Any = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def respond(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, answer (JSON or bytes) and headers."""
        if path.startswith("/objects/"):
            return self.store(path.removeprefix("/objects/"), body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": "someone", "type": "user"}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = [{"message": self.hub.bad_card}] if self.hub.bad_card else []
            return (400 if errors else 200), {"errors": errors, "warnings": []}, {}
        repo_id = "/".join(path.removeprefix("/api/models").removesuffix(".git").split("/")[1:3]).removesuffix(".git")
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        rest = path.partition(repo_id)[2]
        if rest == ".git/info/lfs/objects/batch":
            return (
                200,
                {"transfer": "basic", "objects": [self.upload(each) for each in json.loads(body)["objects"]]},
                {},
            )
        if rest.startswith("/preupload/"):
            return 200, {"files": [self.preupload(repo, each) for each in json.loads(body)["files"]]}, {}
        if rest.startswith("/commit/"):
            return self.commit(repo_id, repo, body)
        if rest.startswith("/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": oid(name, data)}
                for name, data in repo.files.items()
            ]
            return 200, listing, {}
        if rest.startswith("/resolve/"):
            name = rest.split("/", 3)[3]
            if name not in repo.files:
                return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
            data = repo.files[name]
            return 200, data, {"ETag": f'"{oid(name, data)}"', "X-Repo-Commit": repo.sha}
        siblings = [{"rfilename": name} for name in repo.files]
        return 200, {"id": repo_id, "sha": repo.sha, "private": repo.private, "siblings": siblings}, {}

    def create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        if not self.hub.may_write:
            return 403, {"error": "You don't have the rights to create a model here"}, {}
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return 409, {"error": "You already created this model repo", **url}, {}
        self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        return 200, url, {}

    def store(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != name:
            return 400, {"error": "other content than announced"}, {}
        self.hub.objects[name] = body
        return 200, {}, {}

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}}

    def preupload(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        name = file["path"]
        present = {"oid": oid(name, repo.files[name])} if name in repo.files else {}
        mode = "lfs" if name.endswith(LARGE) else "regular"
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, **present}

    def commit(self, repo_id: str, repo: Repo, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = dict(repo.files)
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return 400, {"error": f"{value['path']} was never uploaded"}, {}
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        return 200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.sha}", "commitOid": repo.sha}, {}


def oid(name: str, data: bytes) -> str:
    """How the Hub names content: sha256 of large files, git's blob id of others."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a port of its own."""
    hub = Hub()
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    with serving(Server(("127.0.0.1", 0), handler)) as hub.url:
        yield hub
