"""Shard formats, by file extension.

To add one: a class with the methods of ``shard_format.ShardFormat`` in a file of its own, and its entry in ``FORMATS``.
"""

import functools

from clipdistill.data.shard_format import ShardFormat
from clipdistill.data.tar_shards import TarShards
from clipdistill.io.urls import file_name

FORMATS: dict[str, ShardFormat] = {".tar": TarShards()}
"""All shard formats."""


@functools.lru_cache(maxsize=4096)
def format_of(url: str) -> ShardFormat:
    """The format of a shard; one without a known extension is a tar file."""
    name = file_name(url)
    return next((each for ending, each in FORMATS.items() if name.endswith(ending)), FORMATS[".tar"])
