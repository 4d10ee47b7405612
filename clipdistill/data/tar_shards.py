"""WebDataset's format: tar files in which consecutive members with the same key form a sample."""

import re
from collections.abc import Iterable, Iterator

from clipdistill.data.shard_format import (
    MAX_SAMPLE_BYTES,
    SHARD_UNREADABLE,
    BadSampleError,
    RawSample,
    ReadAt,
    ReadContent,
    ShardLayout,
    sampled,
)
from clipdistill.data.tar import Damage, Member, walk

_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
"""Magic bytes of compressed files; no member's name begins with them."""


class TarShards:
    """Plain tar files, as `webdataset` and img2dataset write them (``data.shard_format.ShardFormat``)."""

    def scan(self, read_at: ReadAt, size: int, read_content: ReadContent) -> ShardLayout:
        """Find the samples by the headers of the members; a damaged shard is scanned as far as possible."""
        start = read_at(0, 16)
        compression = next((name for name, magic in _COMPRESSED.items() if magic.match(start)), None)
        if compression:
            problem = f"compressed with {compression}; a shard must be a plain tar"
            return ShardLayout(offsets=[], end=0, problems=[problem])
        problems: list[str] = []
        offsets, end, repeats = _group(_reading(walk(read_at, size), size, read_content), problems)
        if not offsets and problems:
            problems.append("no samples: not a tar archive, or an empty or damaged one")
        return ShardLayout(offsets=offsets, end=end, repeats=repeats, problems=problems)

    def read_sample(self, data: bytes, wanted: frozenset[str], raw: RawSample) -> None:
        """Fill in key and wanted members of a sample."""
        key = None
        for entry in walk(lambda at, size: data[at : at + size], len(data)):
            if isinstance(entry, Damage):
                cut = split_name(entry.name) if entry.name is not None else None
                if cut and key in (None, cut[0]) and len(data) == MAX_SAMPLE_BYTES:
                    raise BadSampleError("sample too large", f"more than {MAX_SAMPLE_BYTES:,} bytes")
                if key is None:
                    continue
                break
            named = split_name(entry.name) if entry.regular else None
            if named is None:
                continue
            if (key is None and entry.header) or key not in (None, named[0]):
                break
            key, extension = named
            raw.key = key
            if extension in raw.extensions:
                raise BadSampleError("duplicate member", f"{extension!r} twice")
            raw.extensions.append(extension)
            if extension in wanted:
                raw.members[extension] = data[entry.start : entry.start + entry.size]
        if key is None:
            raise BadSampleError(SHARD_UNREADABLE, "no sample where the index has one: the shard changed")


def _reading(entries: Iterable[Member | Damage], size: int, read_content: ReadContent) -> Iterator[Member | Damage]:
    """The same entries; what is sampled of each member's content is read in passing."""
    for entry in entries:
        if isinstance(entry, Member) and entry.regular and (length := sampled(entry.name, entry.size, size)):
            read_content(entry.start, length)
        yield entry


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, split at the first dot of its file name; None if it belongs to no
    sample.

    The extension is in lower case. WebDataset's `__meta__` members, and names without key or extension,
    belong to none.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    first = name.split("/", 1)[0]
    if not stem or not extension or (first.startswith("__") and first.endswith("__") and len(first) > 4):
        return None
    return folder + slash + stem, extension.lower()


def _group(entries: Iterable[Member | Damage], problems: list[str]) -> tuple[list[int], int, frozenset[int]]:
    """Offsets of the samples (runs of members with one key), the end of the last, and the numbers of those whose key
    occurred before; damage is added to `problems`."""
    offsets: list[int] = []
    ends: list[int] = [0]
    repeats: set[int] = set()
    known: set[str] = set()
    current, dropped = None, False
    for entry in entries:
        if isinstance(entry, Damage):
            problems.append(f"byte {entry.at:,}: {entry.reason}")
            cut = split_name(entry.name) if entry.name is not None else None
            if cut and cut[0] == current and not dropped:
                dropped = True
                offsets.pop()
                ends.pop()
                if len(offsets) in repeats:
                    repeats.remove(len(offsets))
                else:
                    known.remove(cut[0])
            continue
        named = split_name(entry.name) if entry.regular else None
        if named is None:
            continue
        if named[0] != current:
            current, dropped = named[0], False
            if current in known:
                repeats.add(len(offsets))
            known.add(current)
            offsets.append(entry.header)
            ends.append(0)
        if not dropped:
            ends[-1] = entry.start + entry.size
    return offsets, ends[-1], frozenset(repeats)
