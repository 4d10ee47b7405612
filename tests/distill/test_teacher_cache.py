"""The teacher cache: its numbers against the teachers themselves, over real shards."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipdistill.data import Augmentation, LazyIndex, StreamLoader, expand_urls, index_shards
from clipdistill.data.embeddings import EmbeddingReader, embedding_file, find_fault, pack, unpack
from clipdistill.data.reading import Views
from clipdistill.data.sample import Decoder
from clipdistill.distill.teacher_cache import CacheBuilder, CacheContent
from clipdistill.errors import InputError
from clipdistill.models.loading import load_frozen_model
from tests.conftest import colour_samples, write_tar
from tests.streams import make_stream

CHANGES = Augmentation(crop_scale=(0.3, 1.0), rotate=30, flip=0.5)
DECODER = Decoder(image_size=16, augmentation=CHANGES, require_captions=True, max_pixels=10_000)


def content(*, views: int = 3, seed: int = 5, precision: str = "fp32", pixels: bool = False, **changes) -> CacheContent:
    decoder = replace(DECODER, **changes)
    return CacheContent(decoder=decoder, views=Views(views, seed), precision=precision, pixels=pixels)


@pytest.fixture
def make_builder(colours: Path, teacher_folder: Path, tmp_path: Path) -> Callable[..., CacheBuilder]:
    def make(shards: Path = colours / "train", **changes) -> CacheBuilder:
        workers = changes.pop("workers", 0)
        return CacheBuilder(
            index_shards(expand_urls([str(shards)]), cache_dir=None),
            [load_frozen_model(f"local-dir:{teacher_folder}")],
            content(**changes),
            folder=tmp_path / "embeddings",
            batch_size=6,
            workers=workers,
            device="cpu",
        )

    return make


def stream(builder: CacheBuilder, index=None, **settings) -> StreamLoader:
    index = builder.index if index is None else index
    embeddings = EmbeddingReader(builder.folder, index, builder.key)
    common = {"batch_size": 5, "image_size": 16, "augmentation": CHANGES, "seed": 5, "shuffle": 20, "views": 3}
    return StreamLoader(make_stream(index, embeddings=embeddings, **(common | settings)))


@pytest.mark.parametrize(
    ("precision", "workers", "bound"), [("fp32", 0, 1e-6), ("fp32", 2, 1e-6), ("bf16", 0, 4e-3), ("int8", 0, 6e-3)]
)
def test_batches_carry_what_the_teacher_says_of_their_very_pixels(make_builder, precision, workers, bound):
    builder = make_builder(precision=precision, workers=workers)
    build = builder.build(builder.missing())
    assert (build.written, build.samples, build.skipped) == (3, 50, {})
    assert builder.missing() == []
    (teacher,) = builder.teachers
    for batch in islice(stream(builder, num_workers=workers), 25):
        (stored,) = batch.teachers
        torch.testing.assert_close(stored.image_BD, teacher.encode_image(batch.image_BCHW), atol=bound, rtol=0)
        captions_BD = teacher.encode_tokens(teacher.tokenize(batch.captions))
        torch.testing.assert_close(stored.captions_BD, captions_BD, atol=bound, rtol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_pixels_are_those_that_would_be_decoded(make_builder, tmp_path, workers):
    """Bad samples included, which are skipped for the same reasons."""
    samples = colour_samples(30)
    samples[7]["png"] = b"no picture"
    del samples[11]["txt"]
    for number in (0, 1):
        write_tar(tmp_path / "shards" / f"{number}.tar", samples[number::2])
    found = []
    for pixels in (False, True):
        builder = make_builder(tmp_path / "shards", pixels=pixels)
        assert builder.missing() == [0, 1]
        estimate = builder.estimate([0, 1])
        builder.build([0, 1])
        size = sum(path.stat().st_size for path in builder.folder.iterdir())
        assert 0.9 * size - 2 * 4096 < estimate.bytes < 1.1 * size
        loader = stream(builder, num_workers=workers, require_captions=True)
        found.append(
            [
                (batch.keys, batch.captions, batch.labels_B.tolist(), batch.image_BCHW.numpy().tobytes())
                for batch in islice(loader, 20)
            ]
        )
        assert loader.skipped.keys() == {"broken image", "no caption"}
    assert found[0] == found[1]


def test_training_with_stored_pixels_decodes_no_picture(make_builder, monkeypatch):
    builder = make_builder(pixels=True)
    builder.build(builder.missing())
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a picture was opened"))
    assert len(list(islice(stream(builder), 12))) == 12


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_caption_of_a_sample_is_stored(make_builder, tmp_path, precision):
    """An epoch draws one of them; others than those stored are refused."""

    def write(last: str) -> None:
        samples = colour_samples(12)
        for number, sample in enumerate(samples):
            sample["txt"] = "\n".join(f"{sample['txt']} {at}" for at in range(number % 4)) + f"\n{last}"
        write_tar(tmp_path / "shards" / "0.tar", samples)

    write("the last")
    builder = make_builder(tmp_path / "shards", precision=precision)
    estimate = builder.estimate(builder.missing())
    builder.build(builder.missing())
    size = sum(path.stat().st_size for path in builder.folder.iterdir())
    assert 0.9 * size - 4096 < estimate.bytes < 1.1 * size
    (teacher,) = builder.teachers
    seen = set()
    for batch in islice(stream(builder, batch_size=4), 18):
        captions_BD = teacher.encode_tokens(teacher.tokenize(batch.captions))
        bound = 1e-6 if precision == "fp32" else 6e-3
        torch.testing.assert_close(batch.teachers[0].captions_BD, captions_BD, atol=bound, rtol=0)
        seen |= set(zip(batch.keys, batch.captions, strict=True))
    assert len(seen) > 18
    write("the 1ast")
    changed = make_builder(tmp_path / "shards", precision=precision)
    assert changed.missing() == [0]
    with pytest.raises(InputError, match="captions or images have changed"):
        next(iter(stream(changed, batch_size=4)))


def test_a_resampled_stream_reads_the_cache(make_builder):
    builder = make_builder()
    builder.build(builder.missing())
    index = LazyIndex([shard.url for shard in builder.index], cache_dir=None)
    for batch in islice(stream(builder, index, samples_per_epoch=20), 12):
        expected = builder.teachers[0].encode_image(batch.image_BCHW)
        torch.testing.assert_close(batch.teachers[0].image_BD, expected, atol=1e-6, rtol=0)


def test_every_view_comes_once_in_as_many_epochs(make_builder):
    builder = make_builder()
    builder.build(builder.missing())
    pictures: dict[str, set[bytes]] = {}
    for batch in islice(stream(builder, batch_size=10), 15):
        for key, image in zip(batch.keys, batch.image_BCHW, strict=True):
            pictures.setdefault(key, set()).add(image.numpy().tobytes())
    assert {len(views) for views in pictures.values()} == {3}


def test_bytes_per_sample_are_those_on_disk(make_builder):
    for precision in ("fp32", "bf16", "int8"):
        builder = make_builder(precision=precision)
        estimate = builder.estimate(builder.missing())
        assert (estimate.samples, estimate.shards) == (50, 3)
        assert estimate.seconds > 0
        builder.build(builder.missing())
        size = sum(path.stat().st_size for path in builder.folder.iterdir())
        assert estimate.bytes <= size < estimate.bytes + 3 * 4096


@pytest.mark.parametrize("where", ["header", "middle", "end", "cut"])
def test_a_damaged_file_is_named_and_never_used(make_builder, where, caplog):
    builder = make_builder()
    builder.build(builder.missing())
    path = embedding_file(builder.folder, builder.index[1])
    content = bytearray(path.read_bytes())
    if where == "cut":
        content = content[: len(content) // 2]
    else:
        content[{"header": 100, "middle": len(content) // 2, "end": len(content) - 1}[where]] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=path.name):
        list(islice(stream(builder), 10))
    assert builder.missing() == [1]
    assert path.name in caplog.text
    builder.build([1])
    assert builder.missing() == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"views": 2}, "views was 3 and is 2"),
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"augmentation": Augmentation(flip=0.25)}, "augmentation.crop_scale"),
    ],
)
def test_a_stale_file_is_named_and_never_used(make_builder, change, named):
    builder = make_builder()
    builder.build(builder.missing())
    other = make_builder(**change)
    reader = EmbeddingReader(other.folder, other.index, other.key)
    with pytest.raises(InputError, match=f"cannot serve 3 of 3 shards, the first for 0-.* stale: {named}"):
        reader.check()
    assert other.missing() == [0, 1, 2]


def test_another_teacher_makes_a_file_stale(make_builder):
    builder = make_builder()
    builder.build(builder.missing())
    with torch.no_grad():
        builder.teachers[0].clip.visual.proj.mul_(1.5)
    other = CacheBuilder(
        builder.index,
        builder.teachers,
        builder.content,
        folder=builder.folder,
        batch_size=6,
        workers=0,
        device="cpu",
    )
    fault = find_fault(other.folder, other.index[0], other.key, thorough=False)
    assert fault is not None
    assert fault.startswith("stale: teachers")


def test_a_shard_whose_pixels_changed_under_its_headers_is_noticed(make_builder, tmp_path):
    shards = tmp_path / "shards"
    write_tar(shards / "0.tar", colour_samples(12))
    builder = make_builder(shards)
    builder.build(builder.missing())
    content = (shards / "0.tar").read_bytes()
    at = content.index(b"a green picture")
    (shards / "0.tar").write_bytes(content[:at] + b"a GREEN picture" + content[at + 15 :])
    with pytest.raises(InputError, match=r"sample 's00001' of .*0\.tar is not what 0-.* was made from"):
        list(islice(stream(builder), 3))


@pytest.mark.parametrize("changed", ["label", "caption", "image"])
def test_a_shard_with_other_content_under_equal_headers_makes_its_file_stale(make_builder, tmp_path, changed):
    """For training and for `clipdistill cache` alike."""
    shards = tmp_path / "shards"
    samples = colour_samples(12)
    write_tar(shards / "0.tar", samples)
    builder = make_builder(shards)
    builder.build(builder.missing())
    before = stored_labels(builder)
    headers = builder.index[0].digest
    if changed == "label":
        samples = [sample | {"cls": (sample["cls"] + 1) % 4} for sample in samples]
    elif changed == "caption":
        samples[5]["txt"] = samples[5]["txt"].upper()
    else:
        samples[5]["png"] = samples[5]["png"][:-20] + bytes(8) + samples[5]["png"][-12:]
    write_tar(shards / "0.tar", samples)
    other = make_builder(shards)
    assert other.index[0].digest == headers
    with pytest.raises(InputError, match="stale: the shard's labels, captions or images have changed"):
        EmbeddingReader(other.folder, other.index, other.key).check()
    assert other.missing() == [0]
    other.build([0])
    assert other.missing() == []
    if changed == "label":
        assert stored_labels(other) == [(label + 1) % 4 for label in before]


def stored_labels(builder):
    reader = EmbeddingReader(builder.folder, builder.index, builder.key)
    return reader.everything(0)[1].tolist()


def test_bad_samples_are_counted_and_never_served(make_builder, tmp_path):
    samples = colour_samples(12)
    samples[3]["png"] = b"no image"
    samples[7]["txt"] = b"\xff\xfe"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    builder = make_builder(tmp_path / "shards")
    build = builder.build(builder.missing())
    assert build.skipped == {"broken image": 1, "caption not UTF-8": 1}
    loader = stream(builder, batch_size=10, require_captions=True)
    for batch in islice(loader, 2):
        expected = builder.teachers[0].encode_image(batch.image_BCHW)
        torch.testing.assert_close(batch.teachers[0].image_BD, expected, atol=1e-6, rtol=0)
        assert not {"s00003", "s00007"} & set(batch.keys)


def test_a_shard_that_cannot_be_read_now_gets_no_file(make_builder, tmp_path):
    """What may be readable another time is not stored as bad."""
    path = tmp_path / "new" / "0.tar"
    write_tar(path, colour_samples(12))
    builder = make_builder(path.parent)
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    for workers in (0, 1):
        builder.workers = workers
        with pytest.raises(InputError, match=r"0\.tar"):
            builder.build(builder.missing())
    assert not list(builder.folder.glob("*.safetensors"))


def test_a_build_that_was_stopped_goes_on_with_what_is_missing(make_builder):
    builder = make_builder()
    builder.build([1])
    before = embedding_file(builder.folder, builder.index[1]).stat().st_mtime_ns
    assert builder.missing() == [0, 2]
    build = builder.build(builder.missing())
    assert (build.written, build.samples) == (2, 33)
    assert embedding_file(builder.folder, builder.index[1]).stat().st_mtime_ns == before


def test_an_empty_shard_has_a_file_too(make_builder, tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", [])
    write_tar(tmp_path / "shards" / "1.tar", colour_samples(6))
    builder = make_builder(tmp_path / "shards")
    builder.build(builder.missing())
    assert builder.missing() == []
    EmbeddingReader(builder.folder, builder.index, builder.key).check()


def test_int8_rows_are_within_half_a_step():
    rows = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0))
    packed = pack(rows, "int8")
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((unpack(packed[""], packed[".scale"]) - rows).abs() <= 0.5 * step + 1e-7).all()
    assert unpack(*pack(torch.zeros(2, 4), "int8").values()).eq(0).all()
