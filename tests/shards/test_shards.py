"""Shards: what stands in the tars, where samples come from, what an error leaves behind."""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from clipdistill.errors import InputError
from clipdistill.evaluation import open_set
from clipdistill.models.prompts import load_prompts
from clipdistill.shards.command import add_arguments, run
from clipdistill.shards.sources import encode_image, from_csv, from_hf_dataset, from_image_folder
from clipdistill.shards.writing import Sample, write_classification_folder, write_retrieval_folder, write_shards


def picture(seed=0, mode="RGB"):
    """Random pixels: no two pictures are alike."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encode(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def samples(count, **fields):
    for index in range(count):
        defaults = {"caption": f"picture {index}", "label": index % 3, "metadata": {"n": index, "ü": "ß"}}
        yield Sample(key=f"k{index}", image=encode(picture(index)), image_extension="png", **(defaults | fields))


def read(folder):
    """All samples of a folder of shards, by webdataset."""
    shards = int((folder / "nshards.txt").read_text())
    return list(webdataset.WebDataset([str(folder / f"{n}.tar") for n in range(shards)], shardshuffle=False))


def shards_cli(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(argument) for argument in arguments]))


# --- writing ---


def test_written_shards(tmp_path):
    seen = []
    summary = write_shards(samples(7), tmp_path / "a", samples_per_shard=3, progress=seen.append)
    assert (summary.folder, summary.shards, summary.samples) == (tmp_path / "a", 3, 7)
    assert seen == [3, 6, 7]
    assert sorted(path.name for path in tmp_path.glob("a/*")) == ["0.tar", "1.tar", "2.tar", "nshards.txt"]
    with tarfile.open(tmp_path / "a" / "2.tar") as tar:
        assert tar.getnames() == ["k6.png", "k6.txt", "k6.cls", "k6.json"]
        assert json.loads(tar.extractfile("k6.json").read()) == {"n": 6, "ü": "ß"}
    back = read(tmp_path / "a")
    assert [sample["__key__"] for sample in back] == [f"k{index}" for index in range(7)]
    assert [sample["txt"].decode() for sample in back] == [f"picture {index}" for index in range(7)]
    assert [sample["cls"] for sample in back] == [b"0", b"1", b"2", b"0", b"1", b"2", b"0"]
    for index, sample in enumerate(back):
        np.testing.assert_array_equal(pixels(sample["png"]), np.asarray(picture(index)))


def test_only_what_is_known_is_written(tmp_path):
    write_shards(samples(1, caption=None, label=None, metadata=None), tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "0.tar") as tar:
        assert tar.getnames() == ["k0.png"]


def test_bytes_of_a_tar_are_fixed(tmp_path):
    """Neither the clock nor the owner gets in: this digest holds on any machine."""
    sample = Sample(key="a", image=b"123", image_extension="jpg", caption="é", label=4, metadata={"b": 1, "a": 2})
    write_shards([sample], tmp_path / "a")
    digest = hashlib.sha256((tmp_path / "a" / "0.tar").read_bytes()).hexdigest()
    assert digest == "d65ddb62298578569bb94d6b19e6e9a641ecfefb6c7fe54932ae31769a83ae82"


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "a\n"])
def test_keys_that_would_break_a_shard(key):
    with pytest.raises(ValueError, match=r"key: .*; allowed: a text without dots, slashes and spaces"):
        Sample(key=key, image=b"", image_extension="png")


def test_image_extension_is_one_that_is_decoded():
    with pytest.raises(ValueError, match=r"image_extension: 'pyd'; allowed: jpg, png, webp"):
        Sample(key="a", image=b"", image_extension="pyd")


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.tar").write_text("mine")
    with pytest.raises(InputError, match=r"a: exists already; allowed: a new folder"):
        write_shards(samples(1), tmp_path / "a")
    assert (tmp_path / "a" / "0.tar").read_text() == "mine"


def test_an_error_in_the_source_leaves_nothing(tmp_path):
    def breaking():
        yield from samples(4)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_shards(breaking(), tmp_path / "a", samples_per_shard=2)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_classification_folder(breaking(), tmp_path / "b", split="test", classnames=["x", "y", "z"])
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_data_set(tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom clipdistill.shards.writing import Sample, write_shards\n"
        "def samples():\n"
        "    for n in range(4):\n"
        "        yield Sample(key=str(n), image=b'x', image_extension='png')\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "write_shards(samples(), Path(sys.argv[1]), samples_per_shard=2)\n"
    )
    target = tmp_path / "a"
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, cwd=Path.cwd())
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not target.exists()
    assert write_shards(samples(5), target).samples == 5
    assert len(read(target)) == 5


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ([], {}, "samples: none to write into 'a'; allowed: one or more"),
        ([*samples(2), *samples(1)], {}, "key: 'k0' occurs twice in 0.tar; allowed: unique keys"),
        (samples(1), {"samples_per_shard": 0}, "samples_per_shard: 0; allowed: 1 or more"),
    ],
)
def test_errors_of_writing(tmp_path, bad, options, message):
    with pytest.raises(InputError, match=message):
        write_shards(bad, tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())


# --- CLIP_benchmark's folders ---


def test_classification_folder(tmp_path):
    options = {"classnames": ["cat", "dog", "owl"], "templates": ["a {c}.", "the {c}."]}
    summary = write_classification_folder(samples(5), tmp_path / "a", split="test", samples_per_shard=2, **options)
    assert (summary.folder, summary.shards, summary.samples) == (tmp_path / "a" / "test", 3, 5)
    write_classification_folder(samples(4), tmp_path / "a", split="train", **options)
    assert len(read(tmp_path / "a" / "test")) == 5
    assert len(read(tmp_path / "a" / "train")) == 4
    prompts = load_prompts(tmp_path / "a")
    assert prompts.classnames == ("cat", "dog", "owl")
    assert prompts.templates == ("a {c}.", "the {c}.")


def test_clip_benchmark_reads_what_is_written(tmp_path):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    write_classification_folder(
        samples(5),
        tmp_path / "a",
        split="test",
        samples_per_shard=2,
        classnames=["cat", "dog", "owl"],
        templates=["a {c}."],
    )
    dataset = builder.build_wds_dataset("wds/a", np.asarray, split="test", data_dir=str(tmp_path / "a"))
    assert (dataset.classes, dataset.templates) == (["cat", "dog", "owl"], ["a {c}."])
    for index, (image, label) in enumerate(dataset):
        assert label == index % 3
        np.testing.assert_array_equal(image, np.asarray(picture(index)))
    assert index == 4

    write_retrieval_folder(samples(3), tmp_path / "b", split="test")
    dataset = builder.build_wds_dataset("wds/b", np.asarray, split="test", data_dir=str(tmp_path / "b"))
    assert [captions for _, captions in dataset] == [["picture 0"], ["picture 1"], ["picture 2"]]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"label": 3}, {}, "label of 'k0': 3; allowed: 0 to 2"),
        ({"label": None}, {}, "label of 'k0': None; allowed: 0 to 2"),
        ({}, {"classnames": ["a", "", "c"]}, "classnames: ''; allowed: one line of text"),
        ({}, {"templates": ["a photo"]}, r"templates: 'a photo'; allowed: one line with \{c\}"),
        ({}, {"split": "../test"}, r"split: '../test'; allowed: a folder name"),
    ],
)
def test_errors_of_classification_folders(tmp_path, fields, options, message):
    defaults = {"split": "test", "classnames": ["a", "b", "c"]}
    with pytest.raises(InputError, match=message):
        write_classification_folder(samples(2, **fields), tmp_path / "a", **(defaults | options))
    assert not list(tmp_path.iterdir())


def test_a_split_of_other_classes_is_refused(tmp_path):
    write_classification_folder(samples(3), tmp_path / "a", split="test", classnames=["a", "b", "c"])
    with pytest.raises(
        InputError, match=r"classnames.txt: is missing, or differs from that of split 'train'; allowed: a new folder"
    ):
        write_classification_folder(samples(3), tmp_path / "a", split="train", classnames=["b", "a", "c"])
    with pytest.raises(InputError, match=r"dataset_type.txt: is missing, or differs"):
        write_retrieval_folder(samples(3), tmp_path / "a", split="train")
    with pytest.raises(InputError, match=r"test: exists already"):
        write_classification_folder(samples(3), tmp_path / "a", split="test", classnames=["a", "b", "c"])


# --- images ---


@pytest.mark.parametrize(("image_format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_encoded_images_are_copied(image_format, extension):
    content = encode(picture(), image_format)
    assert encode_image(content, where="x") == (content, extension)


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [
        ("BMP", "RGB"),
        ("PPM", "RGB"),
        ("PPM", "L"),
        ("GIF", "P"),
        ("TIFF", "RGBA"),
        ("TIFF", "CMYK"),
        ("TIFF", "1"),
    ],
)
def test_other_formats_become_png(image_format, mode):
    content = encode(picture(mode=mode), image_format)
    converted, extension = encode_image(content, where="x")
    assert extension == "png"
    assert Image.open(io.BytesIO(converted)).format == "PNG"
    np.testing.assert_array_equal(pixels(converted), pixels(content))


def test_a_turned_tiff_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(picture(), "TIFF", exif=exif)
    converted, _ = encode_image(content, where="x")
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert upright.size == (7, 9)
    np.testing.assert_array_equal(pixels(converted), np.asarray(upright))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<svg></svg>",
        encode(picture(), "EPS"),
        encode(picture(), "TGA"),
        encode(Image.new("RGB", (64, 64)), "JPEG")[:-60],
        encode(picture())[:60],
        encode(Image.new("1", (9500, 9500))),
    ],
    ids=["empty", "svg", "eps", "tga", "truncated jpeg", "truncated png", "bomb"],
)
def test_unreadable_images(content):
    with pytest.raises(InputError, match=r"^row 3: not a readable image \(.+\); allowed: PNG, JPEG, WEBP") as caught:
        encode_image(content, where="row 3")
    assert "\n" not in str(caught.value)


# --- image folders ---


@pytest.fixture
def image_folder(tmp_path):
    """Two classes, a nested folder, six formats, a file that is no image."""
    root = tmp_path / "photos"
    files = {
        "dog/b.jpg": encode(picture(0), "JPEG"),
        "dog/a.PNG": encode(picture(1)),
        "cat/old/x.webp": encode(picture(2), "WEBP", lossless=True),
        "cat/x.bmp": encode(picture(3), "BMP"),
        "cat/y.tiff": encode(picture(4), "TIFF"),
        "cat/10.ppm": encode(picture(5), "PPM"),
        "cat/notes.txt": b"no image",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_image_folder_agrees_with_torchvision(image_folder, tmp_path):
    source = from_image_folder(image_folder)
    write_shards(source.samples, tmp_path / "a")
    expected = ImageFolder(str(image_folder))
    back = read(tmp_path / "a")
    assert source.classnames == expected.classes == ["cat", "dog"]
    assert len(back) == len(expected) == 6
    for sample, (image, label), (path, _) in zip(back, expected, expected.samples, strict=True):
        (extension,) = {"jpg", "png", "webp"} & set(sample)
        assert int(sample["cls"]) == label
        assert image_folder / json.loads(sample["json"])["path"] == Path(path)
        np.testing.assert_array_equal(pixels(sample[extension]), np.asarray(image))
        assert "txt" not in sample


def test_image_folder_shuffled(image_folder):
    plain = list(from_image_folder(image_folder).samples)
    mixed = list(from_image_folder(image_folder, shuffle_seed=1).samples)
    assert mixed == list(from_image_folder(image_folder, shuffle_seed=1).samples)
    assert mixed != plain
    assert sorted(mixed, key=lambda sample: sample.key) == plain


def test_image_folder_with_names(image_folder):
    source = from_image_folder(image_folder, classnames=["house cat", "hound"], by_order=True)
    assert source.classnames == ["house cat", "hound"]
    assert [sample.label for sample in source.samples] == [0, 0, 0, 0, 1, 1]
    with pytest.raises(InputError, match=r"photos: 2 of its 2 classes are not in the prompt set: 'cat', 'dog'; .*"):
        from_image_folder(image_folder, classnames=["house cat", "hound"])
    with pytest.raises(InputError, match=r"photos: 2 classes; allowed with --labels-by-order: 3, as in the prompt set"):
        from_image_folder(image_folder, classnames=["a", "b", "c"], by_order=True)


def test_bad_images_are_named_or_skipped(image_folder):
    (image_folder / "cat" / "m.jpg").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"photos/cat/m.jpg: not a readable image"):
        list(from_image_folder(image_folder).samples)
    source = from_image_folder(image_folder, skip_bad=True)
    assert len(list(source.samples)) == 6
    (line,) = source.skipped
    assert "photos/cat/m.jpg: not a readable image" in line


def test_errors_of_image_folders(image_folder):
    with pytest.raises(InputError, match="nowhere: no such folder; allowed: an image folder"):
        from_image_folder(image_folder / "nowhere")
    with pytest.raises(InputError, match="dog: no folder with images in it; allowed: an image folder"):
        from_image_folder(image_folder / "dog")
    (image_folder / "emu").mkdir()
    with pytest.raises(InputError, match=r"photos: no image in the class folders emu; allowed: images \(.jpg, "):
        from_image_folder(image_folder)


# --- tables ---


def write_table(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Four image files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(encode(picture(index)))
    return folder


def test_table(pictures, tmp_path):
    rows = [
        ["caption", "image", "kind"],
        ["a red,\n big  one", "pictures/2.png", "owl"],
        ['say "é"', str(pictures / "0.png"), "cat"],
        ["third", "pictures/1.png", "owl"],
    ]
    table = write_table(tmp_path / "t.csv", rows, encoding="utf-8-sig")
    source = from_csv(table, caption_column="caption", label_column="kind")
    found = list(source.samples)
    assert source.classnames == ["cat", "owl"]
    assert [sample.caption for sample in found] == ["a red, big one", 'say "é"', "third"]
    assert [sample.label for sample in found] == [1, 0, 1]
    assert [sample.key for sample in found] == ["000000000", "000000001", "000000002"]
    assert found[0].metadata == {"path": "pictures/2.png"}
    for sample, index in zip(found, [2, 0, 1], strict=True):
        np.testing.assert_array_equal(pixels(sample.image), np.asarray(picture(index)))


def test_rows_of_one_image_are_its_captions(pictures, tmp_path, capsys):
    rows = [["image", "text", "kind"]]
    rows += [["pictures/0.png", "one", "owl"], ["pictures/1.png", "two", "cat"]]
    rows += [["./pictures/0.png", "of\nmany  words", "owl"], [str(pictures / "1.png"), "two", "cat"]]
    rows += [["pictures/2.png", "three", "owl"], ["pictures/2.png", "four", "cat"]]
    table = write_table(tmp_path / "t.csv", rows)
    source = from_csv(table, caption_column="text", label_column="kind", skip_bad=True)
    found = [(sample.key, sample.caption, sample.label) for sample in source.samples]
    assert found == [("000000000", "one\nof many words", 1), ("000000001", "two\ntwo", 0)]
    (skipped,) = source.skipped
    assert re.fullmatch(r".*t.csv, line 8: another label of .*2.png than at .*t.csv, line 7; allowed: one .*", skipped)
    assert len(list(from_csv(table, label_column="kind").samples)) == 6

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command = ["csv", str(table), "--caption-column", "text", "--output", str(tmp_path / "set"), "--split", "test"]
    run(parser.parse_args(command))
    assert "3 samples in 1 shards with captions; 6 rows name 3 images" in capsys.readouterr().out
    captions = sorted(sample.captions for sample in open_set(tmp_path / "set").samples())
    assert captions == [("one", "of many words"), ("three", "four"), ("two", "two")]


def test_tab_separated_table_with_root_and_indices(pictures, tmp_path):
    table = write_table(tmp_path / "t.tsv", [["file", "label"], ["3.png", "7"], ["1.png", "0"]], delimiter="\t")
    source = from_csv(table, image_column="file", label_column="label", root=pictures)
    assert source.classnames is None
    assert [(sample.label, sample.caption) for sample in source.samples] == [(7, None), (0, None)]


def test_table_with_given_names(pictures, tmp_path):
    table = write_table(tmp_path / "t.csv", [["image", "label"], ["0.png", "Owl"], ["1.png", "house_cat "]])
    options = {"label_column": "label", "root": pictures}

    def labels(*classnames, **more):
        source = from_csv(table, classnames=classnames, **options, **more)
        return source.classnames, [sample.label for sample in source.samples], source.skipped

    assert labels("house cat", "dog", "owl") == (["house cat", "dog", "owl"], [2, 0], [])
    with pytest.raises(
        InputError, match=r"column 'label': 1 of its 2 classes are not in the prompt set: 'house_cat'; "
    ):
        labels("cat", "owl")
    names, found, (line,) = labels("cat", "owl", skip_bad=True)
    assert (names, found) == (["cat", "owl"], [1])
    assert "t.csv, line 3: label 'house_cat '; allowed: one of 2 class names, such as 'cat'" in line
    assert labels("cat", "dog", by_order=True) == (["cat", "dog"], [0, 1], [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["5.png", "five", "0"], r"t.csv, line 3: cannot read .*5.png \(No such file or directory\)"),
        (["bad.png", "bad", "0"], r"t.csv, line 3: .*bad.png: not a readable image"),
        (["", "none", "0"], r"t.csv, line 3: column 'image' is empty; allowed: the path of an image"),
        (["1.png", " ", "0"], r"t.csv, line 3: caption ' '; allowed: a non-empty text"),
        (["1.png"], r"t.csv, line 3: caption ''; allowed: a non-empty text"),
        (["1.png", "one", "-1"], r"t.csv, line 3: label '-1'; allowed: a class name or an index from 0 to 1"),
    ],
)
def test_bad_rows(pictures, tmp_path, row, message):
    (pictures / "bad.png").write_bytes(b"\x89PNG")
    rows = [["image", "caption", "label"], ["0.png", "zero", "0"], row, ["2.png", "two", "1"]]
    table = write_table(tmp_path / "t.csv", rows)
    options = {
        "caption_column": "caption",
        "label_column": "label",
        "root": pictures,
        "classnames": ["a", "b"],
    }
    with pytest.raises(InputError, match=message):
        list(from_csv(table, **options).samples)
    source = from_csv(table, skip_bad=True, **options)
    assert [sample.key for sample in source.samples] == ["000000000", "000000002"]
    assert len(source.skipped) == 1


def test_errors_of_tables(tmp_path):
    table = write_table(tmp_path / "t.csv", [["image", "text"]])
    with pytest.raises(InputError, match=r"t.csv: no column 'caption'; allowed: image, text"):
        from_csv(table, caption_column="caption")
    with pytest.raises(InputError, match="delimiter: '::'; allowed: a single character"):
        from_csv(table, delimiter="::")
    with pytest.raises(InputError, match=r"nowhere.csv: no such file"):
        from_csv(tmp_path / "nowhere.csv")
    (tmp_path / "latin.csv").write_bytes("image\nä.png".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.csv:2: not UTF-8"):
        from_csv(tmp_path / "latin.csv")


# --- Hugging Face datasets ---


@pytest.fixture(scope="module")
def datasets():
    """The library, which is slow to import."""
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(datasets, tmp_path):
    """A dataset on disk: pictures given as PIL images and as encoded files."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "owl"]),
            "kind": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
        }
    )
    jpeg = encode(picture(2), "JPEG")
    columns = {
        "image": [picture(0), picture(1), {"bytes": jpeg, "path": "c.jpg"}],
        "label": [1, 0, 1],
        "kind": ["wild", "tame", "wild"],
        "captions": [["first", "second"], ["an  owl"], ["third"]],
    }
    dataset = datasets.Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "two")
    return tmp_path


