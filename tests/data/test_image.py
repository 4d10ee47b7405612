"""From encoded images to training views, against torchvision, Pillow and plain geometry."""

import io
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms import v2

from clipdistill.data.image import Augmentation, render
from clipdistill.io.images import TooManyPixelsError

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def encode(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def several(data, seeds, size=32, augmentation=None, max_pixels=10**6):
    if isinstance(data, Image.Image):
        data = encode(data)
    rngs = [np.random.default_rng(seed) for seed in seeds]
    return render(data, image_size=size, augmentation=augmentation, rngs=rngs, max_pixels=max_pixels)


def view(data, size=32, seed=0, augmentation=None, max_pixels=10**6):
    return several(data, [seed], size, augmentation, max_pixels)[0]


def photo(width=96, height=64):
    """A smooth colour picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rgb = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y)], axis=-1)
    return Image.fromarray((255 * np.clip(rgb, 0, 1)).astype(np.uint8))


def disc(size=64, radius=16, ink=255, paper=0):
    image = Image.new("L", (size, size), paper)
    ImageDraw.Draw(image).ellipse(
        (size / 2 - radius, size / 2 - radius, size / 2 + radius, size / 2 + radius), fill=ink
    )
    return image


def ink(pixels):
    """Share of the view that is ink, white on black."""
    return pixels[0].mean() / 255


def views(image, seeds=40, **augmentation):
    return [view(image, 64, seed, Augmentation(**(WHOLE | augmentation))) for seed in range(seeds)]


@pytest.mark.parametrize("size", [24, 80])
def test_without_augmentation_it_is_torchvisions_resize_and_centre_crop(size):
    image = photo(96, 64)
    expected = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])(image)
    difference = view(image, size).astype(int) - np.asarray(expected).transpose(2, 0, 1)
    assert np.abs(difference).mean() < 1


@pytest.mark.parametrize("size", [(32, 64), (60, 20)])
def test_views_need_not_be_square(size):
    """The largest central crop of the view's aspect ratio, as in open_clip's evaluation; and crops near that ratio."""
    image = photo(128, 96)
    found = view(image, size)
    expected = image_transform_v2(PreprocessCfg(size=size, mean=(0,) * 3, std=(1,) * 3), is_train=False)(image)
    assert found.shape == expected.shape == (3, *size)
    assert np.abs(found - 255 * expected.numpy()).mean() < 1
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    fitting = photo(8 * size[1], 8 * size[0])
    for change in ({}, {"rotate": 1e-9}):
        augmented = view(fitting, size, 0, Augmentation(**whole, **change)).astype(int)
        assert np.abs(augmented - view(fitting, size))[:, 1:-1, 1:-1].max() <= 3

    y, x = np.mgrid[0:200, 0:200]
    ramp = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    for seed in range(30):
        augmentation = Augmentation(crop_scale=(0.2, 0.25), crop_ratio=(0.8, 1.25))
        pixels = view(ramp, size, seed, augmentation).astype(float)
        middle = [length // 2 for length in size]
        width = (pixels[0, middle[0], -4] - pixels[0, middle[0], 3]) * size[1] / (size[1] - 7)
        height = (pixels[1, -4, middle[1]] - pixels[1, 3, middle[1]]) * size[0] / (size[0] - 7)
        assert 0.7 < width / height / (size[1] / size[0]) < 1.4


def test_a_turned_view_that_is_not_square_keeps_angles():
    """A right angle stays one under rotation: the view's pixels are square."""
    image = Image.new("L", (128, 64))
    ImageDraw.Draw(image).rectangle((62, 8, 65, 55), fill=255)
    spreads = []
    for seed in range(10):
        pixels = view(image, (64, 128), seed, Augmentation(**WHOLE, rotate=60))
        y, x = np.nonzero(pixels[0] > 128)
        spreads.append(np.sqrt(np.linalg.eigvalsh(np.cov(x, y))[1] * 12))
    assert max(spreads) - min(spreads) < 2


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_affine_path_agrees_with_the_resized_crop(mode):
    image = photo(128, 128).convert(mode)
    plain = view(image, 64, 0, Augmentation(**WHOLE)).astype(int)
    affine = view(image, 64, 0, Augmentation(**WHOLE, rotate=1e-9)).astype(int)
    assert np.abs(plain - affine)[:, 1:-1, 1:-1].max() <= 3


def test_the_crop_has_the_area_and_the_ratio_asked_for():
    y, x = np.mgrid[0:200, 0:200]
    ramp = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))
    for seed in range(30):
        pixels = view(ramp, 50, seed, Augmentation(crop_scale=(0.2, 0.4), crop_ratio=(0.5, 2))).astype(float)
        width = (pixels[0, 25, -5] - pixels[0, 25, 4]) * 50 / 41
        height = (pixels[1, -5, 25] - pixels[1, 4, 25]) * 50 / 41
        assert 0.17 < width * height / 200**2 < 0.44
        assert 0.45 < width / height < 2.2


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_tiny_and_thin_images_work(size):
    image = Image.new("RGB", size, (10, 200, 30))
    for augmentation in (None, Augmentation(), Augmentation(rotate=20, zoom=(0.5, 1.5))):
        assert (view(image, 16, 1, augmentation) == np.array([10, 200, 30])[:, None, None]).all()


