"""Hostile shards, and the samples that a reader must still yield from them.

    python scripts/hostile_shards.py --output hostile --shards 100

`make_shard` makes one from a seed. It starts as a good shard: ustar, GNU or pax; PNG, JPEG and WebP; captions and
labels as text or json. Then some of its samples get bad images, captions, labels, names or pickles; members are
swapped, repeated or interleaved; headers are forged; bytes are cut, flipped, inserted or deleted. Each mutation records
which samples it may damage. The expected content of the others is known from their construction, not from reading them
back.
"""

import argparse
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIDE = 12
BLOCK = 512
FORMATS: dict[str, Literal[0, 1, 2]] = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
IMAGES = ("webp", "png", "jpg", "jpeg")
WORDS = ("red fox", "Größe", "café", "猫の写真", "собака", "صورة", "🦊🏳️‍🌈", "2½ km²", "a/b\\c", "<b>", "e\u0301")

KEYS = {
    "plain": "{}",
    "folder": "train/part.1/{}",
    "unicode": "写真/größe {}",
    "abridged alike": "写真",  # followed by the number in characters that ustar's field cannot hold
    "long": "long/" * 25 + "{}",
    "very long": "d" * 90 + "/" + "k" * 120 + "{}",
    "like bzip2": "BZh{}",
}
HOSTILE_KEYS = (
    *("../../{}", "/etc/{}", "C:\\{}", "{}\n\x1b[31m", "{}%s%n", "-rf {}", "pipe:touch {}"),
    *(" {} ", "./{}", "a//{}", "\udcff\udcfe{}", "{}\x01", "{}" + "x" * 10_000),
)

Pixels = NDArray[np.uint8]


class Bad(str):
    """The reason why a part of a sample cannot be used."""


@dataclass(kw_only=True)
class Sample:
    """A sample of a shard, and its expected content."""

    key: str
    members: list[tuple[str, bytes]]
    """Extension and content."""
    image: Pixels | Bad
    """(S, S, 3)."""
    tolerance: int = 0
    caption: str
    """A `Bad` if missing."""
    label: int | Bad
    whole: Bad | None = None
    """Reason why the entire sample cannot be used, regardless of its parts."""

    def replace(self, extensions: tuple[str, ...], content: bytes | None) -> None:
        """Replace the content of the member with one of the extensions; None: remove it."""
        self.members = [
            (name, old if name.lower() not in extensions else content or b"")
            for name, old in self.members
            if name.lower() not in extensions or content is not None
        ]

    def content(self, extensions: tuple[str, ...]) -> bytes:
        """Content of the member with one of the extensions."""
        return next(content for name, content in self.members if name.lower() in extensions)

    def fault(self, *, required: bool) -> Bad | None:
        """Reason why it must be skipped; None: it must be yielded."""
        first = Bad("no image") if isinstance(self.image, Bad) and self.image == "no image" else None
        text = (self.caption, self.label) if required else ()
        return next((part for part in (self.whole, first, *text, self.image) if isinstance(part, Bad)), None)


@dataclass
class Entry:
    """A member to write, and the number of its sample; -1: none."""

    owner: int
    name: str
    content: bytes


@dataclass
class Span:
    """The bytes of a member in the archive: its headers, its content, its padding."""

    owner: int
    start: int
    data: int
    size: int
    end: int

    @property
    def header(self) -> int:
        """Start of the last header, the member's own."""
        return self.data - BLOCK


@dataclass(kw_only=True)
class Shard:
    """A mutated shard, and the expected results of reading it."""

    rng: random.Random
    as_json: bool
    """Whether captions and labels are json fields."""
    required: bool
    """Whether a sample without caption or label is bad."""
    tar_format: str
    samples: list[Sample] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    parts: set[int] = field(default_factory=set)
    """Entries preceded by an end-of-archive mark."""
    spans: list[Span] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    mutations: list[str] = field(default_factory=list)
    touched: set[int] = field(default_factory=set)
    """Samples that may differ or be missing."""
    out_of_reach: set[int] = field(default_factory=set)
    """Samples that may be missing."""
    unmentioned: set[int] = field(default_factory=set)
    """Samples that may be missing silently."""
    spliced: bool = False
    """Whether a member may be a mixture of two."""

    def owners(self, start: float, stop: float) -> set[int]:
        """Samples with a byte from `start` to `stop`."""
        return {span.owner for span in self.spans if span.start < stop and start < span.end} - {-1}

    def around(self, position: int) -> Span | None:
        """The member that contains `position`, but does not start there."""
        return next((span for span in self.spans if span.start < position < span.end), None)


# Good shards


