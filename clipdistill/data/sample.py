"""Read one sample's members from its shard, and decode image, caption and label. A bad sample gets a reason."""

import functools
import json
import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from torch.utils.data import get_worker_info

from clipdistill.data.class_lists import ClassLists
from clipdistill.data.formats import format_of
from clipdistill.data.image import Augmentation, EncodedView, Pixels, render
from clipdistill.data.index import LazyIndex, OtherShardError, ShardIndex
from clipdistill.data.shard_format import MAX_SAMPLE_BYTES, SHARD_UNREADABLE, BadSampleError, RawSample
from clipdistill.data.workers import note_shard
from clipdistill.errors import InputError
from clipdistill.io.images import MAX_PIXELS, Size, TooManyPixelsError
from clipdistill.io.urls import ShardFile, one_line, shown

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
"""Members that are decoded as images; of several in a sample, the first in this order, which is CLIP_benchmark's. Apart
from images, only text and json are decoded."""

BROKEN_IMAGE = "broken image"
"""Reason of a sample whose image cannot be decoded."""

MAX_TEXT_BYTES = 64 << 10
MAX_JSON_BYTES = 16 << 20
"""Limit of json members: parsing hostile json takes about 20 times its size in memory."""


class DecodedSample(NamedTuple):
    """A decoded sample: uint8 pixels (3, H, W), or a JPEG for the device; no captions, and label -1, if missing."""

    pixels: Pixels | EncodedView
    captions: tuple[str, ...]
    label: int


def find_image(raw: RawSample) -> bytes:
    """A sample's encoded image. That others are not used is logged once, by the first worker.

    Raises:
        BadSampleError: it has none.
    """
    found = [name for name in IMAGE_EXTENSIONS if name in raw.members]
    if not found:
        holds = ", ".join(_shown(name) for name in raw.extensions[:10]) or "nothing"
        raise BadSampleError(
            "no image", f"holds {holds}, none of {', '.join(IMAGE_EXTENSIONS)} (a key ends at the first dot)"
        )
    if len(found) > 1:
        _note_images(tuple(found))
    return raw.members[found[0]]


@functools.cache
def _note_images(found: tuple[str, ...]) -> None:
    worker = get_worker_info()
    if worker is None or worker.id == 0:
        log.warning("samples with several images (%s): %s is used", ", ".join(found), found[0])