def test_flip_mirrors():
    image = photo(64, 64)
    plain, flipped = (view(image, 32, 3, Augmentation(flip=flip)) for flip in (0, 1))
    assert (plain[:, :, ::-1] == flipped).all()


def test_rotation_turns_up_to_the_angle_both_ways():
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).rectangle((30, 8, 33, 55), fill=255)
    angles = []
    for pixels in views(image, rotate=40):
        y, x = np.nonzero(pixels[0] > 128)
        (xx, xy), (_, yy) = np.cov(x, y)
        angles.append(np.degrees(0.5 * np.arctan2(2 * xy, yy - xx)))
    assert 30 < max(angles) < 41
    assert -41 < min(angles) < -30


def test_translation_shifts_up_to_the_share():
    centres = []
    for pixels in views(disc(radius=8), translate=0.25):
        y, x = np.nonzero(pixels[0] > 128)
        centres.append((x.mean() - 31.5, y.mean() - 31.5))
    away = np.abs(centres)
    assert (away < 16.6).all()
    assert (away.max(axis=0) > 12).all()


def test_zoom_magnifies_by_the_factor():
    area = ink(view(disc(), 64))
    for zoom in (0.5, 1.5):
        pixels = views(disc(), 1, zoom=(zoom, zoom))[0]
        assert ink(pixels) == pytest.approx(area * zoom**2, rel=0.06)


def test_stretch_changes_the_ratio_and_not_the_area():
    area = ink(view(disc(), 64))
    ratios = []
    for pixels in views(disc(), stretch=0.5):
        ratios.append(np.ptp(np.nonzero(pixels[0] > 128)[1]) / np.ptp(np.nonzero(pixels[0] > 128)[0]))
        assert ink(pixels) == pytest.approx(area, rel=0.06)
    assert 1.3 < max(ratios) < 1.6
    assert 1.3 < 1 / min(ratios) < 1.6


def test_turning_and_shearing_at_once_keep_the_area():
    area = ink(view(disc(), 64))
    for pixels in views(disc(), rotate=45, shear=30, translate=0.1):
        assert ink(pixels) == pytest.approx(area, rel=0.06)


def test_shear_keeps_rows_level():
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).rectangle((22, 24, 41, 39), fill=255)
    leans = []
    for pixels in views(image, shear=30):
        y, x = np.nonzero(pixels[0] > 128)
        assert (y.min(), y.max()) == (24, 39)
        leans.append(x[y == 24].mean() - x[y == 39].mean())
    assert np.abs(leans).max() == pytest.approx(15 * np.tan(np.radians(30)), abs=1.5)
    assert min(leans) < 0 < max(leans)


@pytest.mark.parametrize(("ink_level", "paper"), [(255, 0), (0, 255)])
def test_what_lies_outside_has_the_papers_colour(ink_level, paper):
    for pixels in views(disc(ink=ink_level, paper=paper), 5, zoom=(0.5, 0.5), rotate=30):
        assert (pixels[:, :10] == paper).all()


