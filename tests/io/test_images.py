"""One decoder for training, evaluation and shards, against arithmetic on the pixels that were put in."""

import io
import json
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from clipdistill.cli import main
from clipdistill.data.image import render
from clipdistill.errors import InputError
from clipdistill.evaluation.sets.samples import EncodedSample, UnreadableImageError
from clipdistill.io.images import STANDARD_DECODING, DecodingSettings
from clipdistill.shards.sources import encode_image
from tests.conftest import CLASSES, write_tar

SIDE = 16
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
GREY = (255 * RAMP).astype(np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
ALPHA = np.tile(np.array([0, 64, 128, 255], np.uint8), (SIDE, SIDE // 4))
BENCHMARK = DecodingSettings(decoding="clip-benchmark")


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def on_white(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    share = ALPHA[..., None] / 255
    return np.rint(share * pixels + (1 - share) * 255)


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(Image.fromarray(COLOURS), "JPEG", quality=100, subsampling=0, exif=exif)


rgba = Image.fromarray(np.dstack([COLOURS, ALPHA]))
wide = (RAMP * 65535).astype(np.uint16)
CASES = {
    "grey of 16 bits in PNG": (encode(Image.fromarray(wide), "PNG"), wide >> 8),
    "grey of 16 bits in TIFF": (encode(Image.fromarray(wide), "TIFF"), wide >> 8),
    "grey of 16 bits in PPM": (b"P5\n16 16\n65535\n" + wide.astype(">u2").tobytes(), wide >> 8),
    "floats": (encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), np.rint(255 * RAMP.astype(np.float32))),
    "transparent": (encode(rgba, "PNG"), on_white(COLOURS)),
    "transparent in TIFF": (encode(rgba, "TIFF"), on_white(COLOURS)),
    "transparent grey": (
        encode(Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), "PNG"),
        on_white(np.dstack([GREY] * 3)),
    ),
    "on its side": (turned(6), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned(6)))))),
    "mirrored": (turned(5), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned(5)))))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_way_to_an_image_gives_its_pixels(name: str) -> None:
    content, expected = CASES[name]
    expected = np.broadcast_to(expected if expected.ndim == 3 else expected[..., None], (SIDE, SIDE, 3))
    stored, _ = encode_image(content, where="")
    (view,) = render(stored, image_size=SIDE, augmentation=None, rngs=[np.random.default_rng(0)], max_pixels=10**6)
    for data in (content, stored):
        image = np.asarray(EncodedSample(key="a", where="a", data=data).image())
        np.testing.assert_allclose(image, expected, atol=1)
    np.testing.assert_array_equal(view.transpose(1, 2, 0), image)
    plain, ambiguous = BENCHMARK.decode(content)
    assert ambiguous
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "opaque RGBA"])
def test_the_decodings_agree_on_ordinary_images(mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode.removeprefix("opaque "))
    content = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    for settings in (STANDARD_DECODING, BENCHMARK):
        decoded, ambiguous = settings.decode(content)
        assert not ambiguous
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 70_000, np.int32), "32-bit integers; allowed: 8 or 16 bits"),
        (np.full((4, 4), 2, np.float32), "floats from 2 to 2; allowed: floats from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
    ],
)
def test_numbers_without_a_white_are_refused(pixels: np.ndarray[Any, Any], message: str) -> None:
    content = encode(Image.fromarray(pixels), "TIFF")
    with pytest.raises(UnreadableImageError, match=message):
        EncodedSample(key="a", where="a", data=content).image()
    with pytest.raises(InputError, match=message):
        encode_image(content, where="a")


def bomb(side: int) -> bytes:
    """A PNG of a few hundred kilobytes that claims, and holds, side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def set_of(root: Path, images: list[bytes]) -> Path:
    samples = [{"key": f"s{number}", "png": data, "cls": 0} for number, data in enumerate(images)]
    write_tar(root / "test" / "0.tar", samples)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("a {c} picture\n")
    return root


def test_an_evaluation_decodes_no_bomb(
    teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data = set_of(tmp_path / "set", [encode(Image.fromarray(COLOURS), "PNG"), bomb(10_000)])
    command = ["evaluate", "--model", f"local-dir:{teacher_folder}", "--data", str(data)]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["unreadable"] == 1
    assert "10000 x 10000 pixels, at most 89,478,485 are allowed" in caplog.text
    with pytest.raises(InputError, match="too many"):
        encode_image(bomb(10_000), where="too many")
    assert main([*command, "--max-pixels", "100"]) == 2
    assert "no image of 2 can be read; first" in capsys.readouterr().err


def test_figures_that_depend_on_the_decoding_are_announced(
    teacher_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """And results of one decoding are not taken for those of the other."""
    data = set_of(tmp_path / "set", [encode(rgba, "PNG"), turned(6), encode(Image.fromarray(COLOURS), "PNG")])
    results = tmp_path / "results"
    command = ["evaluate", "--model", f"local-dir:{teacher_folder}", "--data", str(data), "--output", str(results)]
    for decoding in ("standard", "clip-benchmark"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert main([*command, "--decoding", decoding]) == 0
        assert "2 of its 3 images" in caplog.text
        assert f"depend on --decoding, which is {decoding}" in caplog.text
        assert "1 new results, 0 already there" in capsys.readouterr().out
    (details,) = results.glob("*/details/*.json")
    assert json.loads(details.read_text())["settings"]["decoding"] == "clip-benchmark"
