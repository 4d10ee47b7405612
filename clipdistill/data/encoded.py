"""JPEGs that data workers leave encoded, and their decoding on the device of the models.

A worker reads the header and draws the crop. The training process decodes whole batches with torchcodec (nvJPEG, on a
GPU), and resamples each view with Pillow's antialiased bicubic filter, in floating point.

Shapes: N images of a batch; B views (rows) of the batch; n views resampled at once; h, w of an image; C = 3 channels, H
and W of a view; t taps of a filter.
"""

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from clipdistill.data.image import Box, EncodedView
from clipdistill.errors import InputError
from clipdistill.io.images import Size
from clipdistill.io.urls import one_line

_PIXELS_AT_ONCE = 1 << 26
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """The encoded JPEGs of a batch, each once, and their views."""

    data: Tensor
    """uint8: the files, one after another."""
    ends: list[int]
    """End of each file in ``data``."""
    orientations: list[int]
    """EXIF orientation of each."""
    pixels: list[int]
    """Number of pixels of each."""
    views: dict[int, tuple[int, Box, bool]]
    """Row of the batch -> number of the image, the crop of the upright image, and whether to flip it."""

    @classmethod
    def pack(cls, views: Mapping[int, EncodedView]) -> "EncodedImages | None":
        """The views of some of a batch's rows; None if there are none."""
        if not views:
            return None
        images: dict[int, tuple[int, EncodedView]] = {}
        packed = {}
        for row, view in views.items():
            number, _ = images.setdefault(id(view.data), (len(images), view))
            packed[row] = (number, view.box, view.flip)
        data = bytearray()
        ends = []
        for _, view in images.values():
            data += view.data
            ends.append(len(data))
        return cls(
            data=torch.frombuffer(data, dtype=torch.uint8),
            ends=ends,
            orientations=[view.orientation for _, view in images.values()],
            pixels=[view.pixels for _, view in images.values()],
            views=packed,
        )

    def files(self) -> list[Tensor]:
        """The encoded images."""
        starts = [0, *self.ends[:-1]]
        return [self.data[start:end] for start, end in zip(starts, self.ends, strict=True)]

    def view(self, row: int) -> EncodedView:
        """The view of a row."""
        number, box, flip = self.views[row]
        data = self.files()[number].numpy().tobytes()
        return EncodedView(data, self.orientations[number], box, flip, self.pixels[number])


