"""Decode image files: one set of rules for training, caches, evaluation and the writing of shards.

- EXIF orientation is applied.
- Transparency is composited on white.
- 16-bit grey becomes 8-bit grey; floats are read from 0, black, to 1, white. 32-bit integers, and floats beyond that
  range, are refused, as nothing says what their white is.
- Palettes, CMYK and other colour spaces become RGB. Of an animation, the first frame is decoded.

CLIP_benchmark knows none of this: Pillow's ``convert("RGB")`` alone turns 16-bit grey white and floats black, puts
transparent pixels on the colour that they hide, and leaves pictures lying on their side (`DecodingSettings`).
"""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageChops
from PIL.JpegImagePlugin import JpegImageFile

from clipdistill.settings import Count, Settings

Size = tuple[int, int]
"""Height and width, in pixels."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of training images."""

READABLE_FORMATS = (*FORMATS, "BMP", "GIF", "PPM", "TIFF")
"""Formats of images in test sets, and of those that become training images. None of Pillow's decoders for them runs an
external program, as its EPS reader does."""

MAX_PIXELS = 89_478_485
"""Images of more pixels are refused before they are decoded; Pillow's own limit."""

MAX_SCANS = 100
"""Scans of a JPEG. Progressive ones have about ten; ten bytes add one, which takes 0.1 s for 80 million pixels."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_size(size: int | Sequence[int]) -> Size:
    """Height and width, from these or from the side of a square."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


class TooManyPixelsError(ValueError):
    """The image claims more pixels than allowed; it was not decoded."""


class DecodingSettings(Settings):
    """How the images of a test set are decoded."""

    decoding: Literal["standard", "clip-benchmark"] = "standard"
    """standard: as in training. clip-benchmark: with Pillow's ``convert("RGB")`` alone, to reproduce its figures."""
    max_pixels: Count = MAX_PIXELS
    """An image whose header claims more pixels is not decoded, and counts as wrong."""

    def decode(self, data: bytes) -> tuple[Image.Image, bool]:
        """Decode an encoded image to RGB; returns it, and whether the other way of decoding gives other pixels.

        Raises:
            Exception: as `open_image`, or any that Pillow raises on a broken image.
        """
        image = open_image(data, max_pixels=self.max_pixels, formats=READABLE_FORMATS)
        orientation = read_orientation(image)
        image.load()
        if orientation == 1 and image.mode[0] not in "IF" and not image.has_transparency_data:
            return image.convert("RGB"), False
        standard = _attempt(lambda: to_upright(image, orientation).convert("RGB"))
        benchmark = _attempt(lambda: image.convert("RGB"))
        chosen, other = (standard, benchmark) if self.decoding == "standard" else (benchmark, standard)
        if isinstance(chosen, ValueError):
            raise chosen
        if isinstance(other, ValueError) or chosen.size != other.size:
            return chosen, True
        return chosen, ImageChops.difference(chosen, other).getbbox() is not None


STANDARD_DECODING = DecodingSettings()


def _attempt(convert: Callable[[], Image.Image]) -> Image.Image | ValueError:
    try:
        return convert()
    except ValueError as error:
        return error


def open_image(data: bytes, *, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    """Read the header of an image; its pixels are decoded when they are needed.

    Raises:
        TooManyPixelsError: more than ``max_pixels``.
        ValueError: a JPEG of too many scans.
        Exception: any that Pillow raises on data that are not an image.
    """
    _check_pixels(*_webp_size(data), most=max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise TooManyPixelsError(str(error)) from error
    _check_pixels(image.width, image.height, most=max_pixels)
    if isinstance(image, JpegImageFile):
        _check_scans(image, data)
    return image


def _check_pixels(width: int, height: int, *, most: int) -> None:
    if width * height > most:
        raise TooManyPixelsError(f"{width} x {height} pixels, at most {most:,} are allowed")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP, for which Pillow allocates all pixels when it opens it; else 0, 0.

    https://developers.google.com/speed/webp/docs/riff_container
    """

    def number(start: int, length: int) -> int:
        return int.from_bytes(data[start : start + length], "little")

    if not (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
        return 0, 0
    match data[12:16]:
        case b"VP8X":
            return 1 + number(24, 3), 1 + number(27, 3)
        case b"VP8L":
            return 1 + (number(21, 4) & 0x3FFF), 1 + (number(21, 4) >> 14 & 0x3FFF)
        case b"VP8 ":
            return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF
    return 0, 0


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if missing or unreadable."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # the chunk may follow the pixels
    if "exif" not in image.info and "Raw profile type exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the pixels may still be good
        return 1
    return orientation if orientation in _UPRIGHT else 1


def to_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Decode an image to an upright one of mode L or RGB.

    Raises:
        ValueError: numbers without a known white.
        Exception: any that Pillow raises on a broken image.
    """
    image.load()
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image = _narrow_floats(image)
    elif image.mode.startswith("I"):
        grey = np.asarray(image)
        narrow = (np.clip(grey, 0, 0xFFFF) >> 8).astype(np.uint8)
        if "transparency" in image.info:
            narrow[grey == image.info["transparency"]] = 255
        image = Image.fromarray(narrow)
    elif image.has_transparency_data:
        opaque_mode, mode = ("L", "LA") if image.mode in ("L", "LA", "La") else ("RGB", "RGBA")
        image = image.convert(mode)
        white = Image.new(opaque_mode, image.size, "white")
        white.paste(image.convert(opaque_mode), mask=image.getchannel("A"))
        image = white
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation > 1 else image


def _narrow_floats(image: Image.Image) -> Image.Image:
    if image.mode == "I":
        raise ValueError("32-bit integers; allowed: 8 or 16 bits, or floats from 0 to 1")
    grey = np.asarray(image)
    if not (grey.min(initial=0) >= 0 and grey.max(initial=0) <= 1):
        raise ValueError(f"floats from {grey.min():g} to {grey.max():g}; allowed: floats from 0 to 1")
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


def _check_scans(image: JpegImageFile, data: bytes) -> None:
    """Refuse a JPEG with too many scans. A sequential one whose first scan has all components passes."""
    components = image.layers
    header = b"\xff\xda\x00" + bytes((6 + 2 * components, components))
    first = image.fp.tell() - len(header) - 3 - 2 * components if image.fp else 0
    if "progressive" not in image.info and data.startswith(header, max(first, 0)):
        return
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise ValueError(f"{scans} scans, at most {MAX_SCANS} are allowed")