def test_saved_dataset(saved, tmp_path):
    source = from_hf_dataset(str(saved / "one"), caption_column="captions", label_column="label")
    write_classification_folder(source.samples, tmp_path / "out", split="train", classnames=source.classnames)
    assert source.classnames == ["cat", "owl"]
    back = read(tmp_path / "out" / "train")
    assert [sample["txt"].decode() for sample in back] == ["first\nsecond", "an owl", "third"]
    assert [sample["cls"] for sample in back] == [b"1", b"0", b"1"]
    np.testing.assert_array_equal(pixels(back[0]["png"]), np.asarray(picture(0)))
    np.testing.assert_array_equal(pixels(back[1]["png"]), np.asarray(picture(1)))
    assert back[2]["jpg"] == encode(picture(2), "JPEG")


def test_saved_splits(saved):
    name = str(saved / "two")
    assert len(list(from_hf_dataset(name).samples)) == 3
    assert len(list(from_hf_dataset(name, split="test").samples)) == 1
    with pytest.raises(InputError, match="two: no split 'val'; allowed: train, test"):
        from_hf_dataset(name, split="val")


def test_dataset_labels(saved):
    name = str(saved / "one")
    by_name = from_hf_dataset(name, label_column="kind")
    assert by_name.classnames == ["tame", "wild"]
    assert [sample.label for sample in by_name.samples] == [1, 0, 1]
    renamed = from_hf_dataset(name, label_column="label", classnames=["house cat", "barn owl"], by_order=True)
    assert renamed.classnames == ["house cat", "barn owl"]
    assert [sample.label for sample in renamed.samples] == [1, 0, 1]
    reordered = from_hf_dataset(name, label_column="label", classnames=["Owl", "emu", "cat"])
    assert [sample.label for sample in reordered.samples] == [0, 2, 0]
    with pytest.raises(InputError, match="one: column 'label': 1 of its 2 classes are not in the prompt set: 'cat'; "):
        from_hf_dataset(name, label_column="label", classnames=["owl", "house cat"])