def make_shard(seed: int, number: int) -> Shard:
    """Make shard `number` of a seed."""
    rng = random.Random(f"{seed} {number}")
    shard = Shard(
        rng=rng, as_json=rng.random() < 0.3, required=rng.random() < 0.6, tar_format=rng.choice(list(FORMATS))
    )
    style = rng.choice([name for name in KEYS if shard.tar_format != "ustar" or name != "very long"])
    order = rng.sample(["image", "text", "extra"], 3)
    for position in range(rng.randint(2, 12)):
        own = f"{position:03d}-{rng.randbytes(4).hex()}"
        if style == "abridged alike":
            own = "".join(chr(0x4E00 + ord(character)) for character in own)
        key = KEYS[style].format(own) if "{}" in KEYS[style] else KEYS[style] + own
        shard.samples.append(good_sample(rng, key, order, as_json=shard.as_json))
    pristine = rng.random() < 0.05
    if not pristine and rng.random() < 0.6:
        mutate_contents(shard)
    list_entries(shard)
    if not pristine and rng.random() < 0.2:
        apply(shard, ORDER_MUTATIONS)
    build(shard)
    if not pristine:
        apply(shard, rng.choices([BYTE_MUTATIONS, HEADER_MUTATIONS, FILE_MUTATIONS, {}], [5, 4, 1, 2])[0])
    return shard


def good_sample(rng: random.Random, key: str, order: list[str], *, as_json: bool) -> Sample:
    """A sample whose picture, caption and label no other sample has."""
    extension = rng.choice([*IMAGES, "PNG"])
    image = encode(noise(rng), {"png": "PNG", "webp": "WEBP"}.get(extension.lower(), "JPEG"), lossless=True)
    caption = f"{rng.choice(WORDS)} {rng.choice(WORDS)} {rng.randbytes(5).hex()}"
    label = rng.randrange(1 << 40)
    if as_json:
        text = [("json", json.dumps({"caption": caption, "label": label, "other": [1, {}]}).encode())]
    else:
        text = [("txt", caption.encode()), ("cls", str(label).encode())]
    extra = [("seg.png", b"no image"), ("npy", rng.randbytes(700))] if rng.random() < 0.3 else []
    parts = {"image": [(extension, image)], "text": text, "extra": extra}
    members = [member for part in order for member in parts[part]]
    return Sample(key=key, members=members, image=reference(image), caption=caption, label=label)


def noise(rng: random.Random, side: int = SIDE) -> Image.Image:
    """A picture that no other sample has."""
    return Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def reference(data: bytes) -> Pixels:
    """An image file as decoded by Pillow, (S, S, 3)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST))


def list_entries(shard: Shard) -> None:
    """List the members of all samples, and a few that belong to none."""
    for owner, sample in enumerate(shard.samples):
        if shard.rng.random() < 0.05:
            name = shard.rng.choice(["__meta__", "__index__/x.json", "README", "folder/"])
            shard.entries.append(Entry(-1, name, b""))
        shard.entries += [Entry(owner, f"{sample.key}.{name}", content) for name, content in sample.members]


def build(shard: Shard) -> None:
    """Write the archive."""
    for number, entry in enumerate(shard.entries):
        if number in shard.parts:
            shard.data += bytes(2 * BLOCK)
        header = tar_header(entry.name, len(entry.content), FORMATS[shard.tar_format])
        start, data = len(shard.data), len(shard.data) + len(header)
        shard.data += header + entry.content + bytes(-len(entry.content) % BLOCK)
        shard.spans.append(Span(entry.owner, start, data, len(entry.content), len(shard.data)))
    shard.data += bytes(2 * BLOCK)
    if shard.rng.random() < 0.7:
        shard.data += bytes(-len(shard.data) % 10240)


def tar_header(name: str, size: int, tar_format: Literal[0, 1, 2] = tarfile.USTAR_FORMAT) -> bytes:
    """All header blocks of a member."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
    info.mtime = 1.5  # makes pax write an extension header, like webdataset's writer
    return info.tobuf(tar_format, "utf-8", "surrogateescape")


Mutation = Callable[[Shard], str]


def apply(shard: Shard, mutations: dict[str, Mutation]) -> None:
    """Apply one of the mutations."""
    if mutations:
        name = shard.rng.choice(list(mutations))
        shard.mutations.append(f"{name}: {mutations[name](shard)}")


# Contents