class SampleReader:
    """Reads samples shard by shard, with one shard open at a time.

    If a shard fails, its remaining samples are bad, and reading continues with the next shard.
    """

    def __init__(self, index: Sequence[ShardIndex], wanted: frozenset[str]) -> None:
        self._index = index
        self._wanted = wanted
        self._shard: int | None = None
        self._file: ShardFile | None = None
        self._failure: str | None = None

    def read(self, shard: int, sample: int) -> RawSample:
        """Read sample number `sample` of shard number `shard`.

        Raises:
            OtherShardError: The shard is not the expected one.
        """
        raw = RawSample(url="", key=f"sample {sample}")
        try:
            entry = self._entry(shard, raw)
            if sample >= len(entry):
                raise BadSampleError(SHARD_UNREADABLE, f"damage hides it: {entry.problems[-1]}")
            start = int(entry.offsets[sample])
            stop = int(entry.offsets[sample + 1]) if sample + 1 < len(entry) else entry.end
            data = self._read(shard, start, min(stop - start, MAX_SAMPLE_BYTES))
            format_of(entry.url).read_sample(data, self._wanted, raw)
            if sample in entry.repeats:
                raise BadSampleError("duplicate key", "an earlier sample of the shard has it")
        except BadSampleError as fault:
            raw.fault = fault
        return raw

    def close(self) -> None:
        """Close the open shard."""
        if self._file:
            self._file.close()
        self._shard = self._file = self._failure = None

    def _entry(self, shard: int, raw: RawSample) -> ShardIndex:
        """The index of a shard, which becomes the open one."""
        if shard != self._shard:
            self.close()
            self._shard = shard
            note_shard(shard)
        lazy = self._index if isinstance(self._index, LazyIndex) else None
        raw.url = lazy.urls[shard] if lazy else self._index[shard].url
        if lazy and self._failure is not None:
            raise BadSampleError(SHARD_UNREADABLE, self._failure)
        try:
            entry: ShardIndex = self._index[shard]
        except OtherShardError:
            raise
        except InputError as error:  # a lazy index finds out here
            self._failure = str(error)
            raise BadSampleError(SHARD_UNREADABLE, self._failure) from error
        return entry

    def _read(self, shard: int, start: int, size: int) -> bytes:
        url = self._index[shard].url
        if self._failure is None:
            try:
                if self._file is None:
                    lazy = self._index if isinstance(self._index, LazyIndex) else None
                    self._file = lazy.open(shard) if lazy else ShardFile(url, stat=self._index[shard].stat)
                data = self._file.read_at(start, size)
                if len(data) == size:
                    return data
                self._failure = f"the shard ends at byte {start + len(data):,}: it changed since it was indexed"
            except Exception as error:  # every filesystem raises its own errors
                self._failure = one_line(error, url)
        raise BadSampleError(SHARD_UNREADABLE, self._failure)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Required members of a sample, and their decoding."""

    image_size: int | Size
    """Height and width of the pixels, or their side."""
    augmentation: Augmentation | None
    caption_key: str = "txt"
    """`txt`, each line of which is a caption, or a field of the sample's json: a text, or a list of texts."""
    label_key: str = "cls"
    """`cls`, or a field of the sample's json."""
    require_captions: bool = False
    require_labels: bool = False
    class_lists: ClassLists | None = None
    """Classes of the labels; a label that is none of them raises InputError. None: labels are any numbers."""
    max_pixels: int = MAX_PIXELS

    @property
    def on_device(self) -> bool:
        """Whether JPEGs are left encoded, for the device of the models."""
        return self.augmentation is not None and self.augmentation.jpeg_decoder == "device"

    @property
    def wanted(self) -> frozenset[str]:
        """Extensions of the required members."""
        caption = "txt" if self.caption_key == "txt" else "json"
        label = "cls" if self.label_key == "cls" else "json"
        return frozenset({*IMAGE_EXTENSIONS, caption, label})

    def decode(self, raw: RawSample, rng: np.random.Generator) -> DecodedSample:
        """Decode a sample; `rng` draws its augmentation.

        Raises:
            BadSampleError, InputError: as ``decode_views``.
        """
        return self.decode_views(raw, [rng])[0]

    def decode_views(self, raw: RawSample, rngs: Sequence[np.random.Generator]) -> list[DecodedSample]:
        """Decode a sample once, in several views; each of `rngs` draws the augmentation of one.

        Raises:
            BadSampleError: A member is missing or broken.
            InputError: The label is outside the class list: the list does not match the data.
        """
        image, captions, label = self._members(raw)
        try:
            views = render(
                image,
                image_size=self.image_size,
                augmentation=self.augmentation,
                rngs=rngs,
                max_pixels=self.max_pixels,
            )
        except TooManyPixelsError as error:
            raise BadSampleError("too many pixels", str(error)) from error
        except UnidentifiedImageError as error:
            raise BadSampleError(BROKEN_IMAGE, "not a PNG, JPEG or WebP image") from error
        except Exception as error:  # Pillow's decoders raise almost any error on hostile data
            raise BadSampleError(BROKEN_IMAGE, one_line(error)) from error
        return [DecodedSample(pixels, captions, label) for pixels in views]

    def read(self, raw: RawSample, pixels: Pixels) -> DecodedSample:
        """A sample whose pixels are stored: only its caption and label are decoded.

        Raises:
            BadSampleError, InputError: as ``decode``, but for the image.
        """
        _, captions, label = self._members(raw)
        return DecodedSample(pixels, captions, label)

    def _members(self, raw: RawSample) -> tuple[bytes, tuple[str, ...], int]:
        """Encoded image, captions and label."""
        if raw.fault:
            raise raw.fault
        image = find_image(raw)
        try:
            captions = _captions(raw.members, self.caption_key)
        except BadSampleError:
            if self.require_captions:
                raise
            captions = ()
        try:
            label = self.label(raw)
        except BadSampleError:
            if self.require_labels:
                raise
            label = -1
        return image, captions, label

    def has_named_label(self, raw: RawSample) -> bool:
        """Whether the sample's label may be a class name, which only a class list makes a number."""
        try:
            value = _member(raw.members, self.label_key, own="cls")
        except BadSampleError:
            return False
        return _number(value) is None and _name(value) is not None

    def label(self, raw: RawSample) -> int:
        """The class of a sample.

        Raises:
            BadSampleError: it has none, or a damaged one.
            InputError: the label is outside the class list.
        """
        if raw.fault:
            raise raw.fault
        value = _member(raw.members, self.label_key, own="cls")
        if value is None:
            raise BadSampleError("no label")
        number = _number(value)
        name = _name(value) if number is None else None
        if self.class_lists is None and number is not None and 0 <= number < 1 << 63:
            return number
        if self.class_lists is None or (number is None and name is None):
            raise BadSampleError("label not a class number", _shown(value))
        classes = self.class_lists.of(raw.url)
        label = classes.named(name) if name is not None else classes.numbered(number or 0)
        if label is None:
            count = len(classes.names or ())
            raise InputError(
                f"shard {shown(raw.url)}: sample {raw.key!r} has {self.label_key} {str(name or number)[:80]}, "
                f"allowed: 0 to {count - 1} (the class list has {count} names), or one of the names"
            )
        return label