def test_dataset_shuffled(saved):
    plain = list(from_hf_dataset(str(saved / "one")).samples)
    mixed = list(from_hf_dataset(str(saved / "one"), shuffle_seed=1).samples)
    assert mixed != plain
    assert sorted(mixed, key=lambda sample: sample.key) == plain


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_data_files(datasets, image_folder, tmp_path, monkeypatch, streaming):
    """A folder that `datasets` itself understands: its own imagefolder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.rmtree(image_folder / "cat" / "old")
    (image_folder / "cat" / "notes.txt").unlink()
    source = from_hf_dataset(str(image_folder), label_column="label", streaming=streaming)
    expected = from_image_folder(image_folder)
    assert source.classnames == expected.classnames
    found = {(sample.image, sample.image_extension, sample.label) for sample in source.samples}
    assert found == {(sample.image, sample.image_extension, sample.label) for sample in expected.samples}


@pytest.mark.parametrize("streaming", [False, True])
def test_table_of_paths_by_datasets(datasets, pictures, tmp_path, monkeypatch, streaming):
    """Paths in a column of strings, one of them a URL."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tables").mkdir()
    rows = [["picture", "text"], [pictures / "1.png", "one"], [(pictures / "3.png").as_uri(), "three"]]
    write_table(tmp_path / "tables" / "t.csv", rows)
    source = from_hf_dataset(
        str(tmp_path / "tables"),
        image_column="picture",
        caption_column="text",
        streaming=streaming,
        image_root=pictures,
    )
    found = list(source.samples)
    assert [sample.caption for sample in found] == ["one", "three"]
    assert [sample.image for sample in found] == [encode(picture(1)), encode(picture(3))]