class Bomb:
    """Creates a folder in the working directory when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def mutate_contents(shard: Shard) -> None:
    """Give some samples bad or unusual images, texts or names, or additional members."""
    rng, bomb = shard.rng, pickle.dumps(Bomb())
    for number in rng.sample(range(len(shard.samples)), rng.randint(1, min(4, len(shard.samples)))):
        mutate = rng.choice([mutate_image, mutate_image, mutate_text, mutate_text, mutate_members])
        shard.mutations.append(f"contents: sample {number}: {mutate(shard, number, bomb)}")


def mutate_image(shard: Shard, number: int, bomb: bytes) -> str:
    """Remove the image, or replace it by a bad or unusual one."""
    rng, sample = shard.rng, shard.samples[number]
    good = sample.content(IMAGES)
    images: dict[str, tuple[bytes | None, Bad | None]] = {"missing": (None, Bad("no image"))}
    # The last bytes of an image file are checksums and end marks: without them, the pixels may be complete.
    images["cut"] = images["cut off"] = good[: rng.randrange(len(good) - 24)], Bad("broken image")
    images |= dict(bad_images(rng, good, bomb))
    images |= {kind: (data, None) for kind, data in exotic_images(rng)}
    kind = rng.choice(list(images))
    content, fault = images[kind]
    sample.replace(IMAGES, content)
    sample.image = fault if fault is not None else reference(content or b"")
    sample.tolerance = 2 if "alpha" in kind else 0
    return f"image {kind}"


def bad_images(rng: random.Random, good: bytes, bomb: bytes) -> Iterator[tuple[str, tuple[bytes, Bad]]]:
    """Images that must be refused."""
    image = noise(rng)
    contents = {"empty": b"", "random": rng.randbytes(900), "text": b"404 Not Found", "short": good[:16]}
    contents["pickle"] = bomb
    contents |= {other: encode(image, other) for other in ("GIF", "BMP", "TIFF", "ICO", "PPM")}
    contents["animated GIF"] = encode(image, "GIF", save_all=True, append_images=[noise(rng)])
    progressive = encode(image, "JPEG", progressive=True)[:-2]
    contents["of many scans"] = progressive + 3000 * progressive[progressive.rindex(b"\xff\xda") :] + b"\xff\xd9"
    yield from ((kind, (content, Bad("broken image"))) for kind, content in contents.items())

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND")
    yield "PNG of 30,000 x 30,000", (b"\x89PNG\r\n\x1a\n" + chunks, Bad("too many pixels"))
    jpeg = bytearray(encode(image, "JPEG"))
    size = jpeg.index(b"\xff\xc0") + 5
    jpeg[size : size + 4] = struct.pack(">HH", 30_000, 30_000)
    yield "JPEG of 30,000 x 30,000", (bytes(jpeg), Bad("too many pixels"))
    webp = bytearray(encode(image, "WEBP", save_all=True, append_images=[noise(rng)]))
    size = webp.index(b"VP8X") + 12
    webp[size : size + 6] = 2 * (29_999).to_bytes(3, "little")
    yield "WebP of 30,000 x 30,000", (bytes(webp), Bad("too many pixels"))


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def exotic_images(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Images that must be decoded as by Pillow."""
    image, other = noise(rng), noise(rng)
    grey, alpha, palette = image.convert("L"), other.getchannel(0), image.convert("P")
    transparent = image.copy()
    transparent.putalpha(alpha)
    yield "1 x 1", encode(noise(rng, 1), rng.choice(["PNG", "WEBP"]), lossless=True)
    yield "16 bits", encode(Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) + 99), "PNG")
    yield "CMYK", encode(image.convert("CMYK"), "JPEG")
    yield "grey", encode(grey, rng.choice(["PNG", "JPEG"]))
    yield "one bit", encode(grey.convert("1"), "PNG")
    yield "palette", encode(palette, "PNG")
    yield "palette with alpha", encode(palette, "PNG", transparency=rng.randbytes(200))
    yield "alpha", encode(transparent, rng.choice(["PNG", "WEBP"]), lossless=True, exact=True)
    yield "grey with alpha", encode(Image.merge("LA", [grey, alpha]), "PNG")
    yield "progressive", encode(image, "JPEG", progressive=True)
    yield "animated PNG", encode(image, "PNG", save_all=True, append_images=[other])
    yield "animated WebP", encode(image, "WEBP", save_all=True, append_images=[other], lossless=True)
    yield "of two pictures", encode(image, "MPO", save_all=True, append_images=[other])
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    for kind in ("EXIF", "turned"):
        yield kind, encode(image, rng.choice(["PNG", "JPEG", "WEBP"]), exif=exif, lossless=True)
    yield "broken EXIF", encode(image, "JPEG", exif=b"Exif\0\0MM\0*" + rng.randbytes(60))


