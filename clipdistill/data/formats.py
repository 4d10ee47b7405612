"""The formats of shards, by the end of a shard's name.

To add one: a class with the methods of ``shard_format.ShardFormat`` in a file of its own, and its place in ``FORMATS``.
"""

from clipdistill.data.shard_format import ShardFormat
from clipdistill.data.tar_shards import TarShards
from clipdistill.io.urls import file_name

FORMATS: dict[str, ShardFormat] = {".tar": TarShards()}
"""Every format of shards."""


def format_of(url: str) -> ShardFormat:
    """The format of a shard; one without a known ending is a tar file."""
    name = file_name(url)
    return next((each for ending, each in FORMATS.items() if name.endswith(ending)), FORMATS[".tar"])
