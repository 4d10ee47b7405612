"""Append-only files with one JSON record per line, each with its step."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipdistill.io.files import write_text, writing

Record = dict[str, Any]


def read_jsonl(path: Path) -> list[Record]:
    """The records of a file, empty if it is missing; a last line truncated by a kill is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def filter_jsonl(path: Path, keep: Callable[[Record], bool]) -> None:
    """Drop the records that a resumed run will write again, and a truncated line."""
    kept = [record for record in read_jsonl(path) if keep(record)]
    with writing(path.name, path.parent):
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


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
