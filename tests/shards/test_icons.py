"""The icon fonts: classes, captions, splits, layout, pictures and the reuse of a rendered folder."""

import argparse
import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from clipdistill.errors import InputError
from clipdistill.io.resources import resource
from clipdistill.shards.command import add_arguments, run
from clipdistill.shards.icons import Glyph, find_fonts, render_icons

SIZE = 32
GROUPS = {"fa5s": "fa", "fa5r": "fa", "fa6s": "fa", "fa6r": "fa", "fa6b": "fa"}
GROUPS |= {"mdi6": "mdi", "ph": "ph", "msc": "msc", "ei": "ei"}
CLASSNAMES = resource("prompts", "icons", "classnames.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def icons(tmp_path_factory):
    """The folder of all fonts, rendered once, and its summary."""
    output = tmp_path_factory.mktemp("icons") / "icons"
    return output, render_icons(output, size=SIZE)


@pytest.fixture(scope="module")
def splits(icons):
    """Samples of each split, read by webdataset: member names to bytes."""
    folder, _ = icons
    folders = {"train": folder / "train", "val": folder / "val" / "test", "test": folder / "test" / "test"}
    return {
        split: list(webdataset.WebDataset([str(tar) for tar in sorted(shards.glob("*.tar"))], shardshuffle=False))
        for split, shards in folders.items()
    }


def family_of(sample):
    return json.loads(sample["json"])["family"]


@pytest.mark.slow
def test_a_long_tailed_training_set(tmp_path, icons):
    """Counts fall exponentially from the imbalance to 1; drawings are those of the whole set, each as often as its
    class needs; the same seed gives the same bytes."""
    whole, _ = icons
    original = {sample["__key__"]: (sample["png"], sample["cls"]) for sample in read_split(whole) if "cls" in sample}
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        summary = render_icons(tmp_path / name, size=SIZE, imbalance=50, seed=seed)
        assert (summary.imbalance, summary.seed) == (50, seed)
        found[name] = [(sample["__key__"], sample["png"], sample["cls"]) for sample in read_split(tmp_path / name)]
    assert found["a"] == found["b"]
    assert found["a"] != found["c"]
    counts = Counter(int(label) for _, _, label in found["a"])
    drawings = Counter(int(label) for _, label in original.values())
    ranked = sorted(counts.values(), reverse=True)
    assert ranked == [round(50 ** (1 - rank / (len(drawings) - 1))) for rank in range(len(drawings))]
    listed = dict(json.loads((tmp_path / "a" / "train" / "class_counts.json").read_text()))
    assert listed == {name: counts[label] for label, name in enumerate(CLASSNAMES)}
    for label, count in counts.items():
        for other in counts:
            assert drawings[label] >= drawings[other] or count <= counts[other]
    for key, picture, label in found["a"]:
        assert original[key.partition("+")[0]] == (picture, label)
    assert len({key for key, _, _ in found["a"]}) == len(found["a"])
    for split in ("val", "test"):
        tar = Path(split, "test", "0.tar")
        assert (tmp_path / "a" / tar).read_bytes() == (whole / tar).read_bytes()
    with pytest.raises(InputError, match=r"holds icons of imbalance 50; allowed: None, or a new folder"):
        render_icons(tmp_path / "a", size=SIZE)
    with pytest.raises(InputError, match=r"imbalance: 1; allowed: 2 to 1000"):
        render_icons(tmp_path / "d", size=SIZE, imbalance=1)


def read_split(folder):
    shards = [str(tar) for tar in sorted((folder / "train").glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def test_shipped_prompts():
    assert len(CLASSNAMES) == 240
    assert sorted(set(CLASSNAMES)) == CLASSNAMES
    assert resource("prompts", "icons", "templates.txt").read_text() == "{c}\n"


@pytest.mark.parametrize(
    ("family", "name", "concept"),
    [
        ("ri", "arrow-down-circle-2-fill", "arrow down circle"),
        ("ri", "line-chart-line", "line chart"),
        ("ph", "bell-ringing-duotone", "bell ringing"),
        ("ph", "number-circle-seven-light", "number circle seven"),
        ("fa6s", "traffic-light", "traffic light"),
        ("mdi6", "traffic-light-outline", "traffic light"),
        ("mdi6", "lock-open-variant-outline", "lock open"),
        ("mdi6", "format-header-1", "format header"),
        ("fa5s", "ticket-alt", "ticket"),
        ("msc", "circle-outline", "circle outline"),
        ("fa6s", "0", "0"),
        ("fa6b", "500px", "500px"),
    ],
)
def test_concepts(family, name, concept):
    assert Glyph(family=family, name=name, character="x").concept == concept


def test_counts(icons, splits):
    _, summary = icons
    assert summary.classes == 240
    assert summary.samples == {split: len(samples) for split, samples in splits.items()}
    for split, samples in splits.items():
        families = [family_of(sample) for sample in samples]
        assert summary.families[split] == {family: families.count(family) for family in set(families)}
    assert summary.empty == ["fa5r-font-awesome-logo-full", "fa5s-font-awesome-logo-full", "msc-blank"]


def test_every_named_glyph_is_somewhere(splits):
    """Two drawings of these fonts are missing: plain squares, like the "stop" kept for validation."""
    fonts, _ = find_fonts()
    found = {sample["__key__"] for split in ("train", "val") for sample in splits[split]}
    missing = set()
    for family, font in {"mdi6": "materialdesignicons6", "ph": "phosphor", "ei": "elusiveicons"}.items():
        (charmap,) = fonts.glob(f"{font}*.json")
        missing |= {f"{family}-{name}" for name in json.loads(charmap.read_text())} - found
    assert missing == {"mdi6-solid", "mdi6-square"}


def test_held_out_family(splits):
    assert {family_of(sample) for sample in splits["test"]} == {"ri"}
    assert len(splits["test"]) == 701
    assert {int(sample["cls"]) for sample in splits["test"]} == set(range(240))
    for split in ("train", "val"):
        assert {family_of(sample) for sample in splits[split]} == set(GROUPS)


def test_labels_and_captions(splits):
    for samples in splits.values():
        for sample in samples:
            caption, name = sample["txt"].decode(), json.loads(sample["json"])["name"]
            assert name.replace("-", " ").startswith(caption)
            assert sample["__key__"] == f"{family_of(sample)}-{name}"
            if caption in CLASSNAMES:
                assert CLASSNAMES[int(sample["cls"])] == caption
            else:
                assert "cls" not in sample
    assert all("cls" in sample for split in ("val", "test") for sample in splits[split])


def test_validation_shares_nothing_with_training(splits):
    pairs = {
        split: {(GROUPS[family_of(sample)], sample["txt"]) for sample in splits[split] if "cls" in sample}
        for split in ("train", "val")
    }
    assert not pairs["train"] & pairs["val"]
    assert 0.15 < len(pairs["val"]) / len(pairs["train"] | pairs["val"]) < 0.25
    assert not {sample["png"] for sample in splits["train"]} & {sample["png"] for sample in splits["val"]}


def test_order_is_mixed(splits):
    first = [family_of(sample) for sample in splits["train"][:500]]
    share = {family: first.count(family) / 500 for family in ("mdi6", "ph", "fa6s")}
    assert share == pytest.approx({"mdi6": 7311 / 15637, "ph": 4375 / 15637, "fa6s": 1370 / 15637}, abs=0.07)


def test_pictures(splits):
    """White on black; the ink 28 of 32 pixels on its longer side, in the middle."""
    for sample in splits["test"] + splits["val"]:
        picture = Image.open(io.BytesIO(sample["png"]))
        assert (picture.mode, picture.size) == ("L", (SIZE, SIZE))
        left, top, right, bottom = picture.getbbox()
        assert max(right - left, bottom - top) == 28
        assert left + right == pytest.approx(SIZE, abs=1)
        assert top + bottom == pytest.approx(SIZE, abs=1)
        assert picture.getextrema()[1] > 150


@pytest.mark.parametrize("part", ["val", "test"])
def test_clip_benchmark_reads_it(icons, splits, part):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    folder, _ = icons
    dataset = builder.build_wds_dataset("wds/icons", lambda image: image, split="test", data_dir=str(folder / part))
    assert dataset.classes == CLASSNAMES
    assert dataset.templates == ["{c}"]
    assert [label for _, label in dataset] == [int(sample["cls"]) for sample in splits[part]]


def test_rendered_folder_is_reused(icons):
    folder, summary = icons
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert render_icons(folder, size=SIZE) == summary
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_rendered_folder_with_a_shard_gone_or_changed_is_not_reused(icons):
    folder, _ = icons
    shard = folder / "train" / "3.tar"
    content = shard.read_bytes()
    try:
        for damaged in (None, content[:-512], bytes([content[0] ^ 1]) + content[1:]):
            if damaged is None:
                shard.unlink()
            else:
                shard.write_bytes(damaged)
            with pytest.raises(InputError, match=r": train/3\.tar (is missing|has \d+ bytes|differs).*; allowed: the "):
                render_icons(folder, size=SIZE)
    finally:
        shard.write_bytes(content)


def test_command(icons, capsys):
    folder, _ = icons
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(["icons", "--output", str(folder), "--size", str(SIZE)]))
    output = capsys.readouterr().out
    assert output == f"{folder}: 15637 train, 271 val, 701 test icons of 32 px, 240 classes\n"


def test_other_settings_are_named(icons):
    folder, _ = icons
    with pytest.raises(InputError, match=r"holds icons of size 32; allowed: 48, or a new folder"):
        render_icons(folder, size=48)


def test_other_content_is_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"exists and holds no icons.json; allowed: a new folder"):
        render_icons(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_icons(tmp_path / "icons", size=SIZE, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [31, 513])
def test_size_out_of_range(tmp_path, size):
    with pytest.raises(InputError, match=f"size: {size}; allowed: 32 to 512 pixels"):
        render_icons(tmp_path / "icons", size=size)


def test_qtawesome_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qtawesome", None)
    with pytest.raises(InputError, match=r"qtawesome.* is not installed; allowed: pip install 'clipdistill\[demo\]'"):
        render_icons(tmp_path / "icons")


@pytest.mark.slow
def test_every_process_renders_the_same_bytes(icons, tmp_path):
    """With another hash seed, and without importing qtawesome."""
    folder, _ = icons
    script = (
        "import sys; from pathlib import Path; from clipdistill.shards.icons import render_icons\n"
        f"render_icons(Path('icons'), size={SIZE})\n"
        "assert 'qtawesome' not in sys.modules"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert (tmp_path / "icons" / path.relative_to(folder)).read_bytes() == path.read_bytes()
