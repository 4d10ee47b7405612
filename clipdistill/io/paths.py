"""Paths as users write them."""

import os
import stat
import tempfile
from pathlib import Path

from clipdistill.errors import InputError


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


def _stand_in() -> Path:
    folder = Path(tempfile.gettempdir(), f"clipdistill-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InputError(f"{folder}: is another user's; allowed: a home folder, in the variable HOME")
    return folder