@pytest.mark.parametrize(("ink_level", "paper"), [(255, 0), (0, 255)])
def test_outline_empties_shapes_and_leaves_the_paper(ink_level, paper):
    (pixels,) = views(disc(ink=ink_level, paper=paper), 1, outline=1)
    assert (pixels[:, 32, 32] == paper).all()
    assert (pixels[:, 0, 0] == paper).all()
    assert (pixels[:, 32] == ink_level).any()


def test_stroke_thickens_and_thins_by_up_to_a_pixel():
    areas = [ink(pixels) for pixels in views(disc(), stroke=1)]
    thin, thick = disc().filter(ImageFilter.MinFilter(3)), disc().filter(ImageFilter.MaxFilter(3))
    assert ink(view(thin, 64)) <= min(areas) < 0.97 * ink(view(disc(), 64))
    assert ink(view(thick, 64)) >= max(areas) > 1.03 * ink(view(disc(), 64))
    assert len(set(areas)) > 30


def test_stroke_and_outline_happen_as_often_as_asked():
    plain = view(disc(), 64)
    changed = sum((pixels != plain).any() for pixels in views(disc(), 200, stroke=0.3))
    assert 40 < changed < 80


def test_colours_stay_within_what_is_asked():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = [int(pixels[0, 0, 0]) for pixels in views(grey, brightness=0.4)]
    assert 60 <= min(levels) < 70
    assert 130 < max(levels) <= 140
    two = Image.new("RGB", (8, 8), (50, 50, 50))
    two.paste((150, 150, 150), (0, 0, 8, 4))
    spreads = [int(pixels[0, 2, 0]) - int(pixels[0, -2, 0]) for pixels in views(two, contrast=0.5)]
    assert 50 <= min(spreads) < 65
    assert 135 < max(spreads) <= 150
    red = Image.new("RGB", (8, 8), (200, 40, 40))
    (flat,) = views(red, 1, saturation=0)
    assert flat[0, 0, 0] == 200
    chroma = [int(pixels[0, 0, 0]) - int(pixels[1, 0, 0]) for pixels in views(red, saturation=0.9)]
    assert 0 < min(chroma) < 60
    assert max(chroma) > 220


def test_switching_one_change_on_leaves_the_others_as_they_were():
    image = photo(64, 64)
    crop = view(image, 32, 9, Augmentation(crop_scale=(0.3, 1.0)))
    brighter = view(image, 32, 9, Augmentation(crop_scale=(0.3, 1.0), brightness=1e-6, stroke=1e-9))
    assert (crop == brighter).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation, image_format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(96, 64), image_format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (view(data) == view(upright)).all()
    expected = np.asarray(ImageOps.fit(upright.convert("RGB"), (32, 32), Image.Resampling.BICUBIC))
    assert np.abs(view(data).astype(int) - expected.transpose(2, 0, 1)).max() <= 2
    augmentation = Augmentation(crop_scale=(0.3, 0.5))
    assert np.abs(view(data, 16, 4, augmentation).astype(int) - view(upright, 16, 4, augmentation)).mean() < 4


def test_a_large_jpeg_shrunk_by_its_decoder_gives_the_same_view():
    image = photo(1600, 1200)
    augmentation = Augmentation(crop_scale=(0.4, 0.6), rotate=10)
    shrunk = view(encode(image, "JPEG", quality=95), 64, 2, augmentation, 10**7)
    exact = view(encode(image), 64, 2, augmentation, 10**7)
    assert np.abs(shrunk.astype(int) - exact).mean() < 3


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_fast_decoder_gives_nearly_the_same_view(mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(1200, 800).convert(mode), "JPEG", quality=90, exif=exif)
    for size in (32, 512):
        exact = view(data, size, augmentation=Augmentation(crop_scale=(0.5, 1.0)))
        fast = view(data, size, augmentation=Augmentation(crop_scale=(0.5, 1.0), jpeg_decoder="simplejpeg"))
        assert np.abs(fast.astype(int) - exact.astype(int)).mean() < 2


def test_the_fast_decoder_leaves_other_formats_and_evaluation_alone():
    png, jpeg = encode(photo()), encode(photo(), "JPEG")
    for data, exact, fast in (
        (png, Augmentation(), Augmentation(jpeg_decoder="simplejpeg")),
        (encode(photo().convert("CMYK"), "JPEG"), Augmentation(), Augmentation(jpeg_decoder="simplejpeg")),
        (jpeg, None, None),
    ):
        assert np.array_equal(view(data, augmentation=exact), view(data, augmentation=fast))