def test_bad_rows_of_a_dataset(datasets, pictures, tmp_path):
    (pictures / "bad.png").write_bytes(b"\x89PNG")
    files = [str(pictures / name) for name in ("0.png", "bad.png", "gone.png")] + [
        None,
        str(pictures / "1.png"),
    ]
    columns = {"image": files, "text": ["a", "b", "c", "d", None]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "d")
    source = from_hf_dataset(str(tmp_path / "d"), caption_column="text", skip_bad=True, image_root=pictures)
    assert [sample.key for sample in source.samples] == ["000000000"]
    reasons = [line.removeprefix(f"{tmp_path}/d, ").split(" (")[0] for line in source.skipped]
    assert reasons == [
        f"row 1: {pictures}/bad.png: not a readable image",
        f"row 2: cannot read {pictures}/gone.png",
        "row 3: no image; allowed: an image in every row",
        "row 4: caption None; allowed: a non-empty text",
    ]


@pytest.mark.parametrize("form", ["struct", "text"])
def test_cells_name_no_file_outside_of_the_dataset(datasets, pictures, tmp_path, form):
    """A table from elsewhere copies no picture of this machine into shards or into an evaluation."""
    folder = tmp_path / "received"
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "a").write_bytes(encode(picture(0)))
    (folder / "link").symlink_to(pictures / "1.png")
    paths = ["own/a", str(folder / "own" / "a"), str(pictures / "1.png"), "../pictures/1.png", "link"]
    paths += [(pictures / "1.png").as_uri(), f"local://{pictures}/1.png", f"simplecache::file://{pictures}/1.png"]
    cells = paths if form == "text" else [{"bytes": None, "path": path} for path in paths]
    column = pyarrow.array(cells)
    labels = pyarrow.array([0] * len(paths))
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": labels}), folder / "t.parquet")

    source = from_hf_dataset(str(folder), skip_bad=True)
    assert [sample.image for sample in source.samples] == [encode(picture(0))] * 2
    assert len(source.skipped) == 6
    for line in source.skipped:
        assert "is not a file of the data set; allowed: embedded images, files in the data set's folder, or " in line
    allowed = from_hf_dataset(str(folder), skip_bad=True, image_root=pictures)
    assert len(list(allowed.samples)) == 6

    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "classnames.txt").write_text("a\nb\n")
    (tmp_path / "prompts" / "templates.txt").write_text("{c}\n")
    data = open_set(folder, split="train", prompts=str(tmp_path / "prompts"))
    assert [sample.data for sample in data.samples(range(2))] == [encode(picture(0))] * 2
    for position in range(2, 8):
        with pytest.raises(InputError, match="is not a file of the data set"):
            next(data.samples(range(position, position + 1)))


