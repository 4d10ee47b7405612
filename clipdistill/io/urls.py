"""Find and read shards: local files, and URLs that fsspec opens (http, S3, the Hugging Face Hub).

A remote shard is read forward in blocks, one request each. A failed request is retried (`Retries`) from the
same byte with half the length, so that a shard can be read even over short-lived connections.
"""

import email.utils
import glob
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any, TypeVar

import aiohttp
import fsspec
from braceexpand import braceexpand
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.local import LocalFileSystem

from clipdistill.errors import InputError
from clipdistill.io.paths import expand
from clipdistill.io.retries import DEFAULT_RETRIES, Retries, may_pass, status_of
from clipdistill.io.spool import Spool

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_SHARDS = 1_000_000

NUMBER_FILE = "nshards.txt"
"""In a folder of shards: their number."""

_NUMBER_BYTES = 64
_MISSING_NAMED = 5
_BLOCK = 4 << 20
_SMALL = 16 << 20
_LEAST_BLOCK = 64 << 10
_TICK_OF_KERNEL = 50_000_000
"""Nanoseconds; times of files are at most this coarse."""

_TICK_OF_HTTP = 2.0
"""Seconds; a Last-Modified is whole seconds of the server's clock."""

_ETAGS = ("ETag", "etag", "blob_id")
_TIMES = ("mtime", "Last-Modified", "LastModified", "last_modified")

_kept: dict[int, Any] = {}
"""References to all filesystems that may hold connections, never released. fsspec drops its own references in a forked
worker; if a filesystem were collected there, closing its connections would remove them from the parent's event loop
(the two processes share one epoll), and the parent would wait for their responses forever."""


class ShardChangedError(Exception):
    """The shard was overwritten since `stat` was called."""


@dataclass(frozen=True, kw_only=True)
class Stat:
    """Identity of a version of a shard."""

    size: int
    """Bytes."""
    etag: str | None = None
    """The store's identifier of the content, if it has one."""
    modified: str | None = None
    """Modification time, if known."""
    changed: int | None = None
    """Of a local file, when its content or its times were changed, in nanoseconds: a time that nobody can set."""

    @property
    def is_known(self) -> bool:
        """Whether a shard of equal size that is written from now on would differ: it has an ETag, or a time that is not
        that of this moment."""
        if self.changed is not None:
            return time.time_ns() - self.changed > _TICK_OF_KERNEL
        if self.etag or self.modified is None:
            return bool(self.etag)
        try:
            modified = email.utils.parsedate_to_datetime(self.modified).timestamp()
        except ValueError:
            return True  # a store's own time, finer than a second
        return time.time() - modified > _TICK_OF_HTTP

    def agrees(self, other: "Stat") -> bool:
        """Whether both may be the same version; times are compared only if there are no ETags."""
        if self.size != other.size:
            return False
        if self.etag and other.etag:
            return self.etag == other.etag
        return not (self.modified and other.modified) or self.modified == other.modified


def expand_urls(patterns: Sequence[str], *, retries: Retries = DEFAULT_RETRIES) -> list[str]:
    """The shards that match the patterns: in the order of the patterns, and in numeric order within a pattern.

    Args:
        patterns: Each a path or URL (`http(s)://`, `s3://`, `hf://`, any protocol of fsspec), with braces
            (`{000..012}.tar`) or wildcards (`*.tar`), or a folder: all its `*.tar`, as many as its `nshards.txt`
            says, if it has one.
        retries: Limits for listing a remote folder.

    Raises:
        InputError: A pattern matches nothing, a local file is missing, a shard is named twice, or a pattern
            would run a shell (`pipe:`), which is refused.
    """
    urls: dict[str, None] = {}
    files: dict[str, str] = {}
    for pattern in patterns:
        if any(part.startswith("pipe:") for part in pattern.split("::")):
            raise InputError(f"shards: {pattern!r} would run a shell, which is refused; allowed: a path or a URL")
        for url in _expand(pattern, retries):
            if url in urls:
                raise InputError(f"shards: {shown(url)!r} is named twice (again by {shown(pattern)!r})")
            if "://" not in url and (other := files.setdefault(os.path.realpath(url), url)) != url:
                raise InputError(f"shards: {url!r} is the same file as {other!r}; allowed: each shard once")
            urls[url] = None
    return list(urls)


