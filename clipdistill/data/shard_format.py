"""The protocol of a shard format: find the samples of a shard, and split a sample into its members."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from clipdistill.data.tar import ReadAt

MAX_SAMPLE_BYTES = 256 << 20
"""Largest number of bytes read of a sample."""


SHARD_UNREADABLE = "shard unreadable"
"""Reason of samples whose shard cannot be read, perhaps only at this moment."""

ReadContent = Callable[[int, int], None]
"""Reads the bytes from an offset, of a length, for the digest of a shard's content."""

_WHOLE_SHARD = 8 << 20
_WHOLE_MEMBER = 4 << 10
_PIECE = 64 << 10


def sampled(name: str, length: int, shard_size: int) -> int:
    """How many of a member's first bytes belong to the digest of its shard's content; the same wherever the shard is.

    All bytes of a shard of up to 8 MiB, and of members of up to 4 KiB; of other members, 64 KiB of so many that some
    8 MiB of the shard would be covered by them whole.
    """
    if shard_size <= _WHOLE_SHARD or length <= _WHOLE_MEMBER:
        return length
    share = _WHOLE_SHARD / shard_size
    return min(length, _PIECE) if zlib.crc32(name.encode("utf-8", "surrogateescape")) < share * 2**32 else 0


class BadSampleError(ValueError):
    """An unusable sample: the reason it is counted under, and the detail that is logged."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(kw_only=True)
class RawSample:
    """A sample as stored in its shard. If reading failed, `fault` is the reason."""

    url: str
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """Content of the wanted members by extension."""
    extensions: list[str] = field(default_factory=list)
    """Extensions of all members."""
    fault: BadSampleError | None = None


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Positions of a shard's samples: consecutive byte ranges."""

    offsets: list[int]
    """First byte of each sample, ascending."""
    end: int
    """Byte after the last sample."""
    repeats: frozenset[int] = frozenset()
    """Numbers of the samples that repeat an earlier sample's key; they are bad."""
    problems: list[str] = field(default_factory=list)
    """Damage, with its position. Samples hidden by damage are not among the offsets."""


class ShardFormat(Protocol):
    """A format of shards."""

    def scan(self, read_at: ReadAt, size: int, read_content: ReadContent) -> ShardLayout:
        """Find the samples of a shard of ``size`` bytes.

        The bytes read identify the version of the shard: read everything that describes samples, such as headers.
        ``read_content`` adds bytes of the samples themselves to what identifies the shard: those for which `sampled`
        asks, at ascending offsets, between the calls of ``read_at``.
        """

    def read_sample(self, data: bytes, wanted: frozenset[str], raw: RawSample) -> None:
        """Fill in key and wanted members of a sample from its bytes, which are cut at ``MAX_SAMPLE_BYTES``.

        Raises:
            BadSampleError: The bytes are not those of a sample.
        """
