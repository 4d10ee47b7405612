"""Walking the headers of a tar archive that nobody vouches for.

`tarfile` trusts sizes that a hostile header claims, and stops at the first damaged block. `walk` reads no
more than the archive holds, always moves forward, and finds its way back after damage by looking for the next
block whose checksum is right. It knows ustar, GNU long names and pax headers: all that WebDataset shards are
made of.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_MAX_EXTENSION_BYTES = 1 << 16
_AFTER_END = "more members after an end-of-archive mark"
_NO_DATA = b"123456"
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    """One member: its name, and the bytes `start` to `start + size` of the archive that are its content."""

    header: int
    name: str
    start: int
    size: int
    regular: bool


class Damage(NamedTuple):
    """Something wrong at byte `at`; `name` is the member that is cut short, if one is."""

    at: int
    reason: str
    name: str | None = None


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def walk(read_at: ReadAt, size: int) -> Iterator[Member | Damage]:
    """Yield the members of an archive of `size` bytes, and its damage, in order.

    Args:
        read_at: Gives `size` bytes from an offset; the offsets asked for only rise.
        size: Where the archive ends; nothing beyond is read.

    A member's `header` is the first of its headers, extension headers included: reading may start there
    again.
    """
    at = 0
    first: int | None = None
    extension: dict[str, str] = {}
    hole: tuple[int, str] | None = None
    ended = False
    while at + BLOCK <= size:
        block = read_at(at, BLOCK)
        header = _parse(block)
        extends = header is not None and header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL)
        if header is None or (extends and header.size > _MAX_EXTENSION_BYTES):
            zeros = not block.strip(b"\0")
            hole = hole or (at, _AFTER_END if zeros else "no tar header here")
            ended = ended or zeros
            first, extension = None, {}
            at += BLOCK
            continue
        if hole:
            yield Damage(*hole)
            hole, ended = None, False
        first = at if first is None else first
        data = at + BLOCK
        if extends:
            if data + header.size <= size:
                extension |= _extension(header.kind, read_at(data, header.size))
            at = data + _padded(header.size)
            continue
        name = extension.get("path") or header.name.decode("utf-8", "surrogateescape")
        length = _size(extension.get("size", "").encode(), base=10) or header.size
        if header.kind in _NO_DATA:
            length = 0
        if data + length > size:
            yield Damage(first, f"member {name!r} is cut short", name)
            return
        regular = header.kind in _REGULAR and not name.endswith("/") and "sparse" not in extension
        yield Member(first, name, data, length, regular)
        first, extension = None, {}
        at = data + _padded(length)
    if hole and hole[1] != _AFTER_END:
        yield Damage(*hole)
    elif not ended:
        yield Damage(size, "no end-of-archive mark: the file may be cut short")


def _parse(block: bytes) -> _Header | None:
    claimed = _size(block[148:156])
    size = _size(block[124:136])
    if claimed is None or size is None:
        return None
    # The low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: sum(block), 20 times faster.
    actual = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * ord(" ")
    if (claimed - actual) % 65521:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])


def _size(field: bytes, base: int = 8) -> int | None:
    """A number of a header: octal digits, or, for what is too large for them, 0x80 and big-endian bytes."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    try:
        return int(digits, base) if digits.isdigit() else None
    except ValueError:
        return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What an extension header says of the next member: of its path, its size, whether it is sparse."""
    if kind == _LONG_NAME:
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while kind == _PAX and data:
        length = _size(data.split(b" ", 1)[0], base=10)
        if not length or length > len(data):
            break
        keyword, _, value = data[:length].rstrip(b"\n").partition(b" ")[2].partition(b"=")
        if keyword in (b"path", b"size"):
            found[keyword.decode()] = value.decode("utf-8", "surrogateescape")
        elif keyword.startswith(b"GNU.sparse"):
            found["sparse"] = "yes"
        data = data[length:]
    return found
