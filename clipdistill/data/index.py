"""Where the samples of each shard are: one pass over the tar headers, kept on disk for the next start."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdistill.data.tar import Damage, Member, walk
from clipdistill.data.urls import ShardFile, locate, one_line, shown
from clipdistill.errors import InputError
from clipdistill.files import write_text

logger = logging.getLogger(__name__)

_FORMAT = 1
_STAMPS = ("mtime", "ETag", "etag", "Last-Modified", "LastModified", "last_modified", "blob_id")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """Where the samples of one shard begin."""

    url: str
    size: int
    """Bytes of the shard."""
    offsets: NDArray[np.int64]
    """Byte of each sample's first tar header, rising."""
    end: int
    """Byte after the last sample."""
    problems: tuple[str, ...] = ()
    """What is damaged, and where. Samples that the damage hides are not among the offsets."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.offsets)


def index_shards(
    urls: Sequence[str],
    *,
    cache_dir: str | Path | None,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """Index shards, in their order. Each rank may index a slice of them, and gather.

    A shard that is damaged, or no tar at all, is indexed as far as it goes, and its problems are logged.

    Args:
        urls: Shards, as `expand_urls` gives them.
        cache_dir: Folder for finished indexes; they are found again while URL, size and modification time (or
            ETag) are the same. None: no cache.
        threads: Shards that are read at once.
        progress: Called with the number of shards done, and of all.

    Raises:
        InputError: A shard is missing or cannot be read.
    """
    indexes = []
    with ThreadPoolExecutor(max_workers=threads) as pool:
        futures = [pool.submit(_index_shard, url, cache_dir) for url in urls]
        try:
            for future in futures:
                indexes.append(future.result())
                for problem in indexes[-1].problems:
                    logger.warning("shard %s: %s", shown(indexes[-1].url), problem)
                if progress:
                    progress(len(indexes), len(urls))
        finally:
            pool.shutdown(cancel_futures=True)
    return indexes


def fingerprint(index: Sequence[ShardIndex]) -> str:
    """A digest of the samples' order: file names, sizes and offsets; the same for the same shards in another
    folder."""
    digest = hashlib.sha256()
    for shard in index:
        name = shown(shard.url).replace("\\", "/").rsplit("/", 1)[-1]
        digest.update(json.dumps([name, shard.size, len(shard), shard.end]).encode())
        digest.update(shard.offsets.astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, cut at the first dot of its file name; None where it belongs to no
    sample.

    The extension is in lower case. WebDataset's `__meta__` members, and names without key or extension,
    belong to none.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    first = name.split("/", 1)[0]
    if not stem or not extension or (first.startswith("__") and first.endswith("__") and len(first) > 4):
        return None
    return folder + slash + stem, extension.lower()


def _index_shard(url: str, cache_dir: str | Path | None) -> ShardIndex:
    try:
        fs, path = locate(url)
        info = fs.info(path)
        if info["type"] != "file" or info["size"] is None:
            raise InputError(f"shard {shown(url)!r}: not a file of known size")
        size = int(info["size"])
        cached = _cache_file(cache_dir, url=fs.unstrip_protocol(path), size=size, info=info)
        if cached and (known := _load(cached, url=url, size=size)):
            return known
        file = ShardFile(url)
        try:
            index = _scan(file, url=url, size=size)
        finally:
            file.close()
    except InputError:
        raise
    except Exception as error:  # each filesystem has errors of its own
        raise InputError(f"shard {shown(url)!r} cannot be read: {one_line(error, url)}") from error
    if cached:
        _save(cached, index)
    return index


def _scan(file: ShardFile, *, url: str, size: int) -> ShardIndex:
    start = file.read_at(0, 8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            problem = f"compressed with {name}; a shard must be a plain tar"
            return ShardIndex(url=url, size=size, offsets=np.empty(0, np.int64), end=0, problems=(problem,))
    problems: list[str] = []
    offsets, end = _group(walk(file.read_at, size), problems)
    if not offsets and problems:
        problems.append("no samples: not a tar archive, or an empty or damaged one")
    return ShardIndex(url=url, size=size, offsets=np.array(offsets, np.int64), end=end, problems=tuple(problems))


def _group(entries: Iterable[Member | Damage], problems: list[str]) -> tuple[list[int], int]:
    """Offsets of the samples (runs of members with one key), and the end of the last; damage goes into
    `problems`."""
    offsets: list[int] = []
    ends: list[int] = [0]
    current = None
    for entry in entries:
        if isinstance(entry, Damage):
            problems.append(f"byte {entry.at:,}: {entry.reason}")
            cut = split_name(entry.name) if entry.name is not None else None
            if offsets and cut and cut[0] == current:
                offsets.pop()
                ends.pop()
            continue
        named = split_name(entry.name) if entry.regular else None
        if named is None:
            continue
        if named[0] != current:
            current = named[0]
            offsets.append(entry.header)
            ends.append(0)
        ends[-1] = entry.start + entry.size
    return offsets, ends[-1]


def _cache_file(cache_dir: str | Path | None, *, url: str, size: int, info: dict[str, Any]) -> Path | None:
    if cache_dir is None:
        return None
    stamp = [str(info[name]) for name in _STAMPS if info.get(name) is not None]
    key = hashlib.sha256(json.dumps([_FORMAT, url, size, stamp]).encode()).hexdigest()[:32]
    return Path(cache_dir).expanduser() / "shards" / f"{key}.json"


def _load(path: Path, *, url: str, size: int) -> ShardIndex | None:
    """The index in a cache file; None where there is none, or it is damaged."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        offsets = np.array(saved["offsets"], np.int64)
        return ShardIndex(url=url, size=size, offsets=offsets, end=int(saved["end"]), problems=tuple(saved["problems"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _save(path: Path, index: ShardIndex) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "url": shown(index.url),
        "offsets": index.offsets.tolist(),
        "end": index.end,
        "problems": index.problems,
    }
    write_text(path, json.dumps(saved))