def shown(url: str) -> str:
    """A path or URL for people: without user, password, query and fragment, where keys and signatures are.

    Chained URLs (``simplecache::https://...``) are known. Nothing else may name a URL that leaves the process.
    """
    return _LINK.sub(lambda found: found["scheme"] + _public(found["rest"]), url)


def shown_text(text: str) -> str:
    """A message with every URL in it as in `shown`, and control characters escaped: it stays one line per line."""
    text = _URL_IN_TEXT.sub(lambda found: shown(found[0]), text)
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_LINK = re.compile(r"(?P<scheme>[\w.+-]+://)(?P<rest>.*?)(?=::[a-z][\w.+-]*(?:://|::)|$)", re.IGNORECASE | re.DOTALL)
_URL_IN_TEXT = re.compile(r"[\w.+:-]*://[^\s'\"<>]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_USER = re.compile(r"[^/]*@|[^/@]*:(?!\d*(?:[/?#]|$))[^@]*@(?:[^@]*@)*")
"""User and password; a password with a slash is known by a colon that is not followed by a port."""


def _public(rest: str) -> str:
    """What follows ``scheme://``."""
    return re.split(r"[?#]", _USER.sub("", rest, count=1) if _USER.match(rest) else rest, maxsplit=1)[0]


def is_remote(location: str) -> bool:
    """Whether a path, URL or name leads to another machine: ``hf-hub:OWNER/NAME``, or any URL but ``file://``."""
    schemes = re.findall(r"([\w.+-]+)://", location)
    return location.startswith("hf-hub:") or any(scheme.lower() not in ("file", "local") for scheme in schemes)


def file_name(url: str) -> str:
    """The last part of a path or URL, without password, key or signature."""
    return shown(url).replace("\\", "/").rsplit("/", 1)[-1]


def folder_of(url: str) -> str:
    """The folder of a path or URL."""
    return url.rpartition("/")[0] if "://" in url else str(PurePath(url).parent)


def one_line(error: BaseException, url: str = "") -> str:
    """An exception's type and message on one line, with URLs as in `shown`."""
    if error.__cause__ and (isinstance(error, FileNotFoundError) or not str(error)):
        error = error.__cause__  # fsspec's lookups over HTTP raise it for any error; its time-outs have no message
    message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if url:
        message = message.replace(url, shown(url))
    return shown_text(message)


def locate(url: str, *, retries: Retries = DEFAULT_RETRIES) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it.

    Credentials and proxies come from the environment and the usual files: `~/.netrc`, `~/.aws`, the token of
    `hf auth login`, fsspec's configuration.

    Args:
        url: A path or URL.
        retries: Its time-outs apply to every request over HTTP and to S3.

    Raises:
        InputError: Unknown protocol, or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(url, retries))
    except (ImportError, ValueError) as error:
        raise InputError(f"shards: {shown(url)!r} cannot be opened: {one_line(error, url)}") from error
    if not isinstance(fs, LocalFileSystem):
        _kept[id(fs)] = fs
    if "s3" in fs.protocol:
        fs.retries = 1  # else each of our attempts would be five of s3fs
    return fs, path


def stat(url: str, *, retries: Retries = DEFAULT_RETRIES) -> Stat:
    """Size and version of a shard.

    Raises:
        InputError: It is not a file of known size, or no filesystem supports its URL.
        Exception: The filesystem's error if the shard is missing or unreachable.
    """
    fs, path = locate(url, retries=retries)
    return _retried(fs, url, retries, lambda: _look(fs, path, url))


def read_small(url: str, most: int, *, retries: Retries = DEFAULT_RETRIES) -> bytes:
    """The first ``most`` bytes of a small local or remote file, in one request.

    Raises:
        InputError: No filesystem supports its URL.
        Exception: The filesystem's error if it is missing or unreachable, after the last attempt.
    """
    fs, path = locate(url, retries=retries)
    if isinstance(fs, LocalFileSystem):
        with Path(path).open("rb") as file:
            return file.read(most)
    content: bytes = _retried(fs, url, retries, lambda: fs.cat_file(path, start=0, end=most))
    return content[:most]


def read_many_small(urls: Sequence[str], *, retries: Retries = DEFAULT_RETRIES) -> list[bytes | Exception]:
    """The contents of small local or remote files, or their errors; many at once. Requests that fail for a reason that
    may pass are repeated one by one."""
    located = [locate(url, retries=retries) for url in urls]
    found: dict[tuple[int, str], Any] = {}
    for fs in {id(fs): fs for fs, _ in located}.values():
        paths = [path for other, path in located if other is fs]
        answers = fs.cat(paths, on_error="return")
        answers = answers if isinstance(answers, dict) else {paths[0]: answers}
        found |= {(id(fs), path): answer for path, answer in answers.items()}

    def again(url: str, answer: Any) -> bytes | Exception:
        if not isinstance(answer, Exception) or not may_pass(answer):
            return answer
        try:
            return read_small(url, _SMALL, retries=retries)
        except Exception as error:  # every filesystem raises its own errors
            return error

    return [again(url, found[id(fs), path]) for url, (fs, path) in zip(urls, located, strict=True)]


class ShardFile:
    """An open shard. Reading at ascending offsets is cheap everywhere: without range support, the server's response is
    read sequentially.

    Local shards are read without readahead. Not thread-safe.

    All bytes read from a remote shard belong to one version: over HTTP each response must have the size and the ETag
    (or time) of the first; on S3 no other ETag is accepted; elsewhere the version is checked again for each new
    connection, so a `hf://` shard should name its revision (`hf://datasets/owner/name@revision/...`).

    Args:
        url: A path or URL.
        stat: The version to read, as returned by `stat`; for local files only its size counts. None: the current
            version.
        retries: Limits for remote reads.
        spool: Keeps what is read of a remote shard, and is read in place of it.

    Raises:
        ShardChangedError: Here or while reading: the shard's version differs or has changed.
        InputError: As for `stat`.
        Exception: The filesystem's error, after the last attempt.
    """

    def __init__(
        self,
        url: str,
        *,
        stat: Stat | None = None,
        retries: Retries = DEFAULT_RETRIES,
        spool: Spool | None = None,
    ) -> None:
        self._url = url
        self._spool = spool
        self._retries = retries
        self._fs, self._path = locate(url, retries=retries)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._stat = stat or _retried(self._fs, url, retries, self._look)
        self._file: Any = None
        self._ranges = True
        self._block = _BLOCK
        self._buffer, self._start = b"", 0
        _retried(self._fs, url, retries, lambda: self._open(check=stat is not None))

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer at the end of the shard."""
        if self._local:
            self._file.seek(offset)
            return self._file.read(size)
        size = max(0, min(size, self._stat.size - offset))
        data = self._buffered(offset, size)
        while len(data) < size:
            data += self._buffered(offset + len(data), size - len(data))
        return data

    def close(self) -> None:
        """Close the file or connection."""
        if self._file:
            self._file.close()
        self._file, self._buffer = None, b""

    def _buffered(self, offset: int, size: int) -> bytes:
        """At least one and at most `size` bytes from `offset`."""
        skip = offset - self._start
        if size and not 0 <= skip < len(self._buffer):
            kept = b"" if self._spool is None else self._spool.read(offset, _BLOCK)
            self._buffer = kept or _retried(self._fs, self._url, self._retries, lambda: self._request(offset), offset)
            self._start, skip = offset, 0
            if self._spool is not None and not kept:
                self._spool.write(offset, self._buffer)
        return self._buffer[skip : skip + size]

    def _request(self, offset: int) -> bytes:
        """One attempt to read a block."""
        try:
            if not self._file:
                self._fs.invalidate_cache(self._path)
                self._open(check=True)
            read = self._read_range if self._ranges else self._read_through
            data = read(offset, min(self._block, self._stat.size - offset))
            if not data:
                raise OSError(f"empty response, {self._stat.size - offset:,} bytes missing")
        except _NoRangesError:
            self.close()
            self._ranges = False
            return self._request(offset)
        except Exception as error:
            self.close()
            self._block = max(_LEAST_BLOCK, self._block // 2)
            if status_of(error) in (412, 416):
                raise self._changed() from error
            if isinstance(error, IndexError):  # s3fs raises it for a time-out
                raise TimeoutError("no answer in time") from None
            raise
        self._block = min(_BLOCK, 2 * self._block)
        return data

    def _read_range(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def _read_through(self, offset: int, size: int) -> bytes:
        if offset < self._file.tell():
            self.close()
            self._open(check=True)
        while self._file.tell() < offset and self._file.read(min(_BLOCK, offset - self._file.tell())):
            pass
        data = b""
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        return data

    def _open(self, *, check: bool) -> None:
        if isinstance(self._fs, HTTPFileSystem):
            self._file = self._fs.open(
                self._path,
                "rb",
                block_size=_BLOCK if self._ranges else 0,
                cache_type="none",
                size=self._stat.size,
                headers={"Accept-Encoding": "identity"},
                raise_for_status=self._check,
            )
            return
        self._file = self._fs.open(self._path, "rb", block_size=_BLOCK, cache_type="none")
        if not check:
            return
        now = self._look()
        if not (now.size == self._stat.size if self._local else now.agrees(self._stat)):
            self.close()
            raise self._changed()

    async def _check(self, response: aiohttp.ClientResponse) -> None:
        """Called by aiohttp with every response, before its body: raise unless it is the requested range of the
        right version."""
        response.raise_for_status()
        asked = re.match(r"bytes=(\d+)-", response.request_info.headers.get("Range", "bytes=0-"))
        sent = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        whole = response.content_length if response.status == 200 else None
        size = int(sent[2]) if sent else self._stat.size if whole is None else whole
        etag, modified = response.headers.get("ETag"), response.headers.get("Last-Modified")
        first = int(asked[1]) if asked else 0
        error: Exception | None = None
        if not self._stat.agrees(Stat(size=size, etag=etag, modified=modified)):
            error = self._changed()
        elif sent and int(sent[1]) != first:
            error = OSError(f"the server sent byte {int(sent[1]):,} for {first:,}")
        elif first and not sent and response.status != 206:
            error = _NoRangesError()
        if error:
            response.close()
            raise error

    def _look(self) -> Stat:
        return _look(self._fs, self._path, self._url)

    def _changed(self) -> ShardChangedError:
        was = f"{self._stat.size:,} bytes, ETag {self._stat.etag}, written {self._stat.modified}"
        return ShardChangedError(f"{shown(self._url)} was overwritten (previous version: {was})")


class _NoRangesError(Exception):
    """The server answers a range request with the entire file."""


def _options(url: str, retries: Retries) -> dict[str, Any]:
    """Settings for the filesystems of a URL, by protocol; the user's own (fsspec's configuration) take precedence."""
    timeout = aiohttp.ClientTimeout(connect=retries.connect_timeout, sock_read=retries.read_timeout)
    http = "client_kwargs", {"trust_env": True, "timeout": timeout}
    s3_timeouts = {"connect_timeout": retries.connect_timeout, "read_timeout": retries.read_timeout}
    s3 = "config_kwargs", {**s3_timeouts, "retries": {"mode": "standard", "total_max_attempts": 1}}
    options = {}
    for protocol, (name, values) in {"http": http, "https": http, "s3": s3, "s3a": s3}.items():
        if f"{protocol}://" in str(url):
            options[protocol] = {name: values | fsspec.config.conf.get(protocol, {}).get(name, {})}
    return options


def _retried(fs: Any, url: str, retries: Retries, request: Callable[[], T], offset: int | None = None) -> T:
    """The result of a request, retried if the filesystem is remote."""
    if isinstance(fs, LocalFileSystem):
        return request()

    def report(error: Exception, wait: str) -> None:
        place = shown(url) if offset is None else f"{shown(url)}: byte {offset:,}"
        logger.warning("shard %s: %s; %s", place, one_line(error, url), wait)

    return retries.run(request, report)


def _look(fs: Any, path: str, url: str) -> Stat:
    info = fs.info(path)
    if info["type"] != "file" or info["size"] is None:
        raise InputError(f"shard {shown(url)!r}: not a file of known size")
    etag, modified = (next((str(info[name]) for name in names if info.get(name)), None) for names in (_ETAGS, _TIMES))
    changed = Path(path).stat().st_ctime_ns if isinstance(fs, LocalFileSystem) else None
    return Stat(size=int(info["size"]), etag=etag, modified=modified, changed=changed)


def _expand(pattern: str, retries: Retries) -> list[str]:
    if "://" not in pattern and _exists(expand(pattern)):
        return _local(pattern, pattern)
    try:
        pieces = [] if _has_long_range(pattern) else list(islice(braceexpand(pattern), _MOST_SHARDS + 1))
    except ValueError as error:
        raise InputError(
            f"shards: {shown(pattern)!r}: unbalanced braces; allowed: a pattern such as {{000..012}}"
        ) from error
    if not pieces or len(pieces) > _MOST_SHARDS:
        raise InputError(f"shards: {shown(pattern)!r} names more than {_MOST_SHARDS:,} shards; allowed: fewer")
    found = []
    for piece in pieces:
        found += _remote(piece, pattern, retries) if "://" in piece else _local(piece, pattern)
    return found


def _has_long_range(pattern: str) -> bool:
    """Whether one range of a pattern alone has too many numbers, which need not be written out to be counted."""
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?\}", pattern)
    return any(
        abs(int(last) - int(first)) // max(abs(int(step or 1)), 1) >= _MOST_SHARDS for first, last, step in ranges
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder without search permission
        return False


def _local(piece: str, pattern: str) -> list[str]:
    path = expand(piece)
    if _exists(path):
        if not path.is_dir():
            return [str(path)]
        found = _sorted([str(tar) for tar in path.glob("*.tar")], pattern, "a folder with *.tar files")
        listing = path / NUMBER_FILE
        if listing.is_file():
            with listing.open("rb") as file:
                _check_number(found, str(path), file.read(_NUMBER_BYTES))
        return found
    if glob.has_magic(piece):
        found = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob accepts no absolute pattern)
        return _sorted(found, pattern, "a pattern that matches files")
    raise InputError(f"shards: {piece!r} (from {pattern!r}) does not exist")


def _remote(piece: str, pattern: str, retries: Retries) -> list[str]:
    if "::" in piece:
        return [piece]
    fs, path = locate(piece, retries=retries)
    wild = re.search(r"[*\[]", path)
    http = isinstance(fs, HTTPFileSystem)
    if not wild and path.endswith(".tar"):
        return [piece]

    def is_folder() -> bool:
        return piece.endswith("/") or (not http and fs.isdir(path))

    def find() -> list[str]:
        errors = {"on_error": "raise"} if http else {}  # by default, an unreachable folder looks empty
        return fs.glob(path if wild else path.rstrip("/") + "/*.t[ax][rt]", **errors)  # .tar and .txt, in one listing

    def read_number() -> bytes:
        with fs.open(listing[0], "rb") as file:
            return file.read(_NUMBER_BYTES)

    try:
        if not wild and not _retried(fs, piece, retries, is_folder):
            return [piece]
        found = _retried(fs, piece, retries, find)
        listing = [name for name in found if not wild and file_name(name) == NUMBER_FILE]
        number = _retried(fs, piece, retries, read_number) if listing else None
    except Exception as error:  # every filesystem raises its own errors
        raise InputError(f"shards: {shown(piece)!r} cannot be listed: {one_line(error, piece)}") from error
    tars = [fs.unstrip_protocol(name) for name in found if wild or name.endswith(".tar")]
    tars = _sorted(tars, pattern, "a pattern that matches files")
    if number is not None:
        _check_number(tars, shown(piece), number)
    return tars


def _check_number(found: Sequence[str], folder: str, content: bytes) -> None:
    """Refuse a folder that has not as many shards as its ``nshards.txt`` says."""
    text = content.decode("ascii", "replace").strip()
    if not re.fullmatch("[0-9]{1,18}", text):
        raise InputError(f"data.shards: {folder}/{NUMBER_FILE}: {text!r}; allowed: the number of shards")
    if len(found) == int(text):
        return
    names = {file_name(url) for url in found}
    missing = []
    if all(re.fullmatch(r"[0-9]+\.tar", name) for name in names):
        numbered = (f"{number}.tar" for number in range(int(text)))
        missing = list(islice((name for name in numbered if name not in names), _MISSING_NAMED))
    named = f" (missing: {', '.join(missing)}{', ...' if len(missing) == _MISSING_NAMED else ''})" if missing else ""
    raise InputError(
        f"data.shards: {folder} holds {len(found)} shards, its {NUMBER_FILE} says {text}{named}; allowed: all of them, "
        "or a pattern that names those to use"
    )


def _sorted(found: list[str], pattern: str, allowed: str) -> list[str]:
    if not found:
        raise InputError(f"shards: nothing found at {shown(pattern)!r}; allowed: {allowed}")
    return sorted(found, key=_numeric)


def _numeric(text: str) -> list[tuple[int, str]]:
    """Sort key that places 2.tar before 10.tar."""
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(re.split("([0-9]+)", text))]
