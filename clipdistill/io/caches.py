"""The cache: files that can be made again, each named after what it was made of, and verified when it is read.

CACHE/shards/KEY.json                      index of a shard's samples (clipdistill.data.index)
CACHE/labels/KEY.json                      classes of a shard's samples (clipdistill.data.labels)
CACHE/copies/VERSION-CONTENT.tar           copy of a remote shard of a test set (clipdistill.evaluation.sets.shards)
CACHE/class_embeddings/KEY.safetensors     class features of a prompt set (clipdistill.models.class_embeddings)
CACHE/catalogue/KEY.json                   cost of student candidates (clipdistill.catalogue)

A file's time of modification tells when it was last used, to the day.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_CACHE = "~/.cache/clipdistill"

INDEXES, LABELS, COPIES, CLASS_EMBEDDINGS = "shards", "labels", "copies", "class_embeddings"
CATALOGUE = "catalogue"
"""Folders in a cache."""

_KEYS = "[0-9a-f]{32,64}"
_FILES = {
    INDEXES: re.compile(rf"{_KEYS}\.json"),
    LABELS: re.compile(rf"{_KEYS}\.json"),
    COPIES: re.compile(rf"{_KEYS}(-{_KEYS})?\.tar"),
    CLASS_EMBEDDINGS: re.compile(rf"{_KEYS}\.safetensors"),
    CATALOGUE: re.compile(rf"{_KEYS}\.json"),
}
_DAY = 24 * 60 * 60


def mark_used(path: Path) -> None:
    """Note that a file of the cache is in use."""
    with contextlib.suppress(OSError):  # a cache that others own
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


@dataclass(kw_only=True)
class Cleaned:
    """Of one folder of a cache: files and bytes, those deleted and all."""

    deleted: list[Path] = field(default_factory=list)
    deleted_bytes: int = 0
    files: int = 0
    bytes: int = 0


def clean(cache: Path, *, days: float, most_bytes: int | None = None, dry_run: bool = False) -> dict[str, Cleaned]:
    """Delete files of a cache, and nothing else that is in its folder; a running process that needs one makes it again.

    Args:
        cache: the cache.
        days: those not used for so many days.
        most_bytes: of the others, those used least recently, until so many bytes are left; None: none.
        dry_run: delete nothing.

    Returns:
        What was deleted, or would be, by folder.

    Raises:
        OSError: a file cannot be deleted.
    """
    found = sorted(_entries(cache), key=lambda entry: entry[2].st_mtime, reverse=True)
    cleaned = {folder: Cleaned() for folder in _FILES}
    kept, now = 0, time.time()
    for folder, path, info in found:
        of_folder = cleaned[folder]
        of_folder.files += 1
        of_folder.bytes += info.st_size
        too_many = most_bytes is not None and kept + info.st_size > most_bytes
        if now - info.st_mtime < days * _DAY and not too_many:
            kept += info.st_size
            continue
        if not dry_run:
            path.unlink(missing_ok=True)
        of_folder.deleted.append(path)
        of_folder.deleted_bytes += info.st_size
    return cleaned


def _entries(cache: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Folder, path and state of each file of a cache."""
    for folder, name in _FILES.items():
        for path in (cache / folder).glob("*"):
            if name.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):  # another process deletes too
                    yield folder, path, path.stat()
