"""Atomic writing: a reader finds either a complete file or folder, or none.

Temporary names are ``.NAME.MACHINE-PID-START-RANDOM.tmp``: what a killed process has left is deleted by the next one
that writes into the same folder.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from clipdistill.errors import InputError, RunError
from clipdistill.io.processes import machine, start_of


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
    """A temporary file that replaces ``path`` if the block succeeds, and is deleted if it fails.

    If ``path`` is a link, the file that it leads to is replaced. Permissions are the umask's, whatever the block does.

    Raises:
        InputError: ``path`` is a folder, a device or another special file.
    """
    target = output_file(path)
    temporary = _temporary(target)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors, for one, replaces the file with one that only its owner can read
        sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def output_file(path: Path) -> Path:
    """The file that is written at a path: where a link leads to, even if there is no file yet.

    Raises:
        InputError: a folder, a device or another special file is there.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except OSError:
        return target
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a loop of links" if stat.S_ISLNK(mode) else "a special file"
        raise InputError(f"{path}: {what}; allowed: a file, new or to be replaced")
    return target


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
    """A temporary folder that becomes ``path`` if the block succeeds, and is deleted if it fails.

    A link without a target gets one. Permissions are the umask's, whatever the block does.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.mkdir()
    try:
        yield temporary
        settle(temporary)
        temporary.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(folder: Path, *, what: str = "") -> None:
    """Check that a new folder can be written, before any work is done.

    Raises:
        InputError: something is there already, or the folder above is none, or cannot be written; begins with ``what``.
    """
    begin = f"{what} {folder}".strip()
    if folder.exists() or (folder.is_symlink() and Path(os.path.realpath(folder)).is_symlink()):
        raise InputError(f"{begin}: exists already; allowed: a new folder")
    above = next(path for path in Path(os.path.realpath(folder)).parents if path.exists())
    if not above.is_dir():
        raise InputError(f"{begin}: {above} is not a folder; allowed: a new folder in a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{begin}: {above} cannot be written; allowed: a new folder where you may write")


def settle(folder: Path) -> None:
    """Give all below a new folder the folder's permissions, as far as they apply to files, and flush it to the disk."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    for path in sorted(folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)
        sync(path)
    sync(folder)


def _temporary(target: Path) -> Path:
    """A new, hidden name beside a target that tells which process writes there; those of dead ones are deleted."""
    owner = _owner(os.getpid())
    if target.parent not in _swept:
        _swept.add(target.parent)
        for path in target.parent.glob(".*.tmp"):
            found = _TEMPORARY.fullmatch(path.name)
            if found and found["machine"] == owner["machine"] and _owner(int(found["pid"])) != found.groupdict():
                _delete(path)
    name = os.fsencode(target.name)[:_NAME_BYTES].decode(errors="ignore")
    return target.with_name(f".{name}.{owner['machine']}-{owner['pid']}-{owner['started']}-{secrets.token_hex(4)}.tmp")


_swept: set[Path] = set()
"""Folders in which this process has looked for the files of dead ones."""

_NAME_BYTES = 150
_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\w+)-[0-9a-f]{8}\.tmp")


def _owner(pid: int) -> dict[str, str]:
    """A process of this machine, as in the names of its temporary files."""
    here = hashlib.sha256("\n".join(machine()).encode()).hexdigest()[:8]
    return {"machine": here, "pid": str(pid), "started": start_of(pid) or "ended"}


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
