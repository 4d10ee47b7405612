"""Index of the samples of each shard: one pass over the shard, cached on disk for the next start."""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdistill.data.formats import format_of
from clipdistill.data.workers import note_shard
from clipdistill.errors import InputError
from clipdistill.io.caches import INDEXES, mark_used
from clipdistill.io.files import write_text
from clipdistill.io.paths import expand
from clipdistill.io.spool import Spool
from clipdistill.io.urls import ShardFile, Stat, file_name, is_remote, locate, one_line, shown, stat

logger = logging.getLogger(__name__)

_FORMAT = 5
_KEPT = 16
_DIGEST = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Positions of the samples of one shard."""

    url: str
    offsets: NDArray[np.int64]
    """First byte of each sample, ascending."""
    end: int
    """Byte after the last sample."""
    digest: str
    """Digest of the bytes that the scan read, such as tar headers: changes if the shard is rewritten, not if moved."""
    content: str
    """Digest of these and of samples' content: all labels, captions and other small members; and all images of a small
    shard, of a large one some."""
    stat: Stat
    """The version that was indexed."""
    repeats: frozenset[int] = frozenset()
    """Numbers of the samples that repeat an earlier sample's key; they are bad."""
    problems: tuple[str, ...] = ()
    """Damage, with its position. Samples hidden by damage are not among the offsets."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets)

    @property
    def unusable(self) -> str | None:
        """Why the shard has no samples, if it should have; else None."""
        return self.problems[-1] if self.problems and not len(self) else None


def index_shards(
    urls: Sequence[str],
    *,
    cache_dir: str | Path | None,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """Index shards, in their order. Each rank may index a slice of them, and gather the results.

    A shard that is damaged, or not a tar file, is indexed as far as possible, and its problems are logged.

    Args:
        urls: Shards, as returned by `expand_urls`.
        cache_dir: Folder for finished indexes; they are reused while URL, size and ETag (or times) are unchanged.
            That of a shard with neither time nor ETag is not kept, nor that of one written at this moment. None: no
            cache.
        threads: Number of shards read at once.
        progress: Called with the number of indexed shards and the total.

    Raises:
        InputError: A shard is missing or cannot be read.
    """
    indexes = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        futures = [pool.submit(_index_shard, url, cache_dir) for url in urls]
        try:
            for future in futures:
                indexes.append(future.result())
                _log_problems(indexes[-1])
                if progress:
                    progress(len(indexes), len(urls))
        finally:
            pool.shutdown(cancel_futures=True)
    return indexes


class LazyIndex(Sequence[ShardIndex]):
    """Shards that are indexed on first use: for sets too large to index before the first step.

    Args:
        urls: Shards, as returned by `expand_urls`.
        cache_dir: As for `index_shards`.
        sizes: The number of samples of each, as far as they are known (`stated_sizes`).

    `index[i]` raises InputError if shard i is missing or cannot be read, and `OtherShardError` if its content is not
    the expected one, or a whole shard has another number of samples.

    Attributes:
        sizes: those given.
        expected: digests of the content of shards that were opened before, by number.
        opened: those of the shards opened since, in this process.
        unreadable: the errors of those that could not be.
    """

    def __init__(
        self, urls: Sequence[str], *, cache_dir: str | Path | None, sizes: Sequence[int] | None = None
    ) -> None:
        self.urls = list(urls)
        self.sizes = None if sizes is None else list(sizes)
        self.expected: dict[int, str] = {}
        self.opened: dict[int, str] = {}
        self.unreadable: dict[int, str] = {}
        self._cache_dir = cache_dir
        self._kept: OrderedDict[int, ShardIndex] = OrderedDict()
        self._logged: set[int] = set()
        self._spool_folder = None if cache_dir is None else expand(cache_dir)
        self._spool: tuple[int, Spool] | None = None

    def __len__(self) -> int:
        return len(self.urls)

    def open(self, number: int) -> ShardFile:
        """Shard `number` for reading; if it was just indexed, without fetching its bytes again.

        Raises:
            Exception: as `ShardFile`.
        """
        index: ShardIndex = self[number]
        spooled, spool = self._spool or (None, None)
        return ShardFile(index.url, stat=index.stat, spool=spool if number == spooled else None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_spool": None}  # an open file

    def __getitem__(self, number: Any) -> Any:
        if number not in self._kept:
            note_shard(number)
            spool = Spool(self._spool_folder) if is_remote(self.urls[number]) else None
            try:
                index = _index_shard(self.urls[number], self._cache_dir, spool=spool)
            except InputError as error:
                self.unreadable[number] = str(error)
                raise
            if spool:
                self._spool = number, spool
            self.check(number, index.content)
            if self.sizes is not None:
                self._check_size(index, self.sizes[number])
            self._kept[number] = index
            if index.unusable:
                self.unreadable[number] = f"shard {shown(index.url)}: {index.unusable}"
            if number not in self._logged:
                self._logged.add(number)
                _log_problems(index)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[number]

    def _check_size(self, index: ShardIndex, stated: int) -> None:
        if len(index) > stated or (len(index) < stated and not index.problems):
            raise OtherShardError(
                f"data.shards: {shown(index.url)} has {len(index):,} samples, and the files beside it say {stated:,}; "
                "allowed: the right number, or no such file"
            )

    def check(self, number: int, content: str) -> None:
        """Note the content of a shard.

        Raises:
            OtherShardError: it is not the expected one.
        """
        expected = self.expected.setdefault(number, content)
        if content != expected:
            raise OtherShardError(
                f"data.shards: {file_name(self.urls[number])!r} (digest {content[:_DIGEST]}) is not the shard that the "
                f"run has read before (digest {expected[:_DIGEST]}); allowed: the same shards, or another output"
            )
        self.opened[number] = content


class OtherShardError(InputError):
    """A shard is another one than before."""


def _log_problems(index: ShardIndex) -> None:
    for problem in index.problems:
        logger.warning("shard %s: %s", shown(index.url), problem)


def _index_shard(url: str, cache_dir: str | Path | None, *, spool: Spool | None = None) -> ShardIndex:
    try:
        version = stat(url)
        cached = _cache_file(cache_dir, url=url, version=version)
        if cached and (known := _load(cached, url=url, version=version)):
            mark_used(cached)
            return known
        file = ShardFile(url, stat=version, spool=spool)
        try:
            index = _scan(file, url=url, version=version)
        finally:
            file.close()
    except InputError:
        raise
    except Exception as error:  # every filesystem raises its own errors
        raise InputError(f"shard {shown(url)!r} cannot be read: {one_line(error, url)}") from error
    if cached:
        try:
            _save(cached, index)
        except OSError as error:  # the shard is indexed again at the next start
            logger.warning("the index of shard %s is not cached: %s", shown(url), one_line(error))
    return index


def _scan(file: ShardFile, *, url: str, version: Stat) -> ShardIndex:
    digest, content = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=16)

    def read_at(offset: int, length: int) -> bytes:
        data = file.read_at(offset, length)
        digest.update(data)
        return data

    def read_content(offset: int, length: int) -> None:
        content.update(file.read_at(offset, length))

    layout = format_of(url).scan(read_at, version.size, read_content)
    content.update(digest.digest())
    return ShardIndex(
        url=url,
        offsets=np.array(layout.offsets, np.int64),
        end=layout.end,
        digest=digest.hexdigest(),
        content=content.hexdigest(),
        stat=version,
        repeats=layout.repeats,
        problems=tuple(layout.problems),
    )


def _cache_file(cache_dir: str | Path | None, *, url: str, version: Stat) -> Path | None:
    if cache_dir is None or not version.is_known:
        return None
    fs, path = locate(url)
    place = fs.unstrip_protocol(path)
    key = hashlib.sha256(json.dumps([_FORMAT, place, *astuple(version)]).encode()).hexdigest()[:32]
    return expand(cache_dir) / INDEXES / f"{key}.json"


def _load(path: Path, *, url: str, version: Stat) -> ShardIndex | None:
    """The index in a cache file; None if it is missing or damaged."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.pop("sha256") != _digest_of(saved):
            raise ValueError
        return ShardIndex(
            url=url,
            offsets=np.array(saved["offsets"], np.int64),
            end=int(saved["end"]),
            digest=str(saved["digest"]),
            content=str(saved["content"]),
            stat=version,
            repeats=frozenset(saved["repeats"]),
            problems=tuple(saved["problems"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        logger.warning("index %s is damaged: shard %s is indexed again", path, shown(url))
        return None


def _save(path: Path, index: ShardIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "url": shown(index.url),
        "offsets": index.offsets.tolist(),
        "end": index.end,
        "digest": index.digest,
        "content": index.content,
        "repeats": sorted(index.repeats),
        "problems": list(index.problems),
    }
    write_text(path, json.dumps({**saved, "sha256": _digest_of(saved)}))


def _digest_of(saved: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()
