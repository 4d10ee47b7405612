"""Append-only files with one JSON record per line, each with its step."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clipdistill.io.files import write_bytes, writing

log = logging.getLogger(__name__)

Record = dict[str, Any]


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file, empty if it is missing; damaged lines are logged and passed over."""
    return [record for _, record in _lines(path) if record is not None]


def filter_jsonl(path: Path, keep: Callable[[Record], bool]) -> None:
    """Drop the records that a resumed run will write again; damaged lines stay."""
    kept = [line for line, record in _lines(path) if record is None or keep(record)]
    with writing(path.name, path.parent):
        write_bytes(path, b"".join(line + b"\n" for line in kept))


def _lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """The lines of a file with their records, None for a damaged one; a last line truncated by a kill is left out."""
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate([*lines, last], 1):
        record = _parse(line)
        if record is None and number > len(lines):
            return
        if record is None:
            log.warning("%s:%d: not a record with a step; passed over", path, number)
        yield line, record


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class JsonlWriter:
    """Appends records; each is handed to the operating system when ``write`` returns.

    Raises:
        RunError: a record cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path.name, path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, record: Record) -> None:
        """Append a record."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with writing(self._path.name, self._path.parent):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        with writing(self._path.name, self._path.parent):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