def test_the_fast_decoder_refuses_what_is_cut_short():
    data = encode(photo(300, 200), "JPEG")
    with pytest.raises(ValueError, match=r".+"):
        view(data[: len(data) // 2], augmentation=Augmentation(jpeg_decoder="simplejpeg"))


def exotic():
    rgb = photo(40, 40)
    transparent = rgb.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize((40, 40)))
    grey_alpha = Image.merge("LA", [rgb.convert("L"), transparent.getchannel("A")])
    palette = rgb.quantize(256)
    grey16 = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 37)

    def on_white(image):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")

    yield "cmyk", encode(rgb.convert("CMYK"), "JPEG", quality=95), rgb, 4
    yield "16 bits", encode(grey16), rgb.convert("L"), 0.01
    yield "16 bits with transparency", encode(grey16, transparency=int(np.asarray(grey16)[0, 0])), None, 0
    yield "grey with transparency", encode(rgb.convert("L"), transparency=90), None, 0
    yield "one bit with transparency", encode(rgb.convert("1"), transparency=0), None, 0
    yield "colour with transparency", encode(rgb, transparency=rgb.getpixel((3, 3))), None, 0
    yield "palette", encode(palette), palette.convert("RGB"), 0.01
    yield "transparent palette", encode(palette, transparency=0), None, 0
    yield "rgba", encode(transparent), on_white(transparent), 1
    yield "webp alpha", encode(transparent, "WEBP", lossless=True), on_white(transparent), 1.5
    yield "grey and alpha", encode(grey_alpha), on_white(grey_alpha), 1
    yield "one bit", encode(rgb.convert("1")), rgb.convert("1").convert("L"), 0.01
    yield "grey jpeg", encode(rgb.convert("L"), "JPEG", quality=95), rgb.convert("L"), 3
    yield "animation", encode(rgb, "WEBP", save_all=True, append_images=[disc(40)], lossless=True), rgb, 0.5
    yield "animated png", encode(rgb, "PNG", save_all=True, append_images=[disc(40).convert("RGB")]), rgb, 0.5


@pytest.mark.parametrize(("data", "expected", "tolerance"), [pytest.param(*case[1:], id=case[0]) for case in exotic()])
def test_exotic_images_become_rgb(data, expected, tolerance):
    if expected is None:
        expected = Image.open(io.BytesIO(data))
        if expected.mode.startswith("I"):  # by hand, since Pillow drops 16-bit transparency
            grey = np.asarray(expected)
            grey = np.where(grey == expected.info["transparency"], 255, grey >> 8).astype(np.uint8)
            assert (grey == 255).any()
            expected = Image.fromarray(grey)
        expected = expected.convert("RGBA")
        expected = Image.alpha_composite(Image.new("RGBA", expected.size, "white"), expected).convert("RGB")
        tolerance = 1
    found = view(data, 40)
    wanted = np.asarray(expected.convert("RGB")).transpose(2, 0, 1)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).mean() <= tolerance


def png_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def bomb(image_format, width, height):
    """An image file whose header claims more than is there."""
    data = bytearray(encode(photo(), image_format))
    if image_format == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        data[8:33] = png_chunk(b"IHDR", header)
    elif image_format == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    else:
        data = bytearray(encode(photo(), image_format, save_all=True, append_images=[photo().rotate(180)]))
        at = data.index(b"VP8X") + 12
        data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_too_many_pixels_are_refused_before_decoding(image_format):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for augmentation in (None, Augmentation(), Augmentation(rotate=20)):
        with pytest.raises(TooManyPixelsError, match=r"900000000 pixels|30000 x 30000 pixels"):
            view(bomb(image_format, 30_000, 30_000), augmentation=augmentation)
        with pytest.raises(TooManyPixelsError, match="13000 x 13000"):
            view(bomb(image_format, 13_000, 13_000), max_pixels=169_000_000 - 1, augmentation=augmentation)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