def mutate_text(shard: Shard, number: int, bomb: bytes) -> str:
    """Replace the caption, the label, or all of the json."""
    rng, sample = shard.rng, shard.samples[number]
    assert not isinstance(sample.label, Bad)
    part = rng.choice(["caption", "label", "json"] if shard.as_json else ["caption", "label"])
    value: Any
    if part == "json":
        value, caption, label = rng.choice(jsons(bomb))
        sample.caption, sample.label = Bad(caption), Bad(label)
        sample.replace(("json",), value)
        return f"json {value[:30]!r}"
    if part == "caption":
        text = f"{rng.choice(WORDS)} {rng.randbytes(5).hex()}"
        value, sample.caption = rng.choice(json_captions(text) if shard.as_json else text_captions(text, bomb))
    else:
        value, sample.label = rng.choice(json_labels(sample.label) if shard.as_json else text_labels(sample.label))
    if shard.as_json:
        fields = json.loads(sample.content(("json",))) | {part: value}
        fields = {name: value for name, value in fields.items() if value != "gone"}
        sample.replace(("json",), json.dumps(fields).encode())
    else:
        sample.replace(("txt",) if part == "caption" else ("cls",), value)
    return f"{part} {value!r:.60}"


def text_captions(text: str, bomb: bytes) -> list[tuple[bytes | None, str]]:
    """Contents of a txt, and the expected captions."""
    long = text + "y" * (65_536 - len(text.encode()))
    return [
        (None, Bad("no caption")),
        (b"", Bad("empty caption")),
        (b" \r\n\t", Bad("empty caption")),
        (b"long " * 200_000, Bad("caption too long")),
        (long.encode() + b"y", Bad("caption too long")),
        (long.encode(), long),
        (b"caf\xe9 " + text.encode(), Bad("caption not UTF-8")),
        (text.encode("utf-16"), Bad("caption not UTF-8")),
        (bomb, Bad("caption not UTF-8")),
        (text.encode("utf-8-sig"), text),
        (f"\n{text}\0%s\x1b[31m \n".encode(), f"{text}\0%s\x1b[31m"),
    ]


def json_captions(text: str) -> list[tuple[Any, str]]:
    """Values of a json's caption, and the expected captions."""
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    return [
        ("gone", Bad("no caption")),
        (None, Bad("no caption")),
        ("", Bad("empty caption")),
        (" \n", Bad("empty caption")),
        ("long " * 200_000, Bad("caption too long")),
        ("\ud800" + text, Bad("caption not UTF-8")),
        (f"\n{text}\0%s\x1b[31m \n", f"{text}\0%s\x1b[31m"),
        ([], Bad("no caption")),
        (["", f" {text}", " \n"], text),
        *((value, Bad("caption not text")) for value in (5, 1e999, True, [text, 5], {"a": text}, deep)),
    ]


def text_labels(label: int) -> list[tuple[bytes | None, int | Bad]]:
    """Contents of a cls, and the expected labels."""
    bad = (*b"cat 1.0 -1 1_0 0x10 1e3".split(), b"", b"7 7", b"\0", b"\xff", "٣".encode(), b"9" * 5000, b"%d" % 2**63)
    return [
        (None, Bad("no label")),
        (f" {label}\r\n".encode(), label),
        (f"000{label}".encode(), label),
        *((value, Bad("label not a class number")) for value in bad),
    ]


def json_labels(label: int) -> list[tuple[Any, int | Bad]]:
    """Values of a json's label, and the expected labels."""
    bad = ("cat", "", 1.5, -1, "1_0", True, [label], {"label": label}, "٣", "\ud800", 2**63, 10**4000)
    return [
        ("gone", Bad("no label")),
        (None, Bad("no label")),
        (f" {label}\n", label),
        (float(label), label),
        *((value, Bad("label not a class number")) for value in bad),
    ]


def jsons(bomb: bytes) -> list[tuple[bytes, str, str]]:
    """Contents of a json, and the reasons why each has no caption and no label."""
    deep, large = (b"[" * 100_000, b'{"caption":' * 100_000), b'{"label": ' + b"9" * 5000 + b"}"
    broken = (b"", b"{", *deep, large, b'{"caption": "\xe9"}', bomb)
    return [
        *((content, "broken json", "broken json") for content in broken),
        (b"[" + b"0," * (9 << 20) + b"0]", "json too large", "json too large"),
        (b"[1]", "no caption", "no label"),
        (b"null", "no caption", "no label"),
    ]


