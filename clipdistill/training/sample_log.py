"""Log of the samples that a run saw, in order, with digests of their pixels, for verification."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from clipdistill.data import Batch
from clipdistill.distributed.collectives import rank
from clipdistill.io.jsonl import JsonlWriter, filter_jsonl
from clipdistill.io.run_files import SAMPLES_FOLDER


class SampleLog:
    """Writes ``samples/rank_00000.jsonl``, one file per rank: for each optimizer step the keys of its samples, in
    order, and a digest of their pixels (BLAKE2b of the uint8 crops, all micro-batches concatenated).

    Args:
        output: the run's folder.
    """

    def __init__(self, output: Path) -> None:
        self._writer = JsonlWriter(output / SAMPLES_FOLDER / f"rank_{rank():05d}.jsonl")

    def write(self, step: int, batches: Sequence[Batch]) -> None:
        """Append the samples of optimizer step ``step``, counted from 1."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in batches:
            digest.update(batch.image_BCHW.contiguous().numpy().data)
        keys = [key for batch in batches for key in batch.keys]
        self._writer.write({"step": step, "keys": keys, "pixels": digest.hexdigest()})

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        self._writer.sync()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def drop_later(output: Path, step: int) -> None:
    """Drop the records after a step from the sample logs of all ranks of an interrupted run."""
    for path in sorted((output / SAMPLES_FOLDER).glob("rank_*.jsonl")):
        filter_jsonl(path, lambda record: record["step"] <= step)