def _captions(members: dict[str, bytes], key: str) -> tuple[str, ...]:
    """All captions of a sample; blank ones do not count."""
    value = _member(members, key, own="txt")
    if value is None or value == []:
        raise BadSampleError("no caption")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | bytes) for each in values):
        raise BadSampleError("caption not text", _shown(value))
    try:
        encoded = [each if isinstance(each, bytes) else each.encode() for each in values]
        size = sum(map(len, encoded))
        if size > MAX_TEXT_BYTES:
            raise BadSampleError("caption too long", f"{size:,} bytes, at most {MAX_TEXT_BYTES:,}")
        texts = [each.decode("utf-8-sig") for each in encoded]
    except UnicodeError as error:
        raise BadSampleError("caption not UTF-8", one_line(error)[:200]) from error
    lines = texts[0].splitlines() if isinstance(value, bytes) else texts
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise BadSampleError("empty caption")
    return captions


def _number(value: Any) -> int | None:
    """A label as a number; None if it is none."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) not in (int, str, bytes):
        return None
    text = value if isinstance(value, bytes) else str(value).encode(errors="replace")
    try:
        return int(text) if text.strip().removeprefix(b"-").isdigit() else None
    except ValueError:  # thousands of digits
        return None


def _name(value: Any) -> str | None:
    """A label as a class name; None if it cannot be one."""
    try:
        text = value.decode("utf-8-sig") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None
    text = str(text).strip() if isinstance(text, str | bool) else ""
    return text if text.isprintable() and any(map(str.isalpha, text)) else None


def _member(members: dict[str, bytes], key: str, *, own: str) -> Any:
    """The content of the member `own`, or the json field `key`; None if missing."""
    if key == own:
        return members.get(own)
    if "json" not in members:
        return None
    size = len(members["json"])
    if size > MAX_JSON_BYTES:
        raise BadSampleError("json too large", f"{size:,} bytes, at most {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken json", one_line(error)[:200]) from error
    return content.get(key) if isinstance(content, dict) else None


def _shown(value: object) -> str:
    return reprlib.repr(value[:80] if isinstance(value, str | bytes) else value)