class DeviceDecoder:
    """Decodes the encoded images of batches, on a GPU in a stream of its own.

    Args:
        device: of the models.

    Raises:
        InputError: torchcodec does not decode a JPEG there.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        probe = io.BytesIO()
        Image.new("RGB", (16, 16)).save(probe, "JPEG")
        try:
            self._decode([torch.frombuffer(bytearray(probe.getvalue()), dtype=torch.uint8)])
        except Exception as error:  # a missing library, or one for another CUDA
            raise InputError(
                f"data.augmentation.jpeg_decoder: device, but torchcodec decodes nothing on {self._device} "
                f"({one_line(error)[:200]}); allowed: pillow, simplejpeg"
            ) from error

    def __call__(self, image_BCHW: Tensor, encoded: EncodedImages, rows: int) -> tuple[Tensor, dict[int, str]]:
        """All pixels of a batch.

        Args:
            image_BCHW: pixels of the rows that are not encoded, in their order.
            encoded: the others.
            rows: B.

        Returns:
            uint8 (B, 3, H, W) on the device, and why some rows could not be decoded, neither there nor by Pillow.
        """
        if self._stream is None:
            return self._fill(image_BCHW, encoded, rows)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            all_BCHW, faults = self._fill(image_BCHW, encoded, rows)
        current.wait_stream(self._stream)
        all_BCHW.record_stream(current)
        return all_BCHW, faults

    def _fill(self, image_BCHW: Tensor, encoded: EncodedImages, rows: int) -> tuple[Tensor, dict[int, str]]:
        size = (image_BCHW.shape[2], image_BCHW.shape[3])
        all_BCHW = torch.empty(rows, *image_BCHW.shape[1:], dtype=torch.uint8, device=self._device)
        ready = [row for row in range(rows) if row not in encoded.views]
        if ready:
            ready_rows = torch.tensor(ready).to(self._device, non_blocking=True)
            all_BCHW[ready_rows] = image_BCHW.to(self._device, non_blocking=image_BCHW.is_pinned())
        rows_of: dict[int, list[int]] = {}
        for row, (number, _, _) in encoded.views.items():
            rows_of.setdefault(number, []).append(row)
        faults: dict[int, str] = {}
        files = encoded.files()
        for numbers in _portions(encoded.pixels):
            images = self._decode_or_none([files[number] for number in numbers])
            upright = {
                number: _to_upright(image, encoded.orientations[number])
                for number, image in zip(numbers, images, strict=True)
                if image is not None
            }
            self._resample(upright, encoded, rows_of, all_BCHW)
            for number in numbers:
                if number not in upright:
                    faults |= self._decode_by_pillow(encoded, rows_of[number], size, all_BCHW)
        return all_BCHW, faults

    def _decode(self, files: list[Tensor]) -> list[Tensor]:
        from torchcodec.decoders import decode_jpeg

        images: list[Tensor] = decode_jpeg(files, mode="RGB", device=self._device)
        return images

    def _decode_or_none(self, files: list[Tensor]) -> list[Tensor | None]:
        """Each image (3, h, w) on the device; None for one that cannot be decoded there."""
        try:
            return list(self._decode(files))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if len(files) == 1:
                return [None]
            return [image for file in files for image in self._decode_or_none([file])]

    def _resample(
        self,
        upright: Mapping[int, Tensor],
        encoded: EncodedImages,
        rows_of: Mapping[int, list[int]],
        all_BCHW: Tensor,
    ) -> None:
        """Resample the views of decoded images into their rows."""
        height, width = all_BCHW.shape[2:]
        rows = [row for number in upright for row in rows_of[number]]
        if not rows:
            return
        images = [upright[encoded.views[row][0]] for row in rows]
        boxes = [encoded.views[row][1] for row in rows]
        across = _Filters([(box[0], box[2], image.shape[2]) for box, image in zip(boxes, images, strict=True)], width)
        down = _Filters([(box[1], box[3], image.shape[1]) for box, image in zip(boxes, images, strict=True)], height)
        across_nWt, down_nHt = across.weights(self._device), down.weights(self._device)
        for number, (row, image) in enumerate(zip(rows, images, strict=True)):
            (left, right), (top, bottom) = across.taps[number], down.taps[number]
            region = image[:, top:bottom, left:right].float()
            view = down_nHt[number, :, : bottom - top] @ region @ across_nWt[number, :, : right - left].T
            view = view.round_().clamp_(0, 255)
            all_BCHW[row] = view.flip(-1) if encoded.views[row][2] else view

    @staticmethod
    def _decode_by_pillow(encoded: EncodedImages, rows: list[int], size: Size, all_BCHW: Tensor) -> dict[int, str]:
        """Fill the rows of an image that the device does not decode; returns why a row cannot be filled."""
        for row in rows:
            try:
                pixels = encoded.view(row).decode(size)
            except Exception as error:  # Pillow's decoders raise almost any error on hostile data
                all_BCHW[rows] = 0
                return dict.fromkeys(rows, one_line(error))
            all_BCHW[row] = torch.tensor(pixels)
        return {}


class _Filters:
    """Pillow's antialiased bicubic filter along one axis, for several views.

    Args:
        spans: start and length of each view's crop, and the length of its image.
        size: of the views.

    Attributes:
        taps: first and last + 1 of the image's pixels on which each view depends.
    """

    def __init__(self, spans: list[tuple[float, float, int]], size: int) -> None:
        self._size = size
        self._spans = torch.tensor([(start, length / size) for start, length, _ in spans])
        self.taps = [
            (
                max(0, math.floor(start - 2 * max(length / size, 1))),
                min(extent, math.ceil(start + length + 2 * max(length / size, 1))),
            )
            for start, length, extent in spans
        ]

    def weights(self, device: torch.device) -> Tensor:
        """(n, size, t); 0 beyond a view's own taps."""
        taps_n2 = torch.tensor(self.taps, dtype=torch.float32)
        start_n, scale_n, first_n, end_n = (
            torch.cat([self._spans, taps_n2], 1).to(device, non_blocking=True).T[..., None, None]
        )
        most = max(end - first for first, end in self.taps)
        tap_t = torch.arange(most, device=device) + first_n
        centre_s = start_n + (torch.arange(self._size, device=device)[:, None] + 0.5) * scale_n
        weights_nst = _bicubic((tap_t + 0.5 - centre_s) / scale_n.clamp(min=1)) * (tap_t < end_n)
        return weights_nst / weights_nst.sum(-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2, https://doi.org/10.1109/TASSP.1981.1163711, eq. 4 and 15."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _portions(pixels: list[int]) -> Iterator[list[int]]:
    """Numbers of images, in portions to be decoded at once."""
    portion: list[int] = []
    for number, size in enumerate(pixels):
        together = sum(pixels[other] for other in portion) + size
        if portion and (together > _PIXELS_AT_ONCE or len(portion) == _IMAGES_AT_ONCE):
            yield portion
            portion = []
        portion.append(number)
    yield portion


def _to_upright(image: Tensor, orientation: int) -> Tensor:
    """An image (3, h, w) turned as its EXIF orientation says."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    mirrored = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return image.flip(mirrored) if mirrored else image
