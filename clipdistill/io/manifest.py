"""Manifest of a folder: the size and sha256 of every file, and the sha256 of the manifest itself."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.files import why, write_text

FORMAT = 2
_MANIFEST = "manifest.json"


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of a folder.

    Args:
        folder: its files must be complete.
        content: fields of the manifest; if ``files`` is missing, it is computed from the folder.
    """
    files = content.get("files") or {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    write_text(folder / _MANIFEST, _render({"format": FORMAT, **content, "files": files}))


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a folder's manifest.

    Raises:
        InputError: it is missing, or differs from the bytes written.
    """
    try:
        text = (path / _MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != FORMAT:
            raise InputError(f"format {manifest['format']}, this version reads {FORMAT}")
        if text != _render(manifest).encode():
            raise InputError(f"{_MANIFEST} differs from what was written")
    except OSError as error:
        raise InputError(f"{_MANIFEST} cannot be read: {why(error)}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{_MANIFEST} differs from what was written: {error}") from error
    return manifest


def find_damage(path: Path, *, contents: bool = True) -> str | None:
    """Description of the first damage among a folder's files; None if there is none."""
    try:
        files = read_manifest(path)["files"]
    except InputError as error:
        return str(error)
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, {expected['bytes']} were written"
            if contents and _fingerprint(path / name) != expected:
                return f"{name} differs from what was written"
        except OSError as error:
            return f"{name} cannot be read: {why(error)}"
    return None


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _render(manifest: Mapping[str, Any]) -> str:
    """A manifest as text, with a digest of itself."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, allow_nan=False).encode()).hexdigest()
    return json.dumps(body | {"sha256": digest}, indent=2) + "\n"
