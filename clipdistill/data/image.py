"""Decode an image and augment it into a training view.

The source is resampled once: a crop is resized with antialiasing, as CLIP's preprocessing does; rotation, shift,
shear and stretch are one affine map, applied to a source that was first reduced by an integer factor. Grey images
stay in one channel until the end.

Shapes: H, W height and width of the view; C channels, 1 (then left out) or 3.
"""

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from pydantic import ValidationInfo, field_validator, model_validator

from clipdistill.io.images import FORMATS, Size, as_size, open_image, read_orientation, to_upright
from clipdistill.settings import Fraction, NonNegative, Settings

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, width and height, in pixels."""

_DECODERS = {"simplejpeg": ("simplejpeg", "fast"), "device": ("torchcodec", "gpu-jpeg")}
"""Package that a JPEG decoder is, and the extra that installs it."""

_START_OF_SCAN = b"\xff\xda"

_DEVICE_PIXELS = 1 << 24
"""JPEGs of more pixels are not decoded on the device: Pillow decodes them downscaled."""

_DRAWS = (
    *("crop_scale", "crop_ratio", "crop_x", "crop_y", "flip", "rotate", "translate_x", "translate_y", "zoom"),
    *("shear", "stretch", "brightness", "contrast", "saturation"),
    *("stroke", "stroke_side", "stroke_strength", "outline"),
)
"""One uniform number each, drawn whether used or not: enabling one augmentation does not change the draws of
the others."""


class Augmentation(Settings):
    """Random changes of a training image. The defaults are CLIP's: a random crop of nearly everything.

    Where a rotated or shifted view extends beyond the image, it has the median colour of the image's corners.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the crop's share of the image area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's aspect ratio (log-uniform), relative to the view's, as far as the crop fits."""
    flip: Fraction = 0.0
    """Probability of a left-right flip (captions may say "left": off by default)."""
    rotate: NonNegative = 0.0
    """Largest rotation, degrees, either way."""
    translate: NonNegative = 0.0
    """Largest shift in x and in y, as a share of the width and height, either way."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the magnification of the content."""
    shear: NonNegative = 0.0
    """Largest shear, degrees, either way."""
    stretch: NonNegative = 0.0
    """Largest relative change of the aspect ratio, either way (0.25: from 4:5 to 5:4)."""
    brightness: NonNegative = 0.0
    """Largest relative change of brightness, either way."""
    contrast: NonNegative = 0.0
    """Largest relative change of contrast, either way."""
    saturation: NonNegative = 0.0
    """Largest relative change of saturation, either way."""
    stroke: Fraction = 0.0
    """Probability that lines grow or shrink by up to a pixel on each side (for line drawings)."""
    outline: Fraction = 0.0
    """Probability that filled shapes become outlines: the morphological gradient (for line drawings)."""
    jpeg_decoder: Literal["pillow", "simplejpeg", "device"] = "pillow"
    """Decoder of JPEGs. simplejpeg (``pip install 'clipdistill[fast]'``): faster. device: the training process decodes
    them on its GPU with torchcodec (``pip install 'clipdistill[gpu-jpeg]'``), and the data workers only read them; with
    crops and flips alone. The pixels of both differ a little from Pillow's, which evaluation always uses."""

    @field_validator("crop_scale", "crop_ratio", "zoom")
    @classmethod
    def _is_a_range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        most = 1 if info.field_name == "crop_scale" else math.inf
        if not 0 < value[0] <= value[1] <= most:
            raise ValueError(f"[low, high] with 0 < low <= high{' <= 1' if most == 1 else ''}")
        return value

    @field_validator("jpeg_decoder")
    @classmethod
    def _decoder_is_there(cls, value: str) -> str:
        package, extra = _DECODERS.get(value, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"pillow, or pip install 'clipdistill[{extra}]', as {package} is missing")
        return value

    @model_validator(mode="after")
    def _device_can_do_it(self) -> "Augmentation":
        others = ("brightness", "contrast", "saturation", "stroke", "outline")
        if self.jpeg_decoder == "device" and (self.is_affine or any(getattr(self, name) for name in others)):
            raise ValueError("crop_scale, crop_ratio and flip alone, with jpeg_decoder device")
        return self

    @property
    def is_affine(self) -> bool:
        """Whether the geometric augmentation goes beyond a crop and a flip."""
        return self.zoom != (1.0, 1.0) or any((self.rotate, self.translate, self.shear, self.stretch))


