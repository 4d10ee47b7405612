"""A temporary file of what was read from another machine, so that it is not fetched twice."""

import logging
import os
import tempfile
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


class Spool:
    """Bytes of one version of one remote file, as far as they were read.

    The file has no name: it is gone when the process ends, however it ends. If the disk is full, nothing more is kept.
    Forked processes may go on reading it: no position in it is shared.

    Args:
        folder: where the temporary file is made; None: where temporary files go.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._usable = True
        self._ranges: list[list[int]] = []
        """First byte and end of what is kept, in the order in which it was read."""

    def write(self, offset: int, data: bytes) -> None:
        """Keep bytes that were read at an offset."""
        if not self._usable:
            return
        try:
            if self._file is None:
                if self._folder is not None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (it stays open)
            written = 0
            while written < len(data):
                written += os.pwrite(self._file.fileno(), memoryview(data)[written:], offset + written)
        except OSError as error:
            log.warning("a remote shard is fetched twice, as it cannot be kept in a temporary file: %s", error)
            self._usable = False
            self.close()
            return
        if self._ranges and self._ranges[-1][1] == offset:
            self._ranges[-1][1] += len(data)
        else:
            self._ranges.append([offset, offset + len(data)])

    def read(self, offset: int, size: int) -> bytes:
        """At most ``size`` of the kept bytes from an offset on; empty if that byte is not kept."""
        for first, end in self._ranges:
            if self._file is not None and first <= offset < end:
                return os.pread(self._file.fileno(), min(size, end - offset), offset)
        return b""

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def close(self) -> None:
        """Delete the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._ranges = None, []
