"""Writing so that a reader finds either the whole of something or nothing of it."""

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
    """A block that writes: an error of the disk becomes one line with what was written, why it failed, and the space.

    Raises:
        RunError: the disk is full, a file too large, a permission missing...
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{what} could not be written: {why(error)} ({space_left(folder)})") from error


def why(error: BaseException) -> str:
    """The reason of an error of reading or writing, in the operating system's words."""
    return (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]


def space_left(folder: Path) -> str:
    """How much a folder's disk can still take, in words."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(existing).free / 2**20:.1f} MiB free on the disk of {folder}"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; a NaN becomes an error rather than invalid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not."""
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