def test_errors_of_datasets(saved, tmp_path):
    name = str(saved / "one")
    with pytest.raises(InputError, match="one: no column 'text'; allowed: image, label, kind, captions"):
        from_hf_dataset(name, caption_column="text")
    with pytest.raises(InputError, match="streaming: cannot be combined with a shuffle; allowed: one of the two"):
        from_hf_dataset(name, streaming=True, shuffle_seed=0)
    with pytest.raises(InputError, match=r"nowhere, split .*: cannot be loaded: .+"):
        from_hf_dataset(str(tmp_path / "nowhere"))


# --- command line ---


def test_folder_command(image_folder, tmp_path, capsys):
    shards_cli("folder", image_folder, "--output", tmp_path / "a", "--split", "test", "--samples-per-shard", 4)
    assert capsys.readouterr().out == (f"{tmp_path}/a/test: 6 samples in 2 shards, 2 classes; ignored: not images: 1\n")
    assert load_prompts(tmp_path / "a").templates == ("a photo of a {c}.",)
    (image_folder / "dog" / "c.jpg").write_bytes(b"")
    shards_cli("folder", image_folder, "--output", tmp_path / "a", "--skip-bad", "--keep-order")
    output = capsys.readouterr()
    assert (
        output.out
        == f"{tmp_path}/a/train: 6 samples in 1 shards, 2 classes; 1 bad rows skipped; ignored: not images: 1\n"
    )
    assert output.err.startswith(f"skipped: {image_folder}/dog/c.jpg: not a readable image")
    assert [sample["cls"] for sample in read(tmp_path / "a" / "train")] == [
        b"0",
        b"0",
        b"0",
        b"0",
        b"1",
        b"1",
    ]


