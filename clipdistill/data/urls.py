"""Finding shards and reading them: local files and what fsspec opens (http, S3, the Hugging Face Hub)."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand

from clipdistill.errors import InputError

_SKIP_BYTES = 1 << 20


def expand_urls(patterns: Sequence[str]) -> list[str]:
    """The shards that patterns name, in order: the patterns' own, and numeric order within a pattern.

    Args:
        patterns: Each a path or URL (`http(s)://`, `s3://`, `hf://`, what fsspec knows), with braces
            (`{000..012}.tar`) or wildcards (`*.tar`), or a folder: all its `*.tar`.

    Raises:
        InputError: A pattern names nothing, a local file is missing, a shard is named twice, or a pattern
            asks for a shell (`pipe:`), which is never run.
    """
    urls: dict[str, None] = {}
    for pattern in patterns:
        if any(part.startswith("pipe:") for part in pattern.split("::")):
            raise InputError(f"shards: {pattern!r} asks for a shell, which is never run; allowed: a path or a URL")
        for url in _expand(pattern):
            if url in urls:
                raise InputError(f"shards: {shown(url)!r} is named twice (again by {shown(pattern)!r})")
            urls[url] = None
    return list(urls)


def shown(url: str) -> str:
    """A URL as it may be logged: without the password, key or signature that it may carry."""
    if "://" not in url:
        return url
    return re.sub(r"(://)[^/@]*@", r"\1", url).split("?", 1)[0]


def locate(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path there.

    Raises:
        InputError: No such protocol, or its package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"shards: {shown(url)!r} cannot be opened: {one_line(error, url)}") from error


def one_line(error: BaseException, url: str = "") -> str:
    """An exception's type and message on one line; a URL in it as it may be logged."""
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return message.replace(url, shown(url)) if url else message


class ShardFile:
    """An open shard. Reading at rising offsets is cheap everywhere: a server without ranges is read through.

    Shards on one's own disk are only read where asked. Not safe for threads.
    """

    def __init__(self, url: str) -> None:
        self._fs, self._path = locate(url)
        self._options: dict[str, int] = {}
        self._file = self._fs.open(self._path, "rb")
        self._position = 0

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the shard ends."""
        try:
            return self._read_at(offset, size)
        except ValueError:
            if self._options or "http" not in self._fs.protocol:
                raise
        self._options = {"block_size": 0}
        self._reopen()
        return self._read_at(offset, size)

    def close(self) -> None:
        """Close the file or connection."""
        self._file.close()

    def _read_at(self, offset: int, size: int) -> bytes:
        if offset != self._position:
            self._move(offset)
        data = self._file.read(size)
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        self._position += len(data)
        return data

    def _move(self, offset: int) -> None:
        if not self._options:
            self._position = self._file.seek(offset)
            return
        if offset < self._position:
            self._reopen()
        while self._position < offset:
            skipped = len(self._file.read(min(_SKIP_BYTES, offset - self._position)))
            if not skipped:
                break
            self._position += skipped

    def _reopen(self) -> None:
        self._file.close()
        self._file = self._fs.open(self._path, "rb", **self._options)
        self._position = 0


def _expand(pattern: str) -> list[str]:
    if "://" not in pattern and Path(pattern).expanduser().exists():
        return _local(pattern, pattern)
    try:
        pieces = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"shards: {shown(pattern)!r}: unbalanced braces; allowed: as {{000..012}}") from error
    found = []
    for piece in pieces:
        found += _remote(piece, pattern) if "://" in piece else _local(piece, pattern)
    return found


def _local(piece: str, pattern: str) -> list[str]:
    path = Path(piece).expanduser()
    if path.is_dir():
        return _sorted([str(tar) for tar in path.glob("*.tar")], pattern, "a folder with *.tar files")
    if path.exists():
        return [str(path)]
    if glob.has_magic(piece):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return _sorted(found, pattern, "a pattern that matches files")
    raise InputError(f"shards: {piece!r} (from {pattern!r}) does not exist")


def _remote(piece: str, pattern: str) -> list[str]:
    if "::" in piece:
        return [piece]
    fs, path = locate(piece)
    wild = re.search(r"[*\[]", path)
    if not wild and path.endswith(".tar"):
        return [piece]
    try:
        if not wild and not piece.endswith("/") and not ("http" not in fs.protocol and fs.isdir(path)):
            return [piece]
        found = fs.glob(path if wild else path.rstrip("/") + "/*.tar")
    except Exception as error:  # each filesystem has errors of its own
        raise InputError(f"shards: {shown(piece)!r} cannot be listed: {one_line(error, piece)}") from error
    return _sorted([fs.unstrip_protocol(name) for name in found], pattern, "a pattern that matches files")


def _sorted(found: list[str], pattern: str, allowed: str) -> list[str]:
    if not found:
        raise InputError(f"shards: nothing found at {shown(pattern)!r}; allowed: {allowed}")
    return sorted(found, key=_numeric)


def _numeric(text: str) -> list[tuple[int, str]]:
    """Key that sorts 2.tar before 10.tar."""
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(re.split("([0-9]+)", text))]
