"""The same pictures in every layout give the same answers; what is wrong with a set is one line."""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub.constants
import numpy as np
import pytest
from PIL import Image

from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet, evaluate_sets, load_for_evaluation, open_set, predict
from clipdistill.evaluation.sets.hub import Columns
from clipdistill.models.towers import Tower
from tests.conftest import CLASSES, colour_samples, write_tar
from tests.servers import Hub, NoRanges, Ranges, age, files, serving

COUNT = 26


@pytest.fixture(scope="module")
def tower(teacher_folder: Path) -> Tower:
    return load_for_evaluation(str(teacher_folder))


def shard_set(root: Path, samples: list[dict[str, Any]], *, kind: str = "classification") -> Path:
    """A folder in CLIP_benchmark's layout, with two shards."""
    for number in (0, 1):
        write_tar(root / "test" / f"{number}.tar", samples[number::2])
    (root / "test" / "nshards.txt").write_text("2")
    if kind != "classification":
        (root / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
        (root / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    return root


def npy(marks: list[int]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(marks))
    return buffer.getvalue()


def record(tower: Tower, data: EvaluationSet) -> dict[str, Any]:
    (found,) = evaluate_sets(tower, [data], model="tiny", batch_size=8, workers=2)
    return found["metrics"]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], EvaluationSet]]:
    """One set in several layouts; the classes are in another order in folders."""
    root = tmp_path_factory.mktemp("layouts")
    samples = colour_samples(COUNT)
    shard_set(root / "shards", samples)
    for sample in samples:
        path = root / "images" / "test" / CLASSES[sample["cls"]] / "deeper" / f"{sample['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    (root / "prompts").mkdir()
    (root / "prompts" / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (root / "prompts" / "templates.txt").write_text("a photo of a {c}.\n")
    rows = {
        "image": [{"bytes": sample["png"], "path": None} for sample in samples],
        "label": [sample["cls"] for sample in samples],
        "colour": [CLASSES[sample["cls"]] for sample in samples],
    }
    names = datasets.ClassLabel(names=list(CLASSES))
    features = datasets.Features({"image": datasets.Image(), "label": names, "colour": datasets.Value("string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(root / "saved"))
    datasets.DatasetDict({"test": table}).save_to_disk(str(root / "splits"))
    (root / "files").mkdir()
    table.to_parquet(str(root / "files" / "test-00000.parquet"))
    prompts = str(root / "prompts")
    return {
        "shards": lambda: open_set(root / "shards"),
        "images": lambda: open_set(root / "images"),
        "images named by prompts": lambda: open_set(root / "images", prompts=prompts),
        "one split of images": lambda: open_set(root / "images" / "test", prompts=prompts),
        "saved": lambda: open_set(root / "saved"),
        "saved splits": lambda: open_set(root / "splits"),
        "files": lambda: open_set(root / "files"),
        "labels of strings": lambda: open_set(root / "saved", columns=Columns(label="colour"), prompts=prompts),
    }


def guesses(tower: Tower, data: EvaluationSet) -> list[tuple[str, str]]:
    """True and guessed class name of each sample, sorted."""
    found, names = predict(tower, data, batch_size=8), data.prompts.classnames
    pairs = zip(found.labels_N.tolist(), found.logits_NC.argmax(1).tolist(), strict=True)
    return sorted((names[label], names[guess]) for label, guess in pairs)


@pytest.mark.parametrize(
    "name",
    [
        "images",
        "images named by prompts",
        "one split of images",
        "saved",
        "saved splits",
        "files",
        "labels of strings",
    ],
)
def test_layouts_agree(tower: Tower, layouts: dict[str, Callable[[], EvaluationSet]], name: str) -> None:
    data, reference = layouts[name](), layouts["shards"]()
    found = guesses(tower, data)
    assert found == guesses(tower, reference)
    assert len(found) == COUNT
    assert data.identity() == layouts[name]().identity() != reference.identity()


def test_a_folder_of_img2datasets_is_read_from_its_tar_files(tower: Tower, tmp_path: Path) -> None:
    """Not from the tables beside them, which also list pictures that could not be fetched."""
    samples = colour_samples(COUNT)
    folder = tmp_path / "fetched"
    for shard in range(2):
        fetched = [{name: each[name] for name in ("key", "png", "txt")} for each in samples[shard::2]]
        write_tar(folder / f"{shard:05d}.tar", [each | {"json": json.dumps({"caption": "no"})} for each in fetched])
        rows = {"url": ["https://example.org/a"] * 20, "caption": ["a table's"] * 20, "status": ["success"] * 20}
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{shard:05d}.parquet"))
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 20}')
    data = open_set(folder)
    assert (data.name, data.kind) == ("fetched", "retrieval")
    assert sorted(sample.captions for sample in data.samples()) == sorted((sample["txt"],) for sample in samples)
    captioned = [{name: each[name] for name in ("key", "png", "txt")} for each in samples]
    assert record(tower, data) == record(tower, open_set(shard_set(tmp_path / "set", captioned, kind="retrieval")))

    for shard in range(2):
        write_tar(folder / f"{shard:05d}.tar", samples[shard::2])
    with pytest.raises(InputError, match=r"fetched: .*classnames\.txt"):
        open_set(folder)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (tmp_path / "p" / "templates.txt").write_text("a photo of a {c}.\n")
    labelled = open_set(folder, prompts=str(tmp_path / "p"))
    assert record(tower, labelled) == record(tower, open_set(shard_set(tmp_path / "classes", samples)))
    write_tar(folder / "00000.tar", [{"key": "a", "png": samples[0]["png"], "json": "{}"}])
    with pytest.raises(InputError, match=r"00000\.tar: begins with png, json; allowed: an image and one of cls, npy"):
        open_set(folder)


def test_classes_of_other_names_are_matched_by_order_on_request_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for sample in colour_samples(8):
        path = tmp_path / "set" / "test" / f"n0{sample['cls']}" / f"{sample['key']}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (tmp_path / "p" / "templates.txt").write_text("{c}\n")
    with pytest.raises(InputError, match=r"4 of its 4 classes are not in prompts p: 'n00', .* or --labels-by-order: "):
        open_set(tmp_path / "set", prompts=str(tmp_path / "p"))
    data = open_set(tmp_path / "set", prompts=str(tmp_path / "p"), by_order=True)
    assert [sample.label for sample in data.samples()] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert "labels by order, not by name: in prompts p 'n00' is 'red', 'n01' is 'green'" in caplog.text
    (tmp_path / "p" / "classnames.txt").write_text("red\nblue\n")
    with pytest.raises(InputError, match=r"set: 4 classes; allowed with --labels-by-order: 2, as in prompts p"):
        open_set(tmp_path / "set", prompts=str(tmp_path / "p"), by_order=True)


def test_captions_and_several_labels_of_a_dataset(tower: Tower, tmp_path: Path) -> None:
    """A data set of the library and shards of the same give the same metrics, bit for bit."""
    samples = colour_samples(COUNT)
    captions = [[f"{sample['txt']} {n}", f"number {n}"][: 1 + n % 2] for n, sample in enumerate(samples)]
    marks = [[sample["cls"], (sample["cls"] + n) % 4][: 1 + n % 2] for n, sample in enumerate(samples)]
    table = datasets.Dataset.from_dict(
        {"picture": [sample["png"] for sample in samples], "caption": captions, "shown": marks},
        features=datasets.Features(
            {
                "picture": datasets.Value("binary"),
                "caption": datasets.List(datasets.Value("string")),
                "shown": datasets.List(datasets.ClassLabel(names=list(CLASSES))),
            }
        ),
    )
    table.save_to_disk(str(tmp_path / "saved"))
    ordered = samples[0::2] + samples[1::2]
    order = [samples.index(sample) for sample in ordered]
    table.select(order).save_to_disk(str(tmp_path / "ordered"))
    multi = [
        {"key": sample["key"], "png": sample["png"], "npy": npy([int(c in shown) for c in range(4)])}
        for sample, shown in zip(samples, marks, strict=True)
    ]
    texts = [
        {"key": sample["key"], "png": sample["png"], "txt": "\n".join(lines)}
        for sample, lines in zip(samples, captions, strict=True)
    ]
    picture = Columns(image="picture", label="shown")
    assert record(tower, open_set(tmp_path / "ordered", columns=picture)) == record(
        tower, open_set(shard_set(tmp_path / "multi", multi, kind="multilabel"))
    )
    picture = Columns(image="picture", caption="caption")
    assert record(tower, open_set(tmp_path / "ordered", columns=picture)) == record(
        tower, open_set(shard_set(tmp_path / "texts", texts, kind="retrieval"))
    )


class Counting(Ranges):
    """Counts the requests for shards, and all that are made of them."""

    shards = 0
    requests = 0

    def do_GET(self) -> None:
        Counting.shards += self.path.endswith(".tar")
        Counting.requests += self.path.endswith(".tar")
        super().do_GET()

    def do_HEAD(self) -> None:
        Counting.requests += self.path.endswith(".tar")
        super().do_HEAD()


def test_a_set_over_http_is_read_once(tower: Tower, tmp_path: Path) -> None:
    shard_set(tmp_path / "site" / "colours", colour_samples(COUNT))
    age(tmp_path / "site")
    local = open_set(tmp_path / "site" / "colours")
    with serving(files(tmp_path / "site", Counting)) as url:
        direct = open_set(f"{url}/colours")
        assert direct.name == "colours"
        assert record(tower, direct) == record(tower, local)
        first = open_set(f"{url}/colours/", cache=tmp_path / "cache")
        assert record(tower, first) == record(tower, local)
        Counting.shards = 0
        again = open_set(f"{url}/colours", cache=tmp_path / "cache")
        assert record(tower, again) == record(tower, local)
        assert Counting.shards == 0
        assert first.identity() == again.identity() == direct.identity()
        write_tar(tmp_path / "site" / "colours" / "test" / "0.tar", colour_samples(5, first=50))
        assert len(open_set(f"{url}/colours", cache=tmp_path / "cache")) == 5 + COUNT // 2
    assert not list((tmp_path / "cache" / "copies").glob(".*"))


def test_copies_of_shards_need_no_network(tmp_path: Path) -> None:
    """Each shard is looked up once, when the set is opened; a lost copy is made again, or missed in one line."""
    shard_set(tmp_path / "site", colour_samples(COUNT))
    age(tmp_path / "site")
    with serving(files(tmp_path / "site", Counting)) as url:
        open_set(url, cache=tmp_path / "cache")
        Counting.requests = 0
        data = open_set(url, cache=tmp_path / "cache")
        assert Counting.requests == 2
        keys = [sample.key for sample in data.samples()]
        assert Counting.requests == 2
        for copy in (tmp_path / "cache" / "copies").iterdir():
            copy.unlink()
        assert [sample.key for sample in data.samples()] == keys
        for copy in (tmp_path / "cache" / "copies").iterdir():
            copy.unlink()
        (tmp_path / "site" / "test" / "0.tar").unlink()
        with pytest.raises(InputError, match=rf"shard {url}/test/0.tar: cannot be read: .*") as caught:
            list(data.samples())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("handler", [Ranges, NoRanges])
def test_a_time_of_this_very_second_tells_no_versions_apart(tmp_path: Path, handler: type[NoRanges]) -> None:
    """Without ETag, a shard may be written twice within the second of its Last-Modified."""
    shard_set(tmp_path / "site", colour_samples(COUNT))
    relabelled = [sample | {"cls": 3 - sample["cls"]} for sample in colour_samples(COUNT)]
    with serving(files(tmp_path / "site", handler)) as url:
        before = open_set(url, cache=tmp_path / "cache").identity()
        stamps = {path: path.stat() for path in (tmp_path / "site" / "test").glob("*.tar")}
        shard_set(tmp_path / "site", relabelled)
        for path, info in stamps.items():
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
            assert path.stat().st_size == info.st_size
        time.sleep(2.5)
        data = open_set(url, cache=tmp_path / "cache")
        assert [sample.label for sample in data.samples()] == [
            sample["cls"] for sample in relabelled[::2] + relabelled[1::2]
        ]
        assert data.identity() != before
        assert len(list((tmp_path / "cache" / "copies").iterdir())) == 4


def test_a_damaged_copy_of_a_shard_is_made_again(tmp_path: Path) -> None:
    shard_set(tmp_path / "site", colour_samples(COUNT))
    with serving(files(tmp_path / "site", Counting)) as url:
        identity = open_set(url, cache=tmp_path / "cache").identity()
        for copy in (tmp_path / "cache" / "copies").iterdir():
            content = bytearray(copy.read_bytes())
            content[700] ^= 1
            copy.write_bytes(content)
        assert open_set(url, cache=tmp_path / "cache").identity() == identity
    assert len(list((tmp_path / "cache" / "copies").iterdir())) == 2


def test_a_set_on_the_hub_by_the_address_of_its_page(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CLIP_benchmark and DataComp name their sets."""
    folder = shard_set(tmp_path / "name", colour_samples(COUNT))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(files(folder, Hub)) as url:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url, "token": False})
        data = open_set("https://huggingface.co/datasets/owner/name/tree/main", cache=tmp_path / "cache")
        assert data.name == "name"
        assert record(tower, data) == record(tower, open_set(folder))


def test_what_a_remote_folder_lacks_is_said_of_its_url(tmp_path: Path) -> None:
    shard_set(tmp_path / "colours", colour_samples(4))
    (tmp_path / "colours" / "classnames.txt").unlink()
    with serving(files(tmp_path)) as url:
        with pytest.raises(InputError, match=rf"{url}/colours: .*classnames.txt"):
            open_set(f"{url}/colours")
        with pytest.raises(InputError, match=rf"{url}/colours/val/nshards.txt: ''; allowed: a positive number"):
            open_set(f"{url}/colours", split="val")
        (tmp_path / "colours" / "test" / "1.tar").unlink()
        (tmp_path / "colours" / "classnames.txt").write_text("a\nb\nc\nd\n")
        with pytest.raises(InputError, match=rf"shard {url}/colours/test/1.tar: cannot be read: .*404"):
            open_set(f"{url}/colours")


@pytest.mark.parametrize("kind", ["classification", "multilabel", "retrieval"])
def test_unreadable_images_are_counted_named_and_wrong(
    tower: Tower, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [sample | {"npy": npy([int(sample["cls"] == c) for c in range(4)])} for sample in colour_samples(12)]
    annotation = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}[kind]
    samples = [{name: s[name] for name in ("key", "png", annotation)} for s in samples]
    whole = record(tower, open_set(shard_set(tmp_path / "whole", samples, kind=kind)))
    assert whole["unreadable"] == 0
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 90).save(buffer, "PNG")
    bad = {2: b"no picture", 7: b"", 10: buffer.getvalue()[:400]}
    spoilt = [s | ({"png": bad[n]} if n in bad else {}) for n, s in enumerate(samples)]
    data = open_set(shard_set(tmp_path / "spoilt", spoilt, kind=kind))
    found = record(tower, data)
    assert found["unreadable"] == 3
    assert "3 of its 12 images cannot be read, and count as wrong" in caplog.text
    assert "s00002" in caplog.text
    rest = [s for n, s in enumerate(samples) if n not in bad]
    kept = record(tower, open_set(shard_set(tmp_path / "rest", rest, kind=kind)))
    if kind == "classification":
        assert found["acc1"] == pytest.approx(kept["acc1"] * 9 / 12)
        predictions = predict(tower, data)
        assert len(predictions.keys) == 12
        assert [line.split(": ")[1] for line in predictions.unreadable] == [
            f"sample {predictions.keys[n]}" for n in np.flatnonzero(~predictions.readable_N.numpy())
        ]
    if kind == "retrieval":
        assert found["text_retrieval_recall@1"] <= 9 / 12


def _dataset(root: Path, **columns: list[Any]) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(str(root / "saved"))
    return root / "saved"


def _one(root: Path, **changes: Any) -> Path:
    return shard_set(root / "set", [{**colour_samples(1)[0], **changes}])


def _all_unreadable(root: Path) -> Path:
    return shard_set(root / "set", [sample | {"png": b"no"} for sample in colour_samples(3)])


def _without(root: Path, name: str) -> Path:
    folder = shard_set(root / "set", colour_samples(4))
    (folder / name).unlink()
    return folder


def _counted(root: Path, count: str) -> Path:
    folder = shard_set(root / "set", colour_samples(4))
    (folder / "test" / "nshards.txt").write_text(count, encoding="utf-8")
    return folder


def _claim(header: str) -> bytes:
    """A npy file whose header claims what its two bytes of content do not hold."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\x00\x01"


def _marked(root: Path, content: bytes) -> Path:
    return shard_set(root / "set", [colour_samples(1)[0] | {"npy": content}], kind="multilabel")


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing there": (lambda root: root / "none", "none: no such folder; allowed: a folder or URL in CLIP_benchmark's"),
    "an empty folder": (lambda root: root, "no test/nshards.txt, class folders or data files"),
    "no class names": (lambda root: _without(root, "classnames.txt"), "needs the file classnames.txt"),
    "no templates": (lambda root: _without(root, "zeroshot_classification_templates.txt"), "templates.txt"),
    "a missing shard": (lambda root: _without(root, "test/1.tar"), "lists 2 shards, but .*1.tar is missing"),
    "more classes than names": (
        lambda root: _one(root, cls=4),
        r"sample s00000: label 4; allowed: 0 to 3 \(there are 4",
    ),
    "a negative label": (lambda root: _one(root, cls=-1), "label -1; allowed: 0 to 3"),
    "a label of words": (lambda root: _one(root, cls="bread"), "label 'bread'; allowed: 0 to 3 .*, or a name"),
    "no image": (
        lambda root: shard_set(root / "set", [{"key": "a", "cls": 1}]),
        r"holds 'cls', none of webp, png, jpg, jpeg \(a key ends at the first dot\); allowed: an image and cls",
    ),
    "no readable image": (_all_unreadable, "no image of 3 can be read; first .*s00000: unreadable image: not an image"),
    "no sample": (lambda root: shard_set(root / "set", []), "no sample"),
    "no caption": (
        lambda root: shard_set(root / "set", [colour_samples(1)[0] | {"txt": " "}], kind="retrieval"),
        "txt has no caption; allowed: one or more",
    ),
    "marks of another shape": (
        lambda root: shard_set(root / "set", [colour_samples(1)[0] | {"npy": npy([[1, 0]])}], kind="multilabel"),  # type: ignore[list-item]
        r"npy of shape \(1, 2\); allowed: one number per class",
    ),
    "marks of more classes": (
        lambda root: shard_set(root / "set", [colour_samples(1)[0] | {"npy": npy([0] * 6 + [1])}], kind="multilabel"),
        "label 6; allowed: 0 to 3",
    ),
    "pickled marks": (lambda root: _marked(root, b"\x80\x04K\x01."), "npy: .*; allowed: an array of 0 and 1"),
    "a claim of 10^13 marks": (
        lambda root: _marked(root, _claim("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,)}\n")),
        r"npy: ValueError: shape \(10000000000000,\) in 81 bytes; allowed: an array of 0 and 1",
    ),
    "a claim of 10^13 empty marks": (
        lambda root: _marked(root, _claim("{'descr': '|V0', 'fortran_order': False, 'shape': (10000000000000,)}\n")),
        "npy: ValueError: type",
    ),
    "more shards than any set": (lambda root: _counted(root, "300000000"), "'300000000'; allowed: a positive number"),
    "a number of shards that is none": (lambda root: _counted(root, "²"), "'²'; allowed: a positive number"),
    "a column that is not there": (lambda root: _dataset(root, label=[0, 1]), "no column 'image'; allowed: label"),
    "classes without names": (
        lambda root: _dataset(root, image=[b"x"], label=[0]),
        "classes in column 'label' have no names; allowed: names from --prompts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets_are_refused_in_one_line(tower: Tower, tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    folder = make(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        evaluate_sets(tower, [open_set(folder)], model="tiny")
    assert "\n" not in str(caught.value)
