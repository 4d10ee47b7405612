"""JPEGs that the workers leave encoded, against Pillow, and against the stream and cache that decode in the workers."""

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError

from clipdistill.data import Augmentation, StreamLoader, expand_urls, index_shards
from clipdistill.data.embeddings import EmbeddingReader
from clipdistill.data.encoded import DeviceDecoder, EncodedImages
from clipdistill.data.image import EncodedView, render
from clipdistill.data.reading import Views
from clipdistill.data.sample import Decoder
from clipdistill.distill.teacher_cache import CacheBuilder, CacheContent
from clipdistill.errors import InputError
from clipdistill.models.loading import load_frozen_model
from tests.conftest import colour_samples, write_tar
from tests.streams import make_stream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

CROPS = {"crop_scale": (0.2, 1.0), "flip": 0.5}
ON_DEVICE = Augmentation(**CROPS, jpeg_decoder="device")
BY_PILLOW = Augmentation(**CROPS)


def picture(number=0, width=90, height=70):
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rgb = np.stack([x, y, 0.5 + 0.5 * np.sin((7 + number) * x * y)], axis=-1)
    return Image.fromarray((255 * np.clip(rgb, 0, 1)).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


def without_tables(data):
    """A JPEG whose header is right, and which no decoder can decode: its quantisation tables are gone."""
    while b"\xff\xdb" in data:
        start = data.index(b"\xff\xdb")
        data = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    return data


def left_encoded(data, seed=0, size=(32, 32)):
    rngs = [np.random.default_rng(seed)]
    (view,) = render(data, image_size=size, augmentation=ON_DEVICE, rngs=rngs, max_pixels=10**8)
    return view


def decode(views, size):
    encoded = EncodedImages.pack(dict(enumerate(views)))
    nothing = torch.empty(0, 3, *size, dtype=torch.uint8)
    images, faults = DeviceDecoder("cpu")(nothing, encoded, len(views))
    assert not faults
    return images


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (130, 100)], ids=str)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_view_is_pillows_resize_of_the_upright_picture(size, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(picture(width=320, height=200).convert(mode), exif=exif)
    views = [left_encoded(data, seed, size) for seed in range(6)]
    assert {view.flip for view in views} == {True, False}
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    for view, image in zip(views, decode(views, size), strict=True):
        left, top, width, height = view.box
        box = (left, top, left + width, top + height)
        expected = np.asarray(upright.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
        expected = expected[:, ::-1] if view.flip else expected
        assert np.abs(image.numpy().astype(int) - expected.transpose(2, 0, 1)).max() <= 2


def test_the_crop_and_the_flip_are_those_of_the_other_decoders():
    data = jpeg(picture(width=200, height=120))
    for seed in range(8):
        (image,) = decode([left_encoded(data, seed)], (32, 32))
        rngs = [np.random.default_rng(seed)]
        (expected,) = render(data, image_size=32, augmentation=BY_PILLOW, rngs=rngs, max_pixels=10**6)
        assert np.abs(image.numpy().astype(int) - expected).max() <= 6


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (jpeg(picture()), True),
        (jpeg(picture().convert("L")), True),
        (jpeg(picture(), progressive=True), True),
        (jpeg(picture(), subsampling=2), True),
        (jpeg(picture()) + bytes(100), True),
        (jpeg(picture().convert("CMYK")), False),
        (jpeg(picture(), keep_rgb=True), False),
        (jpeg(Image.new("L", (4200, 4000))), False),
    ],
    ids=["colour", "grey", "progressive", "4:2:0", "padded", "CMYK", "stored as RGB", "large"],
)
def test_only_jpegs_are_left_encoded_that_a_gpu_decodes_to_the_same_colours(data, left):
    assert isinstance(left_encoded(data), EncodedView) == left


@pytest.mark.parametrize("lost", [2, 1000])
def test_a_jpeg_that_is_cut_short_is_refused_by_the_worker(lost):
    with pytest.raises(OSError, match="truncated"):
        left_encoded(jpeg(picture(width=300, height=200))[:-lost])


def write_shards(folder, count=40, broken=(), pngs=()):
    """Two shards of captioned pictures, mostly JPEGs."""
    samples = colour_samples(count)
    for number, sample in enumerate(samples):
        if number not in pngs:
            del sample["png"]
            sample["jpg"] = without_tables(jpeg(picture(number))) if number in broken else jpeg(picture(number))
        sample["txt"] = f"picture {number}"
    for shard in (0, 1):
        write_tar(folder / f"{shard}.tar", samples[shard::2])
    return index_shards(expand_urls([str(folder)]), cache_dir=None)