def test_csv_command(pictures, tmp_path, capsys):
    table = write_table(tmp_path / "t.csv", [["image", "words", "n"], ["0.png", "zero", 2], ["1.png", "one", 1]])
    common = ["csv", table, "--root", pictures]
    shards_cli(*common, "--output", tmp_path / "a", "--caption-column", "words")
    assert (tmp_path / "a" / "dataset_type.txt").read_text() == "retrieval\n"
    shards_cli(*common, "--output", tmp_path / "b", "--label-column", "n")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["train"]
    shards_cli(*common, "--output", tmp_path / "c", "--label-column", "n", "--prompts", "cifar10")
    assert load_prompts(tmp_path / "c").classnames == load_prompts("cifar10").classnames
    assert load_prompts(tmp_path / "c").templates == load_prompts("cifar10").templates
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a/train: 2 samples in 1 shards with captions",
        f"{tmp_path}/b/train: 2 samples in 1 shards",
        f"{tmp_path}/c/train: 2 samples in 1 shards, 10 classes",
    ]
    with pytest.raises(
        InputError, match="--prompts: given without --label-column; allowed: only together with --label-column"
    ):
        shards_cli(*common, "--output", tmp_path / "d", "--prompts", "cifar10")


def test_hf_command(saved, tmp_path, capsys):
    common = ["hf", saved / "two", "--source-split", "test", "--split", "val", "--label-column", "label"]
    shards_cli(*common, "--output", tmp_path / "a")
    assert capsys.readouterr().out == f"{tmp_path}/a/val: 1 samples in 1 shards, 2 classes\n"
    with pytest.raises(InputError, match="a/val: exists already"):
        shards_cli(*common, "--output", tmp_path / "a")


@pytest.mark.parametrize("command", ["icons", "folder", "csv", "hf"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        shards_cli(command, "--help")
    assert caught.value.code == 0
    assert "--output DIR" in capsys.readouterr().out
