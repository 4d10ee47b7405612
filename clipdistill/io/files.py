"""Atomic writing: a reader finds either a complete file or folder, or none."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clipdistill.errors import RunError


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Convert an OSError in a block that writes to one line with the file, the cause and the free space.

    Raises:
        RunError: the disk is full, a file too large, a permission missing...
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{what} could not be written: {why(error)} ({space_left(folder)})") from error


def why(error: BaseException) -> str:
    """The operating system's message of a read or write error."""
    return (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]


def space_left(folder: Path) -> str:
    """Free space on a folder's disk, as text."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.1f} MiB free on the disk of {folder}"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that replaces ``path`` if the block succeeds, and is deleted if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content atomically."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically; a NaN raises an error instead of producing invalid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` if the block succeeds, and is deleted if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        temporary.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folder, to the disk."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
