"""What a format of shards must do: find the samples of a shard, and take one of them apart."""

from dataclasses import dataclass, field
from typing import Protocol

from clipdistill.data.tar import ReadAt

MAX_SAMPLE_BYTES = 256 << 20
"""Of a sample no more than this is read."""


class BadSampleError(ValueError):
    """A sample that cannot be used: the reason that it is counted under, and the detail that is logged."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(kw_only=True)
class RawSample:
    """A sample as it lies in its shard. Where reading it failed, `fault` says why."""

    url: str
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    """Content of the wanted members by extension."""
    fault: BadSampleError | None = None


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Where the samples of a shard are: consecutive ranges of bytes."""

    offsets: list[int]
    """First byte of each sample, rising."""
    end: int
    """Byte after the last sample."""
    repeats: frozenset[int] = frozenset()
    """Numbers of samples whose key an earlier sample has: bad ones."""
    problems: list[str] = field(default_factory=list)
    """What is damaged, and where. Samples that the damage hides are not among the offsets."""


class ShardFormat(Protocol):
    """A format of shards."""

    def scan(self, read_at: ReadAt, size: int) -> ShardLayout:
        """Find the samples of a shard of ``size`` bytes.

        The bytes that it reads identify the version of the shard: read all that describes samples, such as headers.
        """

    def read_sample(self, data: bytes, wanted: frozenset[str], raw: RawSample) -> None:
        """Fill key and wanted members of a sample from its bytes, cut at ``MAX_SAMPLE_BYTES``.

        Raises:
            BadSampleError: The bytes are not those of a sample.
        """