class EncodedView(NamedTuple):
    """A view of a JPEG that is not decoded yet."""

    data: bytes
    orientation: int
    """EXIF orientation, 1 to 8."""
    box: Box
    """The crop, of the upright image."""
    flip: bool
    pixels: int
    """Of the image."""

    def decode(self, size: Size) -> Pixels:
        """The view (3, H, W), decoded by Pillow.

        Raises:
            Exception: any that Pillow raises on a broken image.
        """
        image = open_image(self.data, max_pixels=_DEVICE_PIXELS, formats=FORMATS)
        pixels = np.asarray(_resize(to_upright(image, self.orientation), self.box, size))
        return _channels_first(pixels[:, ::-1] if self.flip else pixels)


def render(
    data: bytes,
    *,
    image_size: int | Size,
    augmentation: Augmentation | None,
    rngs: Sequence[np.random.Generator],
    max_pixels: int,
) -> list[Pixels | EncodedView]:
    """Decode an image once, and make views of it.

    PNG, JPEG and WebP are decoded, whatever their name, as `clipdistill.io.images` describes.

    Args:
        data: The encoded image.
        image_size: Height and width of a view, or its side if it is square, in pixels.
        augmentation: Ranges of the random changes. None: no changes; the largest central crop of the view's aspect
            ratio, as in zero-shot evaluation.
        rngs: For each view, the source of its random numbers; each view draws the same number of them.
        max_pixels: Images whose header claims more are refused before decoding.

    Returns:
        uint8 arrays (3, H, W), RGB; read-only where the image is grey. With ``jpeg_decoder`` device, JPEGs that a GPU
        can decode are left encoded.

    Raises:
        TooManyPixelsError: More than `max_pixels`.
        Exception: Any that Pillow raises on data that are not an image, or a broken one.
    """
    size = as_size(image_size)
    aspect = size[1] / size[0]
    source = _Source(data, max_pixels=max_pixels)
    width, height = source.size
    if augmentation is None:
        across, down = min(float(width), height * aspect), min(float(height), width / aspect)
        box = ((width - across) / 2, (height - down) / 2, across, down)
        view = _resize(source.decode(1.0, fast=False), box, size)
        return [_channels_first(np.asarray(view))] * len(rngs)
    if augmentation.jpeg_decoder == "device" and source.suits_the_device:
        return [_encoded_view(source, aspect, augmentation, rng) for rng in rngs]
    return [_view(source, size, augmentation, rng) for rng in rngs]