@pytest.mark.parametrize("size", [(1, 1), (300, 7), (16383, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=["lossy", "lossless", "extended"]
)
def test_a_webp_is_measured_before_pillow_opens_it(size, options):
    data = encode(Image.new("RGB", size, "red"), "WEBP", **options)
    assert view(data, max_pixels=size[0] * size[1]).shape == (3, 32, 32)
    with pytest.raises(TooManyPixelsError, match=f"^{size[0]} x {size[1]} pixels, at most"):
        view(data, max_pixels=size[0] * size[1] - 1)


@pytest.mark.slow
def test_a_webp_of_many_pixels_takes_no_memory_where_freed_memory_is_kept():
    """As in a process that trains, in which memory is not zeroed lazily."""
    code = (
        "import resource, sys\n"
        "from clipdistill.io.images import open_image, TooManyPixelsError\n"
        "from clipdistill.io.machine import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    open_image(sys.stdin.buffer.read(), max_pixels=10**8, formats=('WEBP',))\n"
        "except TooManyPixelsError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=bomb("WEBP", 13_000, 13_000), capture_output=True, check=True
    )
    assert int(done.stdout) < 100 << 10  # KiB


def test_as_many_pixels_as_allowed_are_decoded():
    assert view(Image.new("L", (100, 100)), max_pixels=10_000).shape == (3, 32, 32)
    with pytest.raises(TooManyPixelsError, match="100 x 100 pixels, at most 9,999"):
        view(Image.new("L", (100, 100)), max_pixels=9_999)


@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_of_endless_scans_is_refused_before_decoding(progressive):
    side = 2000
    data = encode(Image.new("RGB", (side, side), "red"), "JPEG", progressive=progressive, streamtype=0)
    assert view(data, max_pixels=side**2).shape == (3, 32, 32)
    if not progressive:  # one component a scan, and no data
        scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
        data = data[: data.index(b"\xff\xda")] + scan + b"\xff\xd9"
    last = data[data.rindex(b"\xff\xda") : -2]
    started = time.process_time()
    with pytest.raises(ValueError, match="scans, at most 100"):
        view(data[:-2] + last * 2000 + b"\xff\xd9", max_pixels=side**2)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("PNG", {"save_all": True}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"save_all": True}),
    ],
)
def test_an_image_cut_short_anywhere_is_an_error_or_whole(image_format, options):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    if "save_all" in options:
        options = options | {"append_images": [noise.rotate(90)]}
    data = encode(noise, image_format, **options)
    whole, refused = view(data, 20), 0
    for length in range(len(data)):
        try:
            assert (view(data[:length], 20) == whole).all()
        except (OSError, SyntaxError, ValueError):
            refused += 1
    assert refused > len(data) * (0.4 if "save_all" in options else 0.95)


def test_other_formats_are_not_decoded():
    with pytest.raises(OSError, match="cannot identify"):
        view(encode(photo(), "GIF"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("crop_scale", (0, 1)), ("crop_scale", (0.5, 1.1)), ("zoom", (2, 1)), ("flip", 1.5), ("rotate", -1)],
)
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})


def test_a_view_is_what_a_tensor_can_hold():
    assert torch.from_numpy(np.ascontiguousarray(view(disc()))).shape == (3, 32, 32)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    "augmentation",
    [
        None,
        Augmentation(),
        Augmentation(crop_scale=(0.02, 1.0), flip=0.5),  # decoded at several scales
        Augmentation(crop_scale=(0.02, 1.0), rotate=20, zoom=(0.5, 2.0), saturation=0.4),
        Augmentation(crop_scale=(0.02, 1.0), jpeg_decoder="simplejpeg"),
    ],
    ids=["none", "crop", "zoom", "affine", "fast"],
)
def test_views_of_one_decoding_are_those_of_decodings_of_their_own(image_format, orientation, augmentation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(640, 400), image_format, exif=exif)
    seeds = range(12)
    together = several(data, seeds, augmentation=augmentation)
    assert len(together) == len(seeds)
    for seed, pixels in zip(seeds, together, strict=True):
        assert np.array_equal(pixels, view(data, seed=seed, augmentation=augmentation))
    if augmentation is not None:
        assert len({pixels.tobytes() for pixels in together}) == len(seeds)
