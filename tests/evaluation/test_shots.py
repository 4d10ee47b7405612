"""Accuracy on frequent and rare classes: plain loops, class counts of every form, and the command."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.evaluation import open_set
from clipdistill.evaluation.sets.open import open_sets
from clipdistill.evaluation.settings import EvaluationSettings
from clipdistill.evaluation.shots import head_to_tail, shot_metrics
from clipdistill.models.class_counts import as_json, load_class_counts
from tests.conftest import CLASSES, COLOURS, png

COUNTS = [500, 101, 100, 20, 19, 1, 0]
RECALL = [0.9, 0.7, 0.5, math.nan, 0.4, 0.3, 0.2]


def test_shots_are_means_of_class_accuracies() -> None:
    found = shot_metrics(torch.tensor(RECALL, dtype=torch.float64), COUNTS)
    assert found == {
        "many_shot_acc1": pytest.approx(0.8),
        "medium_shot_acc1": pytest.approx(0.5),
        "few_shot_acc1": pytest.approx(0.3),
    }
    assert shot_metrics(torch.tensor(RECALL[:2]), COUNTS[:2])["few_shot_acc1"] is None


def test_the_curve_goes_from_head_to_tail_and_holds_every_class_once() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 300, (97,), generator=generator).tolist()
    recall_C = torch.rand(97, generator=generator, dtype=torch.float64)
    recall_C[13] = math.nan
    points = head_to_tail(recall_C, counts)
    samples = [point.training_samples for point in points]
    assert samples == sorted(samples, reverse=True)
    assert sum(point.classes for point in points) == 96
    mean = sum(point.classes * point.recall for point in points) / 96
    assert mean == pytest.approx(float(recall_C[recall_C.isfinite()].mean()))


@pytest.mark.parametrize(
    "content",
    [
        as_json(["cat", "Map Pin"], [3, 0]),
        json.dumps({"map_pin": 0, "cat": 3}),
        json.dumps([["map pin", 0], ["cat", 3]]),
    ],
)
def test_counts_go_to_classes_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "class_counts.json").write_text(content)
    for place in (tmp_path, tmp_path / "class_counts.json"):
        assert load_class_counts(place, ["cat", "map pin"], of="data pets") == (3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"cat": 3}', r"none for 1 classes of data pets, such as 'dog'; allowed: a number for each class, 0 for one"),
        ('{"cat": 3, "dog": 1, "owl": 2}', r"1 of its 3 classes are not in data pets: 'owl'"),
        ('{"cat": 3, "dog": -1}', r"\('dog', -1\); allowed: pairs of a class name and a number"),
        ('{"cat": 3, "dog": 1.5}', r"\('dog', 1\.5\); allowed: pairs"),
        ("[3, 4]", r"3; allowed: pairs of a class name"),
        ("{}", r"\{\}; allowed: pairs"),
        ("7", r"7; allowed: pairs"),
        ("[", r"not JSON: .*; allowed: pairs"),
        ('["a\\nb"]', r"'a\\nb'; allowed: pairs"),
    ],
)
def test_counts_that_do_not_fit_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "counts.json"
    file.write_text(content)
    with pytest.raises(InputError, match=rf"^class counts {file}: ({message})"):
        load_class_counts(file, ["cat", "dog"], of="data pets")


@pytest.fixture
def tailed(tmp_path: Path) -> Path:
    """Class folders of two splits: 21 training pictures of red, 3 of green, none of the others."""
    for split, classes in {"train": [0] * 21 + [1] * 3, "test": [0, 1, 2, 3] * 3}.items():
        for number, label in enumerate(classes):
            file = tmp_path / "photos" / split / CLASSES[label] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(COLOURS[label], seed=number))
    (tmp_path / "photos" / "classnames.txt").write_text("\n".join(CLASSES))
    for split in ("train", "test"):
        command = ["shards", "folder", str(tmp_path / "photos"), "--split", split, "--output", str(tmp_path / "set")]
        assert main(command) == 0
    return tmp_path / "set"


def test_from_class_folders_to_shots(tailed: Path, teacher_folder: Path, tmp_path: Path) -> None:
    """The counts of the training split are found, and used; a file that is named counts in their place."""
    counts = json.loads((tailed / "train" / "class_counts.json").read_text())
    assert dict(counts) == {"red": 21, "green": 3, "blue": 0, "grey": 0}
    assert open_set(tailed).class_counts == (21, 3, 0, 0)
    assert open_set(tailed, split="train").class_counts is None

    def evaluate(*arguments: object) -> dict[str, dict[str, float]]:
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        command = [
            "evaluate",
            "--model",
            teacher_folder,
            "--data",
            tailed,
            "--output",
            tmp_path / "results",
            *arguments,
        ]
        assert main([str(word) for word in command]) == 0
        (details,) = (tmp_path / "results").glob("*/details/*.json")
        found: dict[str, dict[str, float]] = json.loads(details.read_text())
        return found

    found = evaluate()
    recall = {each["name"]: each["recall"] for each in found["classes"]}
    metrics = found["record"]["metrics"]
    assert metrics["many_shot_acc1"] is None
    assert metrics["medium_shot_acc1"] == pytest.approx(recall["red"])
    few = [recall[name] for name in ("green", "blue", "grey")]
    assert metrics["few_shot_acc1"] == pytest.approx(sum(few) / 3)
    assert [point["training_samples"] for point in found["head_to_tail"]] == [21, 3, 0, 0]
    (tmp_path / "counts.json").write_text(json.dumps({"red": 200, "green": 200, "blue": 0, "grey": 0}))
    other = evaluate("--class-counts", tmp_path / "counts.json")
    assert other["key"] != found["key"]
    assert other["record"]["metrics"]["many_shot_acc1"] == pytest.approx((recall["red"] + recall["green"]) / 2)


def test_counts_of_other_classes(tailed: Path, teacher_folder: Path, colours: Path, tmp_path: Path) -> None:
    """Those that were found are left out; those that were named are refused, or go to the sets that they fit."""
    more = tmp_path / "more"
    more.mkdir()
    (more / "classnames.txt").write_text("\n".join([*CLASSES, "violet"]))
    (more / "templates.txt").write_text("{c}")
    assert open_set(tailed, prompts=str(more)).class_counts is None
    with pytest.raises(InputError, match="none for 1 classes of data set, such as 'violet'"):
        open_set(tailed, prompts=str(more), class_counts=tailed / "train")
    counts = tmp_path / "pets.json"
    counts.write_text('{"cat": 3, "dog": 2}')
    settings = EvaluationSettings(class_counts=str(counts))
    with pytest.raises(InputError, match="classes are not in data set"):
        open_sets([str(tailed)], settings, cache=tmp_path / "cache")
    (data,) = open_sets([str(tailed)], settings, cache=tmp_path / "cache", counts_must_fit=False)
    assert data.class_counts == (21, 3, 0, 0)
    counts.write_text(json.dumps({"red": 1, "green": 2, "blue": 3, "grey": 4}))
    pets = tmp_path / "pets"
    for number, name in enumerate(("cat", "dog")):
        (pets / "test" / name).mkdir(parents=True)
        (pets / "test" / name / "0.png").write_bytes(png(COLOURS[number]))
    both = open_sets([str(pets), str(colours / "set")], settings, cache=tmp_path / "cache")
    assert [each.class_counts for each in both] == [None, (1, 2, 3, 4)]


def test_shards_without_class_names_have_no_counts(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(COLOURS[0]))
    (tmp_path / "table.csv").write_text("image,caption\na.png,a red one\n")
    command = ["shards", "csv", str(tmp_path / "table.csv"), "--caption-column", "caption"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").rglob("class_counts.json"))
