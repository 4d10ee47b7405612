"""The protocol of a shard format: find the samples of a shard, and split a sample into its members."""

from dataclasses import dataclass, field
from typing import Protocol

from clipdistill.data.tar import ReadAt

MAX_SAMPLE_BYTES = 256 << 20
"""Largest number of bytes read of a sample."""


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

    def scan(self, read_at: ReadAt, size: int) -> ShardLayout:
        """Find the samples of a shard of ``size`` bytes.

        The bytes read identify the version of the shard: read everything that describes samples, such as headers.
        """

    def read_sample(self, data: bytes, wanted: frozenset[str], raw: RawSample) -> None:
        """Fill in key and wanted members of a sample from its bytes, which are cut at ``MAX_SAMPLE_BYTES``.

        Raises:
            BadSampleError: The bytes are not those of a sample.
        """