def mutate_members(shard: Shard, number: int, bomb: bytes) -> str:
    """Add members, or give the sample another key."""
    rng, sample = shard.rng, shard.samples[number]
    kind = rng.choice(["twice", "other case", "pickles", "second image", "key", "key", "no key"])
    extension, content = rng.choice(sample.members)
    if kind in ("twice", "other case"):
        sample.members.append((extension if kind == "twice" else extension.swapcase(), content))
        sample.whole = Bad("duplicate member")
    elif kind == "pickles":
        sample.members += [(name, bomb) for name in ("pyd", "pkl", "pickle", "pth", "pt", "ten", "npz", "mp", "cbor")]
        rng.shuffle(sample.members)
    elif kind == "second image":
        taken = [name.lower() for name, _ in sample.members]
        data = encode(noise(rng), "PNG")
        sample.members.append((rng.choice([name for name in IMAGES if name not in taken]), data))
        sample.image = reference(min((IMAGES.index(n.lower()), c) for n, c in sample.members if n.lower() in IMAGES)[1])
    elif kind == "key":
        sample.key = rng.choice(HOSTILE_KEYS[: -1 if shard.tar_format == "ustar" else None]).format(sample.key)
        return f"key {sample.key[:40]!r}"
    else:
        sample.key = rng.choice(["__meta__/x", "folder/", "", "..\\..\\x"])
        shard.out_of_reach.add(number)
        shard.unmentioned.add(number)
    return kind


# Order


def swap_members(shard: Shard) -> str:
    """Swap two members of different samples."""
    one, other = shard.rng.sample(range(len(shard.samples)), 2)
    here = shard.rng.choice([at for at, entry in enumerate(shard.entries) if entry.owner == one])
    there = shard.rng.choice([at for at, entry in enumerate(shard.entries) if entry.owner == other])
    shard.entries[here], shard.entries[there] = shard.entries[there], shard.entries[here]
    shard.touched |= {one, other}
    return f"{shard.entries[here].name!r:.60} of {other} and {shard.entries[there].name!r:.60} of {one}"


def interleave(shard: Shard) -> str:
    """Interleave the members of two samples."""
    one, other = shard.rng.sample(range(len(shard.samples)), 2)
    first = [entry for entry in shard.entries if entry.owner == one]
    second = [entry for entry in shard.entries if entry.owner == other]
    rest = [entry for entry in shard.entries if entry.owner not in (one, other)]
    mixed = sorted([*enumerate(first), *enumerate(second)], key=lambda numbered: numbered[0])
    shard.entries = rest + [entry for _, entry in mixed]
    shard.touched |= {one, other}
    return f"{one} and {other}"


def repeat_at_once(shard: Shard) -> str:
    """Write a sample twice in succession."""
    owner = shard.rng.randrange(len(shard.samples))
    copies = [entry for entry in shard.entries if entry.owner == owner]
    end = shard.entries.index(copies[-1]) + 1
    shard.entries[end:end] = copies
    shard.samples[owner].whole = Bad("duplicate member")
    return str(owner)


def repeat_later(shard: Shard) -> str:
    """Repeat a key after other samples, with its own members or with another sample's."""
    owner, content_of = shard.rng.choices(range(len(shard.samples)), k=2)
    later = set(range(owner + 1, len(shard.samples))) - shard.out_of_reach
    if not later or owner in shard.out_of_reach or shard.samples[owner].fault(required=shard.required):
        return "none"
    key = shard.samples[owner].key
    shard.entries += [Entry(owner, f"{key}.{name}", content) for name, content in shard.samples[content_of].members]
    return f"{owner} with the members of {content_of}"


def shuffle_samples(shard: Shard) -> str:
    """Shuffle the samples, and the members of each sample."""
    blocks = [[entry for entry in shard.entries if entry.owner == owner] for owner in range(len(shard.samples))]
    shard.rng.shuffle(blocks)
    for block in blocks:
        shard.rng.shuffle(block)
    shard.entries = [entry for block in blocks for entry in block]
    return "all"


def concatenate(shard: Shard) -> str:
    """Concatenate several archives in one file."""
    shard.parts = set(shard.rng.sample(range(1, len(shard.entries)), min(2, len(shard.entries) - 1)))
    for number in shard.parts:
        shard.touched |= {shard.entries[number].owner} & {shard.entries[number - 1].owner} - {-1}
    return f"before members {sorted(shard.parts)}"


def concatenate_alike(shard: Shard) -> str:
    """Concatenate two archives: one ends with a sample's picture, the other starts with another's text, same key."""
    first = shard.rng.randrange(len(shard.samples) - 1)
    key = shard.samples[first].key
    upper = [entry for entry in shard.entries if entry.owner < first]
    lower = [entry for entry in shard.entries if entry.owner > first + 1]
    extensions = [name for name, _ in shard.samples[first].members if name.lower() in IMAGES]
    pictures = [Entry(first, f"{key}.{name}", shard.samples[first].content((name.lower(),))) for name in extensions]
    texts = [(name, content) for name, content in shard.samples[first + 1].members if name in ("txt", "cls", "json")]
    shard.parts = {len(upper) + len(pictures)}
    shard.entries = upper + pictures + [Entry(first + 1, f"{key}.{name}", text) for name, text in texts] + lower
    shard.touched |= {first, first + 1}
    shard.unmentioned.add(first + 1)
    return f"{first} and {first + 1}"


