"""Manifest of a folder: the size and sha256 of every file, and the sha256 of the manifest itself."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.files import why, write_text

FORMAT = 3
_MANIFEST = "manifest.json"
_DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""A file that is not there. Other errors of reading may pass, or be mended: what they hide need not be damaged."""


class UnreadableError(InputError):
    """A folder that may be complete, but that this process cannot read: permissions, a failing disk, another format."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder.

    Args:
        folder: its files must be complete.
        content: fields of the manifest; if ``files`` is missing, it is computed from the folder.
    """
    files = content.get("files") or fingerprints(folder)
    write_text(folder / _MANIFEST, _render({"format": FORMAT, **content, "files": files}))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises:
        UnreadableError: it cannot be read, or has another format.
        InputError: it is missing, or differs from the bytes written.
    """
    try:
        text = (path / _MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        if text != _render(manifest).encode():
            raise InputError(f"{_MANIFEST} differs from what was written")
        if manifest["format"] != FORMAT:
            raise UnreadableError(f"format {manifest['format']}, this version reads {FORMAT}")
    except _DAMAGE as error:
        raise InputError(f"{_MANIFEST} is missing: {why(error)}") from error
    except OSError as error:
        raise UnreadableError(f"{_MANIFEST} cannot be read: {why(error)}") from error
    except InputError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{_MANIFEST} differs from what was written: {why(error)}") from error
    return manifest


def find_damage(path: Path, *, contents: bool = True) -> str | None:
    """Description of the first damage among a folder's files; None if there is none.

    Raises:
        UnreadableError: the files cannot be read, and may be undamaged.
    """
    try:
        files = read_manifest(path)["files"]
    except UnreadableError:
        raise
    except InputError as error:
        return str(error)
    return find_change(path, files, contents=contents)


def fingerprints(folder: Path) -> dict[str, Any]:
    """Size and sha256 of every file below a folder, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): fingerprint(file) for file in files}


def find_change(folder: Path, files: Mapping[str, Any], *, contents: bool = True) -> str | None:
    """Description of the first file that differs from its fingerprint; None if all are the same.

    Args:
        folder: holds the files.
        files: their `fingerprints`.
        contents: compare their contents, not only their sizes.

    Raises:
        UnreadableError: a file cannot be read.
    """
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, {expected['bytes']} were written"
            if contents and fingerprint(folder / name) != expected:
                return f"{name} differs from what was written"
        except _DAMAGE as error:
            return f"{name} is missing: {why(error)}"
        except OSError as error:
            raise UnreadableError(f"{name} cannot be read: {why(error)}") from error
    return None


def fingerprint(file: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _render(manifest: Mapping[str, Any]) -> str:
    """A manifest as text, with a digest of itself."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=2) + "\n"