class _Source:
    """An encoded image, decoded once for each scale at which its views need it.

    Attributes:
        size: width and height of the upright image.
        orientation: EXIF orientation, 1 to 8.
        suits_the_device: whether it is a JPEG that nvJPEG decodes to the colours that Pillow gives.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        self._data = data
        self._max_pixels = max_pixels
        image = self._open()
        self.suits_the_device = _suits_the_device(image, data)
        self._unread: Image.Image | None = image
        self.orientation = read_orientation(image)
        self._stored_size = image.size
        self._is_jpeg = isinstance(image, JpegImageFile)
        self._is_plain = self._is_jpeg and image.mode in ("L", "RGB")
        self.size = image.size[::-1] if self.orientation >= 5 else image.size
        self._decoded: dict[object, Image.Image] = {}

    def decode(self, step: float, *, fast: bool) -> Image.Image:
        """The upright image; a JPEG perhaps smaller, if a pixel of the view covers ``step`` of its pixels or more."""
        least: Size | None = None  # width and height below which the decoder must not go
        if self._is_jpeg and step >= 2:
            least = math.ceil(self._stored_size[0] / step), math.ceil(self._stored_size[1] / step)
        fast = fast and self._is_plain
        scale = least if fast else self._draft_scale(least)
        if scale not in self._decoded:
            image, self._unread = self._unread or self._open(), None
            if fast:
                image = _decode_fast(image.mode, self._data, least or (0, 0))
            elif least is not None:
                image.draft(None, least)
            self._decoded[scale] = to_upright(image, self.orientation)
        return self._decoded[scale]

    @functools.cached_property
    def data_without_exif(self) -> bytes:
        """The file of a JPEG without its orientation, which some decoders apply and some do not."""
        kept, at = [self._data[:2]], 2
        while (marker := self._data[at : at + 2])[:1] == b"\xff" and marker != _START_OF_SCAN:
            is_fill = marker == b"\xff\xff"
            end = at + 1 if is_fill else at + 2 + int.from_bytes(self._data[at + 2 : at + 4], "big")
            if self._data[at + 4 : at + 8] != b"Exif":
                kept.append(self._data[at:end])
            at = end
        return b"".join([*kept, self._data[at:]])

    def _draft_scale(self, least: Size | None) -> int:
        """Factor by which Pillow's JPEG decoder downscales."""
        if least is None:
            return 1
        most = min(self._stored_size[0] // least[0], self._stored_size[1] // least[1])
        return next(scale for scale in (8, 4, 2, 1) if scale <= most)

    def _open(self) -> Image.Image:
        return open_image(self._data, max_pixels=self._max_pixels, formats=FORMATS)


def _suits_the_device(image: Image.Image, data: bytes) -> bool:
    """Whether an opened image is a JPEG that is not too large, has grey or YCbCr components, and its end."""
    if not isinstance(image, JpegImageFile) or image.width * image.height > _DEVICE_PIXELS:
        return False
    components = [component[0] for component in image.layer]
    is_ycbcr = image.mode == "RGB" and components in ([1, 2, 3], [0, 1, 2])
    is_ycbcr = is_ycbcr and image.info.get("adobe_transform", 1) == 1
    scan = image.fp.tell() if image.fp else 0
    return (image.mode == "L" or is_ycbcr) and data.rfind(b"\xff\xd9") >= scan


def _draw(rng: np.random.Generator) -> dict[str, float]:
    return dict(zip(_DRAWS, rng.random(len(_DRAWS)).tolist(), strict=True))


def _encoded_view(source: _Source, aspect: float, augmentation: Augmentation, rng: np.random.Generator) -> EncodedView:
    """A random view, left encoded."""
    draw = _draw(rng)
    box = _crop_box(*source.size, aspect, augmentation, draw)
    data = source.data_without_exif
    return EncodedView(data, source.orientation, box, draw["flip"] < augmentation.flip, math.prod(source.size))


def _view(source: _Source, size: Size, augmentation: Augmentation, rng: np.random.Generator) -> Pixels:
    """A random view."""
    width, height = source.size
    aspect = size[1] / size[0]
    draw = _draw(rng)
    box = _crop_box(width, height, aspect, augmentation, draw)
    if augmentation.is_affine:
        matrix = _affine(box, size, augmentation, draw)
        step = min(math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4]))
    else:
        step = min(box[2] / size[1], box[3] / size[0])
    upright = source.decode(step, fast=augmentation.jpeg_decoder == "simplejpeg")
    scale_x, scale_y = upright.width / width, upright.height / height
    background = _background(upright)
    if augmentation.is_affine:
        matrix = [scale_x * value for value in matrix[:3]] + [scale_y * value for value in matrix[3:]]
        view = _transform(upright, matrix, size, background, step * min(scale_x, scale_y))
    else:
        box = (box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y)
        view = _resize(upright, box, size)
    pixels = np.asarray(view)
    if draw["flip"] < augmentation.flip:
        pixels = pixels[:, ::-1]
    pixels = _redraw_lines(pixels, augmentation, draw, on_white=sum(background) > 127 * len(background))
    return _channels_first(_colour_jitter(pixels, augmentation, draw))


def _decode_fast(mode: str, data: bytes, least: Size) -> Image.Image:
    """Decode a JPEG, downscaled by 2, 4 or 8 as far as ``least`` allows, with libjpeg-turbo's fastest paths."""
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="GRAY" if mode == "L" else "RGB",
        fastdct=True,
        fastupsample=True,
        min_height=least[1],
        min_width=least[0],
    )
    return Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels)


def _crop_box(width: int, height: int, aspect: float, augmentation: Augmentation, draw: dict[str, float]) -> Box:
    """A random box inside the image: area first, then a ratio that fits."""
    area = width * height * _between(*augmentation.crop_scale, draw["crop_scale"])
    low, high = (min(max(ratio * aspect, area / height**2), width**2 / area) for ratio in augmentation.crop_ratio)
    ratio = math.exp(_between(math.log(low), math.log(high), draw["crop_ratio"]))
    crop_width = min(math.sqrt(area * ratio), width)
    crop_height = min(math.sqrt(area / ratio), height)
    return (
        draw["crop_x"] * (width - crop_width),
        draw["crop_y"] * (height - crop_height),
        crop_width,
        crop_height,
    )


