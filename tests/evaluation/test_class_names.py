"""The true class of every sample, by its name, whatever the order and the spelling of the lists that name it."""

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.evaluation import EvaluationSet, evaluate_sets, load_for_evaluation, open_set
from clipdistill.evaluation.sets.hub import Columns
from tests.conftest import CLASSES, colour_samples, write_tar
from tests.servers import files, serving

PROMPTS = ("blue", "apple green", "red", "map pin", "grey")
"""Class names of the prompt set: one more than the data, in another order."""
NAMES = dict(zip(CLASSES, ("red", "apple green", "blue", "grey"), strict=True))
"""What the prompts call the colours."""
SAMPLES = colour_samples(22)
TRUTH = sorted(NAMES[CLASSES[sample["cls"]]] for sample in SAMPLES)


def prompts(root: Path, names: Sequence[str] = PROMPTS) -> str:
    (root / "p").mkdir(exist_ok=True)
    (root / "p" / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (root / "p" / "templates.txt").write_text("a {c} picture\n")
    return str(root / "p")


def folders(root: Path, names: Sequence[str], *, below: str = "") -> Path:
    """A folder for each class of `CLASSES`, in its order."""
    for sample in SAMPLES:
        path = root / "set" / below / names[sample["cls"]] / f"{sample['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    return root / "set"


def shards(root: Path, names: Sequence[str] | None, labels: Callable[[int], Any] = int) -> Path:
    write_tar(root / "set" / "test" / "0.tar", [sample | {"cls": labels(sample["cls"])} for sample in SAMPLES])
    (root / "set" / "test" / "nshards.txt").write_text("1")
    if names is not None:
        (root / "set" / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    return root / "set"


def table(root: Path, values: Sequence[Any], feature: Any) -> Path:
    """A data set with one value for each class of `CLASSES`."""
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    rows = {
        "image": [{"bytes": sample["png"], "path": None} for sample in SAMPLES],
        "label": [values[sample["cls"]] for sample in SAMPLES],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root / "set"))
    return root / "set"


def true_names(data: EvaluationSet) -> list[str]:
    return sorted(data.prompts.classnames[sample.label] for sample in data.samples())


SPELT = ("Red", "Apple_Green", "blue", "GREY")
INDICES = ("2", "1", "0", "4")
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "folders": lambda root: folders(root, SPELT),
    "folders of a split": lambda root: folders(root, SPELT, below="Test"),
    "folders of numbers": lambda root: folders(root, INDICES),
    "folders of padded numbers": lambda root: folders(root, [f"{int(n):03d}" for n in INDICES]),
    "shards with class names": lambda root: shards(root, SPELT),
    "shards without": lambda root: shards(root, None, lambda n: INDICES[n]),
    "shards with names as labels": lambda root: shards(root, None, lambda n: SPELT[n]),
    "shards with names as labels and class names": lambda root: shards(root, SPELT[::-1], lambda n: SPELT[n].lower()),
    "a ClassLabel": lambda root: table(root, range(4), datasets.ClassLabel(names=list(SPELT))),
    "a ClassLabel of numbers": lambda root: table(root, range(4), datasets.ClassLabel(names=list(INDICES))),
    "texts": lambda root: table(root, SPELT, datasets.Value("string")),
    "texts that are numbers": lambda root: table(root, INDICES, datasets.Value("string")),
    "whole floats": lambda root: table(root, [float(n) for n in INDICES], datasets.Value("float64")),
    "integers": lambda root: table(root, [int(n) for n in INDICES], datasets.Value("uint8")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_follow_names_into_prompts_of_another_order(tmp_path: Path, name: str) -> None:
    data = open_set(LAYOUTS[name](tmp_path), prompts=prompts(tmp_path))
    assert data.prompts.classnames == PROMPTS
    assert true_names(data) == TRUTH
    other = random.Random(1).sample(PROMPTS, len(PROMPTS))
    if "numbers" not in name and name not in ("integers", "whole floats", "shards without"):
        again = open_set(tmp_path / "set", prompts=prompts(tmp_path, other))
        assert true_names(again) == TRUTH
        assert again.identity() != data.identity()


OTHER = ("red", "applegreen", "blue", "grey")
STRANGERS: dict[str, Callable[[Path], Path]] = {
    "folders": lambda root: folders(root, OTHER),
    "shards": lambda root: shards(root, OTHER),
    "a ClassLabel": lambda root: table(root, range(4), datasets.ClassLabel(names=list(OTHER))),
    "texts": lambda root: table(root, OTHER, datasets.Value("string")),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_one_other_spelling_is_refused_and_listed(tmp_path: Path, name: str) -> None:
    folder = STRANGERS[name](tmp_path)
    with pytest.raises(
        InputError,
        match=r"^data set: 1 of its 4 classes are not in prompts p: 'applegreen'; of prompts p, 2 are not in it: "
        r"'apple green', 'map pin'; allowed: .* 4 and 5\)$",
    ):
        open_set(folder, prompts=prompts(tmp_path))
    data = open_set(folder, prompts=prompts(tmp_path, ("r", "g", "b", "w")), by_order=True)
    in_order = {"folders": (3, 0, 1, 2), "texts": (3, 0, 1, 2)}.get(name, range(4))
    expected = sorted(("r", "g", "b", "w")[in_order[sample["cls"]]] for sample in SAMPLES)
    assert true_names(data) == expected


def test_folders_of_flowers(tmp_path: Path) -> None:
    """Classes numbered from 1: refused, as one would be out of range; by order they are sorted as numbers."""
    for number in range(1, 103):
        path = tmp_path / "set" / str(number) / "x.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(SAMPLES[0]["png"])
    with pytest.raises(InputError, match=r"class number 102; allowed: 0 to 101, .*, or --labels-by-order: both lists"):
        open_set(tmp_path / "set", prompts="flowers102")
    data = open_set(tmp_path / "set", prompts="flowers102", by_order=True)
    assert {sample.key: sample.label for sample in data.samples()} == {f"{n}/x.png": n - 1 for n in range(1, 103)}


@pytest.mark.parametrize("below", ["", "test"])
def test_a_class_list_beside_folders_names_and_orders_them(tmp_path: Path, below: str) -> None:
    folder = folders(tmp_path, SPELT, below=below)
    for place in {folder, folder / below}:
        (place / "classnames.txt").write_text("blue\napple green\nred\nmap pin\ngrey\n")
        data = open_set(folder)
        assert data.prompts.classnames == PROMPTS
        assert data.prompts.templates == ("a photo of a {c}.",)
        assert true_names(data) == TRUTH
        (place / "zeroshot_classification_templates.txt").write_text("{c}!\n")
        assert open_set(folder).prompts.templates == ("{c}!",)
        (place / "classnames.txt").write_text("blue\ngreen\nred\ngrey\n")
        with pytest.raises(InputError, match=r"1 of its 4 classes are not in its classnames.txt: 'Apple_Green'"):
            open_set(folder)
        for file in place.glob("*.txt"):
            file.unlink()


def test_numbers_index_the_class_list_beside_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folders(tmp_path, ("3", "2", "11", "0"))
    assert open_set(folder).prompts.classnames == ("0", "2", "3", "11")
    assert "folders such as '0' are no names" in caplog.text
    names = [f"class {n}" for n in range(12)]
    names[3], names[2], names[11], names[0] = "red", "apple green", "blue", "grey"
    (folder / "classnames.txt").write_text("\n".join(names))
    assert true_names(open_set(folder)) == TRUTH
    assert true_names(open_set(folder, prompts=prompts(tmp_path))) == TRUTH


def test_prompts_for_a_remote_set_and_marks_of_several_classes(tmp_path: Path) -> None:
    own = ("grey", "blue", "apple green", "red")
    marks = [sorted({(3 - sample["cls"]), n % 4}) for n, sample in enumerate(SAMPLES)]
    samples = []
    for sample, marked in zip(SAMPLES, marks, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, np.isin(np.arange(4), marked).astype(int))
        samples.append({"key": sample["key"], "png": sample["png"], "npy": buffer.getvalue()})
    write_tar(shards(tmp_path, own) / "test" / "0.tar", samples)
    (tmp_path / "set" / "dataset_type.txt").write_text("multilabel")
    expected = {sample["key"]: {own[n] for n in marked} for sample, marked in zip(SAMPLES, marks, strict=True)}
    with serving(files(tmp_path)) as url:
        for place in (tmp_path / "set", f"{url}/set"):
            data = open_set(place, prompts=prompts(tmp_path))
            found = {sample.key: {PROMPTS[n] for n in sample.classes} for sample in data.samples()}
            assert found == expected


def test_prompts_of_another_order_give_the_figures_of_the_sets_own(
    teacher_folder: Path,
    colours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reversed class list with the same template gives the same metrics; by order it gives others, and a warning."""
    reversed_prompts = prompts(tmp_path, CLASSES[::-1])
    tower = load_for_evaluation(str(teacher_folder))
    (plain, renamed) = evaluate_sets(
        tower, [open_set(colours / "set"), open_set(colours / "set", prompts=reversed_prompts)], model="x"
    )
    for metric, value in plain["metrics"].items():
        assert renamed["metrics"][metric] == (value if value is None else pytest.approx(value, rel=1e-5))
    command = ["evaluate", "--model", str(teacher_folder), "--data", str(colours / "set"), "--device", "cpu"]
    command += ["--prompts", reversed_prompts, "--output", str(tmp_path / "results.json")]
    eces = []
    for flags in ([], ["--labels-by-order"]):
        assert main([*command, *flags]) == 0
        eces.append(json.loads((tmp_path / "results.json").read_text())["metrics"]["ece"])
    assert eces[0] == pytest.approx(plain["metrics"]["ece"], rel=1e-5) != eces[1]
    capsys.readouterr()
    assert "set: labels by order, not by name: in prompts p 'red' is 'grey', 'green' is 'blue'" in caplog.text
    prompts(tmp_path, "abcd")
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_truth_values_are_the_classes_false_and_true(tmp_path: Path) -> None:
    folder = table(tmp_path, (True, False, False, True), datasets.Value("bool"))
    expected = sorted(str(sample["cls"] in (0, 3)) for sample in SAMPLES)
    assert true_names(open_set(folder)) == expected
    assert true_names(open_set(folder, prompts=prompts(tmp_path, ("true", "false")))) == [n.lower() for n in expected]
    with pytest.raises(InputError, match="2 of its 2 classes are not in prompts p: 'False', 'True'"):
        open_set(folder, prompts=prompts(tmp_path, ("no", "yes")))
    data = open_set(folder, prompts=prompts(tmp_path, ("no", "yes")), by_order=True)
    assert true_names(data) == sorted({"False": "no", "True": "yes"}[name] for name in expected)


@pytest.mark.parametrize(
    ("values", "feature", "shown"),
    [
        ((0, 1, 2, 5), datasets.Value("int64"), "label '5'; allowed: a class name or an index from 0 to 4"),
        ((0.0, 1.5, 2.0, 3.0), datasets.Value("float32"), "label '1.5'; allowed: "),
        ((0, 1, 2, None), datasets.Value("int64"), "label 'None'; allowed: "),
        ((0, 1, 2, -1), datasets.ClassLabel(names=list(NAMES.values())), "label '-1'; allowed: "),
    ],
)
def test_labels_that_are_no_class_name_their_row(
    tmp_path: Path, values: Sequence[Any], feature: Any, shown: str
) -> None:
    data = open_set(table(tmp_path, values, feature), prompts=prompts(tmp_path))
    with pytest.raises(InputError, match=rf"set, row \d+: {shown}"):
        list(data.samples())


def test_splits_that_are_not_there_are_listed(tmp_path: Path) -> None:
    folders(tmp_path, SPELT, below="train")
    folder = folders(tmp_path, SPELT, below="val")
    assert len(open_set(folder, split="val")) == len(SAMPLES)
    with pytest.raises(InputError, match=r"set: no split 'test', but folders of classes .*; allowed: train, val"):
        open_set(folder)
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="saved: no split 'test'; allowed: train"):
        open_set(tmp_path / "saved")
    shards(tmp_path / "tars", None)
    with pytest.raises(InputError, match=r"no train/nshards.txt; allowed: a split that is there: test"):
        open_set(tmp_path / "tars" / "set", split="train")


def test_a_probe_is_not_fitted_on_its_test_samples(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders(tmp_path, SPELT)
    command = ["evaluate", "--model", str(teacher_folder), "--data", str(folder), "--task", "linear_probe"]
    assert main([*command, "--device", "cpu"]) == 2
    assert "--split test and --train-split train are the same samples" in capsys.readouterr().err


def test_tables_beside_other_folders_are_tables(tmp_path: Path) -> None:
    """A repository with a picture for its page."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "blue"])})
    rows = {"image": [{"bytes": SAMPLES[0]["png"], "path": None}], "label": [1]}
    (tmp_path / "repo" / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "repo" / "data" / "test-0.parquet")
    (tmp_path / "repo" / "assets").mkdir()
    (tmp_path / "repo" / "assets" / "page.png").write_bytes(SAMPLES[0]["png"])
    data = open_set(tmp_path / "repo", columns=Columns(image="image"))
    assert true_names(data) == ["blue"]
