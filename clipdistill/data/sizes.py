"""The number of samples of each shard, from what is written beside shards, so that a run starts without reading them.

FOLDER/sizes.json             {"00000.tar": 9987, ...}, as open_clip's trainer reads it
FOLDER/*.json                 a shard index of wids: {"__kind__": "wids-shard-index-v1", "shardlist": [...]}; of a
                              remote folder, index.json or shardindex.json
FOLDER/00000_stats.json       of img2dataset: its "successes"
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.retries import may_pass
from clipdistill.io.urls import folder_of, one_line, read_many_small, read_small, shown

SIZES_FILE = "sizes.json"

_WIDS_KIND = "wids-shard-index-v1"
_WIDS_FILES = ("index.json", "shardindex.json")
_STATS = "_stats.json"
_MAX_BYTES = 64 << 20
_THREADS = 32


def stated_sizes(urls: Sequence[str]) -> list[int | None]:
    """The number of samples of each shard; None where nothing beside it says so.

    Args:
        urls: Shards, as returned by `expand_urls`.

    Raises:
        InputError: A file that says so is damaged or cannot be read, or two of them differ.
    """
    folders = sorted({folder_of(url) for url in urls if _is_plain(url)})
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        lists = dict(zip(folders, pool.map(_list_of, folders), strict=True))
    found = [lists[folder_of(url)].get(_name(url)) if _is_plain(url) else None for url in urls]
    asked = [number for number, size in enumerate(found) if size is None and _is_plain(urls[number])]
    if asked and _stats_of([urls[asked[0]]])[0] is not None:  # else none has any
        for number, size in zip(asked, _stats_of([urls[number] for number in asked]), strict=True):
            found[number] = size
    return found


def _list_of(folder: str) -> dict[str, int]:
    """The sizes that a folder's own list states, by file name."""
    sizes: dict[str, int] = {}
    for place, content in _lists_in(folder):
        for name, size in content.items():
            if sizes.setdefault(name, size) != size:
                raise InputError(f"{shown(place)}: {size} samples in {name}; another list beside it says {sizes[name]}")
    return sizes


def _lists_in(folder: str) -> Iterator[tuple[str, dict[str, int]]]:
    content = _read_json(f"{folder}/{SIZES_FILE}")
    if content is not None:
        if not isinstance(content, dict):
            raise InputError(f"{shown(folder)}/{SIZES_FILE}: {type(content).__name__}; allowed: shards and their sizes")
        yield f"{folder}/{SIZES_FILE}", _counts(content, f"{folder}/{SIZES_FILE}")
    if "://" in folder:
        places = [f"{folder}/{name}" for name in _WIDS_FILES]
    else:
        places = [
            str(path)
            for path in sorted(Path(folder).glob("*.json"))
            if path.name != SIZES_FILE and not path.name.endswith(_STATS) and _mentions_wids(path)
        ]
    for place in places:
        content = _read_json(place)
        if isinstance(content, dict) and content.get("__kind__") == _WIDS_KIND:
            listed = content.get("shardlist")
            if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
                raise InputError(f"{shown(place)}: shardlist {str(listed)[:40]!r}; allowed: a list of shards")
            yield place, _counts({_name(str(each.get("url"))): each.get("nsamples") for each in listed}, place)


def _mentions_wids(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _WIDS_KIND.encode() in file.read(4096)
    except OSError:
        return False


def _counts(sizes: Mapping[str, Any], place: str) -> dict[str, int]:
    for name, size in sizes.items():
        if type(size) is not int or size < 0:
            raise InputError(f"{shown(place)}: {size!r} samples in {name}; allowed: a whole number")
    return {_name(name): size for name, size in sizes.items()}


def _stats_of(urls: Sequence[str]) -> list[int | None]:
    """The number of samples of each shard in img2dataset's statistics."""
    places = [url.removesuffix(".tar") + _STATS for url in urls]
    sizes: list[int | None] = []
    for url, place, content in zip(urls, places, read_many_small(places), strict=True):
        stats = _parsed(place, content)
        known = isinstance(stats, dict) and "successes" in stats
        sizes.append(_counts({_name(url): stats["successes"]}, place)[_name(url)] if known else None)
    return sizes


def _read_json(place: str) -> Any:
    """Content of a local or remote JSON file; None if there is none."""
    try:
        content: bytes | Exception = read_small(place, _MAX_BYTES + 1)
    except Exception as error:  # every filesystem raises its own errors
        content = error
    return _parsed(place, content)


def _parsed(place: str, content: bytes | Exception) -> Any:
    if isinstance(content, FileNotFoundError | PermissionError) and not may_pass(content):
        return None  # stores that list no names answer "forbidden" for a file that is not there
    if isinstance(content, Exception):
        raise InputError(f"{shown(place)}: cannot be read: {one_line(content, place)}") from content
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES:,} bytes")
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(place)}: not JSON: {one_line(error)[:200]}; allowed: the sizes of shards") from error


def _is_plain(url: str) -> bool:
    """Whether files beside a shard have names that follow from its own."""
    return "?" not in url and "::" not in url


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]