def load(index, augmentation=ON_DEVICE, **settings):
    common = {"batch_size": 5, "image_size": 16, "seed": 3, "shuffle": 12}
    return StreamLoader(make_stream(index, augmentation=augmentation, **(common | settings)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_pillow_but_for_the_rounding_of_pixels(tmp_path, workers):
    index = write_shards(tmp_path, pngs=range(0, 40, 3))
    streams = [islice(load(index, each, num_workers=workers, image_size=48), 16) for each in (ON_DEVICE, BY_PILLOW)]
    for batch, expected in zip(*streams, strict=True):
        assert (batch.keys, batch.captions) == (expected.keys, expected.captions)
        assert torch.equal(batch.labels_B, expected.labels_B)
        pictures = batch.image_BCHW.int() - expected.image_BCHW.int()
        is_png = torch.tensor([int(key[1:]) % 3 == 0 for key in batch.keys])
        assert not pictures[is_png].any()
        assert pictures.abs().max() <= 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_jpeg_that_the_device_cannot_decode_is_skipped_and_counted(tmp_path, workers):
    """Its row repeats another one of the batch, with all that belongs to it."""
    index = write_shards(tmp_path, broken=[4, 17], pngs=[1, 2])
    loader = load(index, num_workers=workers, require_captions=True)
    seen = []
    for batch in islice(loader, 8):
        seen += batch.keys
        assert batch.captions == [f"picture {int(key[1:])}" for key in batch.keys]
        assert batch.labels_B.tolist() == [int(key[1:]) % 4 for key in batch.keys]
        assert len(batch.image_BCHW) == len(batch.caption_ids_B) == 5
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.image_BCHW[row], batch.image_BCHW[batch.keys.index(key)])
    assert loader.skipped == {"broken image": 2}
    assert len(seen) == 40
    assert set(seen) == {f"s{number:05d}" for number in range(40)} - {"s00004", "s00017"}


def test_a_saved_stream_goes_on_with_the_same_bits_beyond_a_broken_jpeg(tmp_path):
    index = write_shards(tmp_path, broken=[4, 17])
    whole = load(index, num_workers=2)
    batches = list(islice(whole, 12))
    first = load(index, num_workers=2)
    list(islice(first, 7))
    second = load(index, num_workers=2)
    second.load_state_dict([first.state_dict()])
    for batch, expected in zip(islice(second, 5), batches[7:], strict=True):
        assert batch.keys == expected.keys
        assert torch.equal(batch.image_BCHW, expected.image_BCHW)
    assert second.skipped == whole.skipped


def test_a_batch_of_broken_jpegs_alone_ends_the_stream(tmp_path):
    index = write_shards(tmp_path, broken=range(40))
    with pytest.raises(
        InputError, match=r"^shards: all 5 images of a batch are broken; the last is that of 's000.*broken data"
    ):
        next(iter(load(index)))


@pytest.fixture
def make_builder(teacher_folder, tmp_path):
    def make(index, augmentation=ON_DEVICE, workers=0, pixels=False):
        return CacheBuilder(
            index,
            [load_frozen_model(f"local-dir:{teacher_folder}")],
            CacheContent(
                decoder=Decoder(image_size=16, augmentation=augmentation, require_captions=True),
                views=Views(3, 9),
                precision="fp32",
                pixels=pixels,
            ),
            folder=tmp_path / "embeddings",
            batch_size=6,
            workers=workers,
            device="cpu",
        )

    return make


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_holds_what_the_teacher_says_of_those_very_pixels(make_builder, tmp_path, workers, pixels):
    index = write_shards(tmp_path / "shards", broken=[4, 17], pngs=[1, 2, 8])
    builder = make_builder(index, workers=workers, pixels=pixels)
    build = builder.build(builder.missing())
    assert (build.samples, build.skipped) == (40, {"broken image": 2})
    embeddings = EmbeddingReader(builder.folder, index, builder.key)
    loader = load(index, embeddings=embeddings, views=3, view_seed=9, num_workers=workers, require_captions=True)
    for batch in islice(loader, 16):
        (stored,) = batch.teachers
        expected = builder.teachers[0].encode_image(batch.image_BCHW)
        torch.testing.assert_close(stored.image_BD, expected, atol=1e-6, rtol=0)
        tokens = builder.teachers[0].tokenize(batch.captions)
        torch.testing.assert_close(stored.captions_BD, builder.teachers[0].encode_tokens(tokens), atol=1e-6, rtol=0)
        assert not {"s00004", "s00017"} & set(batch.keys)
    assert loader.skipped == {"broken image": 4}  # twice in two epochs


def test_a_cache_of_another_decoder_is_stale(make_builder, tmp_path):
    index = write_shards(tmp_path / "shards")
    builder = make_builder(index, BY_PILLOW)
    builder.build(builder.missing())
    with pytest.raises(InputError, match=r"augmentation\.jpeg_decoder was 'pillow' and is 'device'"):
        EmbeddingReader(builder.folder, index, make_builder(index).key).check()


@pytest.mark.parametrize("change", [{"rotate": 5}, {"brightness": 0.1}, {"outline": 0.5}, {"zoom": (0.9, 1.1)}])
def test_augmentations_that_the_device_does_not_make_are_refused(change):
    with pytest.raises(ValidationError, match="crop_scale, crop_ratio and flip alone, with jpeg_decoder device"):
        Augmentation(jpeg_decoder="device", **change)