ORDER_MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        *(swap_members, interleave, repeat_at_once, repeat_later),
        *(shuffle_samples, concatenate, concatenate_alike),
    )
}


# Bytes


def put(shard: Shard, start: int, stop: int, new: bytes, *, copied: tuple[int, int] | None = None) -> set[int]:
    """Replace the bytes from `start` to `stop`; record, and return, which samples that may damage.

    A member that begins before `start` still claims the same number of bytes, and so may swallow others after `stop`;
    so may one whose header is the last among the bytes `copied`.
    """
    touched = shard.owners(start, stop) | shard.owners(start - 1, start) & shard.owners(stop, stop + 1)
    claims = 0
    if before := shard.around(start):
        touched |= {before.owner} - {-1}
        claims = before.end - start - len(new)
    if copied:
        touched |= shard.owners(*copied)
        last = shard.around(copied[1])
        claims = max(claims, last.end - copied[1] if last else 0)
    if claims > 0:
        touched |= shard.owners(stop, stop + claims)
    shard.touched |= touched
    shard.spliced |= copied is not None or stop - start > len(new)
    if (len(new) - (stop - start)) % BLOCK:
        shard.out_of_reach |= shard.owners(stop, len(shard.data))
    shard.data[start:stop] = new
    return touched


def place(shard: Shard) -> int:
    """A random position in the archive: anywhere, on the grid, or at the start of a member."""
    anywhere = shard.rng.randrange(len(shard.data))
    return shard.rng.choice([anywhere, anywhere // BLOCK * BLOCK, shard.rng.choice(shard.spans).start])


def length(shard: Shard) -> int:
    """A random number of bytes, often a multiple of the block size."""
    some = shard.rng.randint(1, shard.rng.choice([20, 600, 6000, 60_000]))
    return shard.rng.choice([some, -(-some // BLOCK) * BLOCK])


def junk(shard: Shard, size: int) -> bytes:
    """Bytes that are not a tar header."""
    noise = shard.rng.randbytes(size)
    return shard.rng.choice([noise, bytes(size), bytes(BLOCK) + noise, b"\xff" * size, b"junk\n" * size])[:size]


def truncate(shard: Shard) -> str:
    """Truncate the archive."""
    at = place(shard)
    gone = {span.owner for span in shard.spans if span.data + span.size > at} - {-1}
    shard.touched |= gone
    if not any(span.start < at and at - BLOCK < span.end for span in shard.spans):
        shard.unmentioned |= gone  # it ends with an end-of-archive mark
    del shard.data[at:]
    return f"at {at}"


def flip(shard: Shard) -> str:
    """Change single bytes."""
    places = [place(shard) for _ in range(shard.rng.randint(1, 8))]
    for at in places:
        shard.touched |= shard.owners(at, at + 1)
        shard.data[at] ^= shard.rng.choice([1 << shard.rng.randrange(8), shard.rng.randint(1, 255)])
    return str(places)


def overwrite(shard: Shard) -> str:
    """Overwrite some bytes with junk."""
    start = place(shard)
    stop = min(start + length(shard), len(shard.data))
    gone = shard.owners(start, stop)
    put(shard, start, stop, junk(shard, stop - start))
    if not any(shard.data[start:]):
        shard.unmentioned |= gone  # it ends with an end-of-archive mark
    return f"{start} to {stop}"


def insert(shard: Shard) -> str:
    """Insert junk."""
    at, size = place(shard), length(shard)
    put(shard, at, at, junk(shard, size))
    return f"{size} at {at}"


def delete(shard: Shard) -> str:
    """Delete bytes."""
    start = place(shard)
    stop = min(start + length(shard), len(shard.data))
    shard.unmentioned |= put(shard, start, stop, b"")
    return f"{start} to {stop}"


def duplicate(shard: Shard) -> str:
    """Insert, or overwrite with, bytes copied from another position."""
    source = place(shard)
    copy = bytes(shard.data[source : source + length(shard)])
    at = place(shard)
    stop = min(at + shard.rng.choice([0, len(copy)]), len(shard.data))
    touched = put(shard, at, stop, copy, copied=(source, source + len(copy)))
    shard.unmentioned |= touched if stop > at else set()
    return f"{len(copy)} of {source} at {at} to {stop}"


def overwrite_first_headers(shard: Shard) -> str:
    """Overwrite the first headers of two adjacent members, possibly long-name headers, with junk."""
    first = shard.rng.randrange(len(shard.spans) - 1)
    for span in shard.spans[first : first + 2]:
        put(shard, span.start, span.start + BLOCK, junk(shard, BLOCK))
    return f"of members {first} and {first + 1}"


BYTE_MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (truncate, flip, overwrite, overwrite_first_headers, insert, delete, duplicate)
}


# Headers


def forge(data: bytearray, header: int, start: int, value: bytes, *, checksum: bytes = b"%06o\0 ") -> None:
    """Write a field of the tar header at byte `header`, with a valid checksum."""
    block = data[header : header + BLOCK]
    block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = checksum % sum(block)
    data[header : header + BLOCK] = block


def some_span(shard: Shard) -> Span:
    """A member of a sample. If it is the sample's only one, no trace of the sample may remain."""
    span = shard.rng.choice([span for span in shard.spans if span.owner >= 0])
    if sum(other.owner == span.owner for other in shard.spans) == 1:
        shard.unmentioned.add(span.owner)
    return span


def forge_size(shard: Shard) -> str:
    """Forge the size of a member: another one, one larger than the archive, or none."""
    span, left = some_span(shard), len(shard.data)
    base_256 = [b"\x80" + value.to_bytes(11, "big") for value in (left, 2**62, 2**80, 2**88 - 1)]
    wrong = [b"\xff" * 12, b"-0000000001\0", b"0x0000000a\0", b"99999999999\0", b"1 2 3 4 5 6 ", b"77777777777\0"]
    value = shard.rng.choice([*base_256, *wrong, b"smaller", b"larger", b"larger"])
    shard.touched.add(span.owner)
    if len(value) < 12:
        size = shard.rng.randrange(span.size + 1) if value == b"smaller" else span.size + shard.rng.randint(1, 6000)
        value = b"%011o\0" % size
        swallowed = shard.owners(span.start, span.data + -(-size // BLOCK) * BLOCK)
        if span.data + size <= left:
            shard.touched |= swallowed
            shard.unmentioned |= swallowed
    forge(shard.data, span.header, 124, value)
    return f"{value!r} instead of {span.size} at {span.start}"


def forge_all_sizes(shard: Shard) -> str:
    """Forge the sizes of all members of a sample, or all but the first, to be larger than the archive."""
    owner = some_span(shard).owner
    for span in [span for span in shard.spans if span.owner == owner][shard.rng.randrange(2) :]:
        forge(shard.data, span.header, 124, b"77777777777\0")
    shard.touched.add(owner)
    return f"of sample {owner}"


def forge_type(shard: Shard) -> str:
    """Change the type of a member to link, device, folder, sparse file, extension header, or an unknown one."""
    span = some_span(shard)
    kind = shard.rng.choice([bytes([kind]) for kind in b"123456DLKMNSVXAxg\x01\xff7\0"])
    if kind not in (b"7", b"\0"):
        shard.touched.add(span.owner)
    if kind in (b"L", b"x"):
        shard.touched |= shard.owners(span.end, span.end + 1)
        shard.unmentioned |= shard.owners(span.start, span.end + 1)  # two members fewer, perhaps the only ones
    forge(shard.data, span.header, 156, kind)
    return f"{kind!r} at {span.start}"


def forge_name(shard: Shard) -> str:
    """Give a member a hostile name, or that of another member."""
    span, other = some_span(shard), shard.rng.choice(shard.entries)
    names = [b"../../x.png", b"/etc/passwd.png", b"", b"\0.png", b"\xff\xfe.png", b"x", b".png", b"__x__/y.png", b"a/"]
    name = shard.rng.choice([*names, b"n" * 100, other.name.encode("utf-8", "surrogateescape")[:100]])
    shard.touched |= {span.owner, other.owner} - {-1}
    shard.spliced = True
    forge(shard.data, span.header, 0, name.ljust(100, b"\0"))
    return f"{name!r} at {span.start}"


def forge_checksum(shard: Shard) -> str:
    """Write a wrong checksum, or a valid one in another format."""
    span = some_span(shard)
    checksum = shard.rng.choice([b"%08o", b"%07o\0", b"%6o\0 ", b"%07o ", b"%06o  ", b"zeros", b"other"])
    if checksum in (b"zeros", b"other"):
        shard.touched.add(span.owner)
        value = bytes(8) if checksum == b"zeros" else b"%06o\0 " % shard.rng.randrange(1000)
        shard.data[span.header + 148 : span.header + 156] = value
    else:
        forge(shard.data, span.header, 0, b"", checksum=checksum)
    return f"{checksum!r} at {span.start}"


def forge_the_rest(shard: Shard) -> str:
    """Write junk to the fields that the reader does not use."""
    span = some_span(shard)
    start, stop = shard.rng.choice([(100, 108), (108, 116), (116, 124), (136, 148), (157, 257), (265, 297), (329, 345)])
    forge(shard.data, span.header, start, junk(shard, stop - start))
    return f"{start} to {stop} at {span.start}"


def insert_extension(shard: Shard) -> str:
    """Insert a hostile extension header before a member."""
    span = some_span(shard)
    shard.touched.add(span.owner)
    fields = [b"size=1e99", b"size=100", b"size=", b"size=\xff", b"size=" + b"9" * 20, b"size=" + b"9" * 5000]
    fields += [b"path=../../x.png", b"path=", b"path=\xff\0.png", b"path=" + b"n" * 10_000, b"GNU.sparse.major=1"]
    broken = [b"", b"junk", b"0 a=\n", b"-5 a=\n", b"99999999999 path=x\n", b"2 " * 30_000, b"9" * 60_000]
    pax = [*map(pax_record, fields), *broken, pax_record(b"a=") * 12_000]
    long = [b"", b"\0", b"../../" * 1700 + b"x.png\0", b"/etc/x.png", b"\xff.png\0", b"n" * 10_000]
    kind, content = shard.rng.choice([(b"x", content) for content in pax] + [(b"L", content) for content in long])
    extension = extension_header(kind, content)
    size = shard.rng.choice([None, None, b"%011o\0" % 70_000, b"77777777777\0"])
    if size:
        forge(extension, 0, 124, size)
    shard.data[span.start : span.start] = extension
    return f"{kind!r} {content[:30]!r} of size {size!r} at {span.start}"


def extension_header(kind: bytes, content: bytes) -> bytearray:
    """An extension header of kind x, g or L, with its content."""
    header = bytearray(tar_header("././@LongLink", len(content)))
    forge(header, 0, 156, kind)
    return header + content + bytes(-len(content) % BLOCK)


def pax_record(field: bytes) -> bytes:
    """A field of a pax header, prefixed with its length."""
    length = len(field) + 2
    while length != len(field) + 2 + len(str(length)):
        length = len(field) + 2 + len(str(length))
    return b"%d %s\n" % (length, field)


HEADER_MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        *(forge_size, forge_all_sizes, forge_type, forge_name),
        *(forge_checksum, forge_the_rest, insert_extension),
    )
}


# Whole files


def compress(shard: Shard) -> str:
    """Compress the archive."""
    shard.touched |= set(range(len(shard.samples)))
    method = shard.rng.choice([gzip, bz2, lzma])
    shard.data = bytearray(method.compress(shard.data))
    return method.__name__


def no_archive(shard: Shard) -> str:
    """Replace the archive by a file of another format."""
    shard.touched |= set(range(len(shard.samples)))
    contents = [b"", b"<html>404</html>", b"\n" * 9999, bytes(99_999), shard.rng.randbytes(9999)]
    shard.data = bytearray(shard.rng.choice(contents))
    return repr(bytes(shard.data[:20]))


def nest(shard: Shard) -> str:
    """Make the archive a member of another one."""
    everything = set(range(len(shard.samples)))
    shard.out_of_reach |= everything
    shard.unmentioned |= everything
    header = tar_header("inner.tar", len(shard.data))
    shard.data = bytearray(header + shard.data + bytes(-len(shard.data) % BLOCK + 2 * BLOCK))
    return "all"


def put_before(shard: Shard) -> str:
    """Insert bytes before the first member."""
    comment = bytes(extension_header(b"g", pax_record(b"comment=" + b"0" * 40)))  # as written by git archive
    before = shard.rng.choice([comment, junk(shard, length(shard)), bytes(BLOCK)])
    put(shard, 0, 0, before)
    return f"{len(before)} bytes"


def put_behind(shard: Shard) -> str:
    """Append zeros or junk to the archive."""
    behind = shard.rng.choice([bytes(100_000), junk(shard, length(shard))])
    shard.data += behind
    return f"{len(behind)} bytes"


def take_the_end(shard: Shard) -> str:
    """Remove the end-of-archive mark."""
    del shard.data[shard.spans[-1].end :]
    return ""


FILE_MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation for mutation in (compress, no_archive, nest, put_before, put_behind, take_the_end)
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write shards to a folder, for testing a reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--shards", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.output.exists():
        parser.error(f"--output {args.output}: exists; allowed: a new folder")
    args.output.mkdir(parents=True)
    for number in range(args.shards):
        shard = make_shard(args.seed, number)
        (args.output / f"{number:05d}.tar").write_bytes(shard.data)
        print(f"{number:05d}.tar: {'; '.join(shard.mutations) or 'good'}")


if __name__ == "__main__":
    main()
