"""Paths as users write them."""

import os
import stat
import tempfile
from pathlib import Path

from clipdistill.errors import InputError

_PATH_BYTES, _NAME_BYTES = 4095, 255
_SHOWN = 60


def expand(path: str | Path) -> Path:
    """A path with ``~`` replaced by the user's home folder.

    A user without one (as in a container whose user id is in no passwd file) gets a private folder among the system's
    temporary files in its place.

    Raises:
        InputError: no such user, or another one owns that folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        first, *rest = Path(path).parts
        if first != "~":
            raise InputError(f"{path}: no such user; allowed: a path without {first}") from None
        return _stand_in().joinpath(*rest)


def local_path(text: str) -> Path:
    """A path that a user has written, as `expand` gives it.

    Raises:
        InputError: it is empty or too long, or holds a NUL character.
    """
    reason = "is empty" if not text else "holds a NUL character" if "\0" in text else ""
    found = expand(text)
    names = [os.fsencode(name) for name in found.parts]
    if max(map(len, names), default=0) > _NAME_BYTES or sum(map(len, names)) + len(names) > _PATH_BYTES:
        reason = "is too long"
    if reason:
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        raise InputError(f"{shown!r} {reason}; allowed: a path")
    return found


def read_text(path: Path, *, what: str, most: int = 64 << 20) -> str:
    """Content of a text file of at most ``most`` bytes that a user has named; a byte order mark is dropped.

    Raises:
        InputError: no such file, not a regular one, too large, not readable, or not UTF-8; begins with ``what``.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a special file"
            raise InputError(f"{what} {path}: {kind}; allowed: a text file")
        if found.st_size > most:
            raise InputError(f"{what} {path}: {found.st_size:,} bytes; allowed: at most {most:,}")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{what} {path}: no such file") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{what} {path}:{line}: not UTF-8 ({error.reason}); allowed: text in UTF-8") from None
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read: {error.strerror}; allowed: a readable file") from error
    except ValueError as error:  # a NUL character in the name
        raise InputError(f"{what} {str(path)!r}: {error}; allowed: a readable file") from error


def _stand_in() -> Path:
    folder = Path(tempfile.gettempdir(), f"clipdistill-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InputError(f"{folder}: is another user's; allowed: a home folder, in the variable HOME")
    return folder
