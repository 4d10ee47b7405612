"""Walk the headers of an untrusted tar archive.

`tarfile` trusts the sizes that a hostile header claims, and stops at the first damaged block. `walk` reads no
more than the archive holds, always moves forward, and resynchronises after damage at the next block with a
valid checksum. It supports ustar, GNU long names and pax headers: everything that WebDataset shards contain.

It misses members that inserted or removed bytes shifted off the 512-byte grid, up to the next aligned one, and
members inside another one whose header has a valid checksum but claims too many bytes. It cannot detect that
the last members were replaced by zeros, if no more than may end an archive.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENSION_BYTES = 1 << 16
_MAX_PADDING = 2 * BLOCK + 10_240
"""Zeros that may end an archive: the end-of-archive mark, in the usual records of 20 blocks."""
_NO_DATA = b"123456"
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> bytes of a file; fewer than `length` at its end."""


class Member(NamedTuple):
    """One member: its name, and its content, the bytes `start` to `start + size` of the archive."""

    header: int
    name: str
    start: int
    size: int
    regular: bool


class Damage(NamedTuple):
    """Damage at byte `at`; `name` is the truncated member, if any."""

    at: int
    reason: str
    name: str | None = None


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


class _Extension(NamedTuple):
    """Fields of the next member that extension headers define."""

    path: str = ""
    size: int | None = None
    sparse: bool = False


def walk(read_at: ReadAt, size: int) -> Iterator[Member | Damage]:
    """Yield the members of an archive of `size` bytes, and its damage, in order.

    Args:
        read_at: Reads `size` bytes at an offset; offsets only increase.
        size: Size of the archive; nothing beyond is read.

    A member's `header` is the offset of the first of its headers, extension headers included: reading can
    restart there. After damage that destroyed its extension headers, a member may have the wrong name: do not
    group members across damage.
    """
    at = 0
    first: int | None = None
    extension = _Extension()
    zeros: int | None = None
    lost = False
    while at + BLOCK <= size:
        block = read_at(at, BLOCK)
        header = _parse(block)
        extends = header is not None and header.kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL)
        if header is None or (extends and header.size > _MAX_EXTENSION_BYTES):
            if not lost and block == _ZEROS:
                zeros = at if zeros is None else zeros
            elif not lost:
                lost = True
                yield Damage(at, "no tar header here")
            first, extension = None, _Extension()
            at += BLOCK
            continue
        if zeros is not None and not lost:
            yield Damage(zeros, "more members after an end-of-archive mark")
        zeros, lost = None, False
        first = at if first is None else first
        data = at + BLOCK
        if extends:
            if header.kind in (_LONG_NAME, _PAX) and data + header.size <= size:
                extended = _extended(extension, header.kind, read_at(data, header.size))
                if extended is None:
                    yield Damage(at, "unreadable extension header")
                extension = extended or _Extension()
            at = data + _padded(header.size)
            continue
        name = extension.path or header.name.decode("utf-8", "surrogateescape")
        length = header.size if extension.size is None else extension.size
        if header.kind in _NO_DATA:
            length = 0
        if data + length > size:
            yield Damage(first, f"member {_short(name)} is cut short", name)
            lost = True
            first, extension = None, _Extension()
            at = data
            continue
        regular = header.kind in _REGULAR and not name.endswith("/") and not extension.sparse
        yield Member(first, name, data, length, regular)
        first, extension = None, _Extension()
        at = data + _padded(length)
    if lost:
        return
    if zeros is None:
        yield Damage(size, "no end-of-archive mark: the file may be cut short")
    elif size - zeros > _MAX_PADDING:
        yield Damage(zeros, f"{size - zeros:,} zero bytes to the end: the file may be incomplete")


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
    """A number of a header: octal digits, or, if too large for them, 0x80 and big-endian bytes."""
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


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _extended(known: _Extension, kind: bytes, data: bytes) -> _Extension | None:
    """`known`, updated with the content of an extension header; None if that is damaged."""
    if kind == _LONG_NAME:
        path = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        return known._replace(path=path) if path else None
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        end = at + ((_size(data[at:space], base=10) if space > at else None) or len(data) + 1)
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or data[end - 1] != ord("\n") or not equals:
            return None
        if keyword == b"path":
            known = known._replace(path=value.decode("utf-8", "surrogateescape"))
        elif keyword == b"size":
            length = _size(value, base=10)
            if length is None:
                return None
            known = known._replace(size=length)
        elif keyword.startswith(b"GNU.sparse"):
            known = known._replace(sparse=True)
        at = end
    return known