def _affine(box: Box, size: Size, augmentation: Augmentation, draw: dict[str, float]) -> list[float]:
    """The affine map (a, b, c, d, e, f) from pixels of the view to pixels of the source: x = a * u + b * v + c,
    y = d * u + e * v + f."""
    angle = math.radians(augmentation.rotate) * _either_way(draw["rotate"])
    shear = math.tan(math.radians(augmentation.shear) * _either_way(draw["shear"]))
    zoom = _between(*augmentation.zoom, draw["zoom"])
    stretch = math.exp(math.log1p(augmentation.stretch) * _either_way(draw["stretch"]) / 2)
    shift_x = size[1] * (0.5 + augmentation.translate * _either_way(draw["translate_x"]))
    shift_y = size[0] * (0.5 + augmentation.translate * _either_way(draw["translate_y"]))
    left, top, width, height = box
    cos, sin = math.cos(angle), math.sin(angle)
    # The inverse of rotation x shear x zoom and stretch, from the view's pixels to the crop's.
    across = width / (size[1] * zoom * stretch)
    down = height * stretch / (size[0] * zoom)
    a, b = across * (cos + shear * sin), across * (sin - shear * cos)
    d, e = -down * sin, down * cos
    c = left + width / 2 - a * shift_x - b * shift_y
    f = top + height / 2 - d * shift_x - e * shift_y
    return [a, b, c, d, e, f]


def _transform(
    image: Image.Image, matrix: list[float], size: Size, background: tuple[int, ...], step: float
) -> Image.Image:
    factor = int(step)
    if factor >= 2:
        image = image.reduce(factor)
        matrix = [value / factor for value in matrix]
    fill: Any = background if len(background) > 1 else background[0]
    return image.transform(
        size[::-1], Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )


def _resize(image: Image.Image, box: Box, size: Size) -> Image.Image:
    left, top, width, height = box
    inside = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(size[::-1], Image.Resampling.BICUBIC, box=inside, reducing_gap=3.0)


def _background(image: Image.Image) -> tuple[int, ...]:
    """Median colour of the four corners, one number per channel."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(corner) for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    channels = zip(*(corner if isinstance(corner, tuple) else (corner,) for corner in corners), strict=True)
    return tuple(int(sum(sorted(channel)[1:3])) // 2 for channel in channels)


def _redraw_lines(pixels: Pixels, augmentation: Augmentation, draw: dict[str, float], *, on_white: bool) -> Pixels:
    if draw["outline"] < augmentation.outline:
        edges = _neighbourhood(np.maximum, pixels) - _neighbourhood(np.minimum, pixels)
        pixels = 255 - edges if on_white else edges
    if draw["stroke"] < augmentation.stroke:
        extreme = np.maximum if draw["stroke_side"] < 0.5 else np.minimum
        strength = round(256 * draw["stroke_strength"])
        moved = _neighbourhood(extreme, pixels).astype(np.int32) - pixels
        pixels = (pixels + (strength * moved >> 8)).astype(np.uint8)
    return pixels


def _neighbourhood(extreme: np.ufunc, pixels: Pixels) -> Pixels:
    """The maximum or minimum over 3 x 3 pixels: dilation or erosion."""
    rows = pixels.copy()
    extreme(rows[1:], pixels[:-1], out=rows[1:])
    extreme(rows[:-1], pixels[1:], out=rows[:-1])
    both = rows.copy()
    extreme(both[:, 1:], rows[:, :-1], out=both[:, 1:])
    extreme(both[:, :-1], rows[:, 1:], out=both[:, :-1])
    return both


def _colour_jitter(pixels: Pixels, augmentation: Augmentation, draw: dict[str, float]) -> Pixels:
    """Change brightness, then contrast around the mean, then saturation."""
    if augmentation.brightness or augmentation.contrast:
        brightness = 1 + augmentation.brightness * _either_way(draw["brightness"])
        contrast = 1 + augmentation.contrast * _either_way(draw["contrast"])
        table = np.arange(256) * max(brightness, 0)
        mean = float(pixels.mean()) * max(brightness, 0)
        table = mean + max(contrast, 0) * (table - mean)
        pixels = np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels]
    if augmentation.saturation and pixels.ndim == 3:
        factor = max(1 + augmentation.saturation * _either_way(draw["saturation"]), 0)
        colour = pixels.astype(np.float32)
        grey = colour @ np.array([0.299, 0.587, 0.114], np.float32)
        mixed = grey[..., None] + factor * (colour - grey[..., None])
        pixels = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
    return pixels


def _channels_first(pixels: Pixels) -> Pixels:
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (3, *pixels.shape))
    return pixels.transpose(2, 0, 1)


def _between(low: float, high: float, draw: float) -> float:
    return low + (high - low) * draw


def _either_way(draw: float) -> float:
    return 2 * draw - 1
