"""A class list beside the shards in another order, or labels that are names, train the same student to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.training.checkpoint import find_checkpoint
from clipdistill.training.trainer import train
from tests.conftest import CLASSES, colour_samples, write_tar

OWN = ("grey", "Blue", "RED", "green")
"""The shards' own list: the classes of the prompts, in another order and spelling."""


def shards(root: Path, label: Callable[[int], dict[str, Any]], *, names: tuple[str, ...] = ()) -> str:
    for number, (first, count) in enumerate(((0, 13), (13, 11))):
        samples = [
            {"key": sample["key"], "png": sample["png"], **label(sample["cls"])}
            for sample in colour_samples(count, first=first)
        ]
        write_tar(root / "train" / f"{number}.tar", samples)
    if names:
        (root / "classnames.txt").write_text("\n".join(names))
    return f"data.shards=[{root / 'train'}]"


def state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    found = {f"student.{name}": value for name, value in load_file(checkpoint / "student.safetensors").items()}
    return found | {f"prior.{name}": value for name, value in load_file(checkpoint / "priors.safetensors").items()}


def own_number(label: int) -> int:
    return [name.lower() for name in OWN].index(CLASSES[label])


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Path:
    return write_config(
        objective=[{"loss": "gkl", "gamma": 0.5, "class_prior": True}],
        labels="dataset",
        evaluation={"folders": []},
        train={"steps": 4, "log_every": 2, "trackers": []},
    )


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_labels_follow_their_names(config: Path, tmp_path: Path) -> None:
    variants: dict[str, tuple[str, list[str]]] = {
        "reference": (shards(tmp_path / "0", lambda label: {"cls": label}), []),
        "own order": (shards(tmp_path / "1", lambda label: {"cls": own_number(label)}, names=OWN), []),
        "names": (shards(tmp_path / "2", lambda label: {"cls": CLASSES[label].upper()}), []),
        "names in json": (
            shards(tmp_path / "3", lambda label: {"json": json.dumps({"class": OWN[own_number(label)]})}, names=OWN),
            ["data.label_key=class"],
        ),
        "by order": (
            shards(tmp_path / "4", lambda label: {"cls": label}, names=("a", "b", "c", "d")),
            ["data.labels_by_order=true"],
        ),
    }
    for name, (data, overrides) in variants.items():
        train(load_config(config, [data, f"output={tmp_path / name}", *overrides]))
    reference = state(tmp_path / "reference")
    for name in variants:
        assert_equal(state(tmp_path / name), reference)


def test_another_class_list_is_refused_in_one_line(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shards(tmp_path / "0", lambda label: {"cls": label}, names=("red", "green", "blue", "gray"))
    assert main(["train", "--config", str(config), data]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "0/classnames.txt: 1 of its 4 classes are not in prompts prompts: 'gray'; of prompts prompts, 1" in error
    assert "data.labels_by_order=true" in error


def test_a_class_list_that_changed_is_another_run(config: Path, tmp_path: Path) -> None:
    """Elsewhere the same list is the same run."""
    shards(tmp_path / "0", lambda label: {"cls": own_number(label)}, names=OWN)
    shutil.copytree(tmp_path / "0", tmp_path / "moved")
    overrides = [f"output={tmp_path / 'run'}", "train.steps=2"]
    train(load_config(config, [f"data.shards=[{tmp_path / '0' / 'train'}]", *overrides]))
    moved = load_config(config, [f"data.shards=[{tmp_path / 'moved' / 'train'}]", *overrides])
    shutil.rmtree(tmp_path / "run" / "student")
    assert train(moved, resume="auto").steps == 2
    (tmp_path / "moved" / "classnames.txt").write_text("\n".join(CLASSES))
    shutil.rmtree(tmp_path / "run" / "student")
    with pytest.raises(
        InputError, match=r"^labels\.0: digest \w+, but the run in .* has digest \w+; allowed: the same"
    ):
        train(moved, resume="auto")


def test_the_prior_from_a_teacher_cache_follows_names(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use = ["data.views=2", "teacher_cache.precision=fp32", "train.steps=1"]
    for name, data in {
        "reference": shards(tmp_path / "0", lambda label: {"cls": label}),
        "own": shards(tmp_path / "1", lambda label: {"cls": own_number(label)}, names=OWN),
    }.items():
        overrides = [data, *use, f"teacher_cache.folder={tmp_path / 'cache' / name}", f"output={tmp_path / name}"]
        assert main(["cache", "--config", str(config), *overrides]) == 0
        train(load_config(config, overrides))
    ours, theirs = state(tmp_path / "own"), state(tmp_path / "reference")
    assert_equal(ours, theirs)
    named = shards(tmp_path / "2", lambda label: {"cls": CLASSES[label]})
    overrides = [named, *use, f"teacher_cache.folder={tmp_path / 'cache' / 'named'}", f"output={tmp_path / 'named'}"]
    assert main(["cache", "--config", str(config), *overrides]) == 0
    assert main(["train", "--config", str(config), *overrides]) == 2
    assert "labels are class names, which a teacher cache does not store" in capsys.readouterr().err
