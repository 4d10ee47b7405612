"""Shards made with a prompt set: every label is that of the class's name, from each kind of source."""

import csv
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from clipdistill.cli import main
from clipdistill.models.prompts import load_prompts
from tests.conftest import CLASSES, COLOURS, png

NAMES = ("Red", "map_pin", "blue", "x/y")
"""Spellings of the classes in the sources; a folder has a dash for the stroke."""
PROMPTS = ("blue", "x y", "kiwi", "red", "map pin")
LABELS = (3, 4, 0, 1)
COUNT = 12


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "classnames.txt").write_text("\n".join(PROMPTS))
    (folder / "templates.txt").write_text("{c}\n")
    return folder


def picture(number: int) -> bytes:
    return png(COLOURS[number % 4], seed=number)


def image_folder(root: Path, names: tuple[str, ...] = NAMES, *, below: str = "") -> list[str]:
    for number in range(COUNT):
        path = root / "source" / below / names[number % 4].replace("/", "-") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return ["folder", str(root / "source")]


def csv_table(root: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    image_folder(root, CLASSES)
    with (root / "t.csv").open("w", newline="") as file:
        rows = [[f"source/{CLASSES[number % 4]}/{number}.png", names[number % 4]] for number in range(COUNT)]
        csv.writer(file).writerows([["image", "label"], *rows])
    return ["csv", str(root / "t.csv"), "--label-column", "label"]


def data_set(root: Path, feature: object, values: tuple[object, ...]) -> list[str]:
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    images = [{"bytes": picture(number), "path": None} for number in range(COUNT)]
    labels = [values[number % 4] for number in range(COUNT)]
    saved = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    saved.save_to_disk(str(root / "saved"))
    return ["hf", str(root / "saved"), "--label-column", "label"]


def class_label(root: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    return data_set(root, datasets.ClassLabel(names=list(names)), (0, 1, 2, 3))


def texts(root: Path, names: tuple[str, ...] = NAMES) -> list[str]:
    return data_set(root, datasets.Value("string"), names)


SOURCES: dict[str, Callable[..., list[str]]] = {
    "folder": image_folder,
    "csv": csv_table,
    "ClassLabel": class_label,
    "texts": texts,
}


def make(*words: object) -> int:
    return main(["shards", *map(str, words)])


def labels(folder: Path) -> dict[bytes, int]:
    """Label of each picture."""
    found = {}
    with tarfile.open(folder / "train" / "0.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    for name, content in members.items():
        if name.endswith(".png"):
            found[content] = int(members[name.removesuffix(".png") + ".cls"])
    return found


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("names", [NAMES, tuple(map(str, LABELS))])
def test_labels_are_those_of_the_names(prompts: Path, tmp_path: Path, source: str, names: tuple[str, ...]) -> None:
    assert make(*SOURCES[source](tmp_path, names), "--output", tmp_path / "out", "--prompts", prompts) == 0
    assert load_prompts(tmp_path / "out").classnames == PROMPTS
    assert labels(tmp_path / "out") == {picture(number): LABELS[number % 4] for number in range(COUNT)}


@pytest.mark.parametrize("source", SOURCES)
def test_a_stranger_is_refused_and_nothing_is_written(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    command = SOURCES[source](tmp_path, ("red", "mappin", "blue", "x y"))
    (prompts / "classnames.txt").write_text("blue\nx y\nred\nmap pin\n")
    assert make(*command, "--output", tmp_path / "out", "--prompts", prompts) == 2
    error = capsys.readouterr().err.partition("clipdistill: ")[2]
    assert "1 of its 4 classes are not in the prompt set: 'mappin'; of the prompt set, 1 are not in it: 'map" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert make(*command, "--output", tmp_path / "out", "--prompts", prompts, "--labels-by-order") == 0


def test_numbered_classes_without_prompts_are_in_numeric_order(tmp_path: Path) -> None:
    assert make(*image_folder(tmp_path, ("0", "2", "10", "1")), "--output", tmp_path / "out") == 0
    assert load_prompts(tmp_path / "out").classnames == ("0", "1", "2", "10")
    assert labels(tmp_path / "out") == {picture(number): (0, 2, 3, 1)[number % 4] for number in range(COUNT)}


def test_whole_floats_of_a_table_are_indices(prompts: Path, tmp_path: Path) -> None:
    command = csv_table(tmp_path, ("3.0", "4.0", "0.0", "1.0"))
    for output, options in (("a", []), ("b", ["--prompts", prompts])):
        assert make(*command, "--output", tmp_path / output, *options) == 0
        assert labels(tmp_path / output) == {picture(number): LABELS[number % 4] for number in range(COUNT)}


def test_truth_values_are_two_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: Path) -> None:
    command = data_set(tmp_path, datasets.Value("bool"), (True, False, True, True))
    assert make(*command, "--output", tmp_path / "out") == 0
    assert load_prompts(tmp_path / "out").classnames == ("False", "True")
    assert labels(tmp_path / "out") == {picture(number): int(number % 4 != 1) for number in range(COUNT)}
    assert make(*command, "--output", tmp_path / "other", "--prompts", prompts) == 2
    assert "not in the prompt set: 'False', 'True'" in capsys.readouterr().err


def test_the_class_list_of_a_folder_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = image_folder(tmp_path, below="train")
    image_folder(tmp_path, below="val")
    (tmp_path / "source" / "classnames.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "source" / "templates.txt").write_text("my {c}\n")
    (tmp_path / "source" / "train" / ".hidden.png").touch()
    assert make(*command, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith(
        f"12 samples in 1 shards, 5 classes; from {tmp_path}/source/train; ignored: hidden: 1\n"
    )
    written = load_prompts(tmp_path / "out")
    assert (written.classnames, written.templates) == (PROMPTS, ("my {c}",))
    assert labels(tmp_path / "out") == {picture(number): LABELS[number % 4] for number in range(COUNT)}
    assert make("folder", tmp_path / "source" / "val", "--output", tmp_path / "again") == 0
    assert labels(tmp_path / "again") == labels(tmp_path / "out")
    assert make(*command, "--output", tmp_path / "out", "--split", "test") == 2
    assert (
        "source: no split 'test', but folders of classes in its splits; allowed: train, val" in capsys.readouterr().err
    )


def test_by_order_needs_a_list_to_be_in_order_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(*csv_table(tmp_path), "--output", tmp_path / "out", "--labels-by-order") == 2
    assert "--labels-by-order: given without --prompts" in capsys.readouterr().err
