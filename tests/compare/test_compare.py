"""``clipdistill compare`` as its user runs it: figures, claims, kills, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import yaml

from clipdistill.cli import main
from clipdistill.compare.combine import unpack
from clipdistill.compare.statistics import compare_pair
from clipdistill.config import load_config, to_dict
from clipdistill.evaluation import evaluate_sets, load_for_evaluation, open_set
from tests.conftest import CLASSES, colour_samples, write_tar
from tests.processes import until

LABELS = {"objective": [{"loss": "clip", "over": "prompts"}], "labels": "dataset"}


CHOICES: dict[str, dict[str, Any]] = {"one": {}, "other": {"settings": {"evaluation.batch_size": 3}}}


@pytest.fixture
def write_arms(write_config: Callable[..., Path], colours: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a file of two arms, which learn from labels, and from nothing; keyword arguments replace top-level keys."""
    test = tmp_path / "unseen"
    shutil.copytree(colours / "set", test)
    for shard, first in ((0, 5000), (1, 5020)):
        write_tar(test / "test" / f"{shard}.tar", colour_samples(20, first=first))

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "output": str(tmp_path / "compare"),
            "config": str(write_config()),
            "settings": {"train.steps": 12, **LABELS},
            "test": [str(test)],
            "trials": 2,
            "seeds": 6,
            "pilot": 2,
            "arms": {
                "learning": {"space": {"optimizer.lr": "log(0.005, 0.02)"}},
                "idle": {"space": {"optimizer.lr": "log(1e-10, 1e-9)"}},
            },
        }
        path = tmp_path / "arms.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write


@pytest.mark.slow
def test_an_arm_that_learns_beats_one_that_does_not(
    write_arms: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_arms()
    assert main(["compare", str(path)]) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "compare"
    results = json.loads((folder / "results.json").read_text())
    learning, idle = results["arms"]["learning"], results["arms"]["idle"]
    (pair,) = results["comparisons"]
    assert pair["arm"] == "idle"
    assert pair["claim"].startswith("learning beats idle by ")
    assert pair["claim"] in output
    assert pair["shown"] is True
    assert pair["p_seeds"] == pytest.approx(2 / 64)
    assert pair["difference"] == pytest.approx(idle["mean"] - learning["mean"])
    assert len(learning["accuracy"]) == 6
    for arm in (learning, idle):
        assert arm["trials"] == 2
        assert arm["seconds_of_a_run"] > 0
    data = open_set(str(tmp_path / "unseen"))
    for run, accuracy in zip(learning["runs"][:2], learning["accuracy"], strict=False):
        (record,) = evaluate_sets(load_for_evaluation(run), [data], model="x")
        assert record["metrics"]["acc1"] == pytest.approx(accuracy)
    table = (folder / "table.md").read_text()
    assert "| learning | " in table
    assert pair["claim"] in table
    page = (folder / "compare.html").read_text()
    assert "learning beats idle" in page
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)
    before = (folder / "results.json").read_text()
    assert main(["compare", str(path)]) == 0
    assert json.loads((folder / "results.json").read_text())["arms"] == json.loads(before)["arms"]


@pytest.mark.slow
def test_parts_joined_are_the_whole(write_arms: Callable[..., Path], tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({"red": 101, "green": 30, "blue": 100, "grey": 2}))
    settings = {"train.steps": 12, **LABELS, "evaluation.class_counts": str(counts)}
    path = str(write_arms(pilot=0, trials=1, settings=settings))
    assert main(["compare", path, f"output={tmp_path / 'whole'}"]) == 0
    for arm in ("idle", "learning"):
        assert main(["compare", path, "--only", arm, f"output={tmp_path / arm}"]) == 0
    parts = [str(tmp_path / arm / "results.json") for arm in ("learning", "idle")]
    assert main(["compare", "--combine", str(tmp_path / "joined"), *parts]) == 0
    joined, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("joined", "whole"))
    assert joined["comparisons"] == whole["comparisons"]
    assert joined["power"] == whole["power"]
    for arm in ("learning", "idle"):
        for part in ("settings", "validation", "accuracy", "mean", "correct", "shots"):
            assert joined["arms"][arm][part] == whole["arms"][arm][part]
    for shot, classes in {"many": (0,), "medium": (1, 2), "few": (3,)}.items():
        among_N = [number % 4 in classes for number in range(40)]
        found = [unpack(whole["arms"][arm]["correct"], 40)[:, among_N] for arm in ("idle", "learning")]
        assert whole["arms"]["idle"]["shots"][shot] == found[0].mean(1).tolist()
        expected = asdict(compare_pair(*found))
        assert {**whole["comparisons"][0]["shots"][shot], "adjusted": ANY} == expected | {"adjusted": ANY}
        table = (tmp_path / "joined" / "table.md").read_text()
        assert f"- images of {shot}-shot classes ({sum(among_N)}): learning " in table


@pytest.mark.slow
def test_arms_are_compared_under_attack(write_arms: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"train.steps": 12, **LABELS, "evaluation.attack": {"eps": "120/255", "images": 25}}
    assert main(["compare", str(write_arms(pilot=0, trials=1, settings=settings))]) == 2
    settings["train.best_metric"] = "evaluation/set/robust_acc1"
    path = str(write_arms(pilot=0, trials=1, settings=settings))
    assert main(["compare", path]) == 0
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert results["measure"] == "zero-shot top-1 under PGD, linf, 120/255"
    assert [data["images"] for data in results["test"]] == [25]
    run = results["arms"]["learning"]["runs"][2]
    command = ["evaluate", "--model", run, "--data", str(tmp_path / "unseen"), "--output", str(tmp_path / "r.json")]
    assert main([*command, "--attack", "pgd", "--eps", "120/255", "--attack-images", "25"]) == 0
    found = json.loads((tmp_path / "r.json").read_text())["metrics"]
    assert results["arms"]["learning"]["accuracy"][2] == pytest.approx(found["robust_acc1"])
    assert found["robust_acc1"] < found["acc1"]
    assert results["measure"] in (tmp_path / "compare" / "table.md").read_text()


@pytest.mark.slow
def test_equal_arms_with_equal_seeds_are_equal(write_arms: Callable[..., Path], tmp_path: Path) -> None:
    """Same settings, seeds and order of data: every pair of runs is the same, and nothing is claimed."""
    space = {"space": {"optimizer.lr": "log(0.005, 0.02)"}}
    assert main(["compare", str(write_arms(arms={"one": space, "other": space}))]) == 0
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert results["arms"]["one"]["accuracy"] == results["arms"]["other"]["accuracy"]
    assert results["comparisons"][0]["claim"].startswith("no difference between other and one is shown")
    runs = [load_config(Path(results["arms"][arm]["runs"][0]) / "config.yaml") for arm in ("one", "other")]
    settings = [to_dict(run) for run in runs]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} == {"output"}


@pytest.mark.slow
def test_arms_with_and_without_a_teacher_see_the_same_views(write_arms: Callable[..., Path], tmp_path: Path) -> None:
    arms = {
        "kl": {"settings": {"objective": [{"loss": "kl"}]}, "space": {"objective.0.temperature": "log(1, 8)"}},
        "labels": {"settings": {"teachers": [], **LABELS}, "space": {"optimizer.lr": "log(0.005, 0.02)"}},
    }
    path = write_arms(arms=arms, settings={"train.steps": 2}, trials=1, pilot=0, views=3)
    assert main(["compare", str(path)]) == 0
    results = json.loads((tmp_path / "compare" / "results.json").read_text())
    configs = {arm: load_config(Path(of_arm["runs"][0]) / "config.yaml") for arm, of_arm in results["arms"].items()}
    assert configs["kl"].data == configs["labels"].data
    assert configs["kl"].data.views == 3
    assert configs["kl"].teacher_cache.folder
    assert not configs["labels"].teacher_cache.folder
    assert results["arms"]["labels"]["runs"]
    assert results["teacher"] is not None


def test_the_forecast_comes_first(
    write_arms: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(write_arms()), "--power-only"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("power: 6 seeds, 1 comparisons: p can be 0.031 at best; 40 test images, 21 of validation; ")
    assert "pilot: the difference of two arms varies by " in line
    assert not list((tmp_path / "compare" / "tune").glob("*/trials"))


@pytest.mark.parametrize("where", ["training", "validation"])
def test_test_images_that_were_seen_are_refused(
    write_arms: Callable[..., Path],
    write_config: Callable[..., Path],
    tmp_path: Path,
    colours: Path,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """Under other names, in another shard, with another label."""
    path = write_arms()
    seen = colour_samples(1, first=17 if where == "training" else 1003)[0]
    samples = [*colour_samples(5, first=7000), {**seen, "key": "renamed", "cls": CLASSES.index("grey")}]
    write_tar(tmp_path / "unseen" / "test" / "1.tar", samples)
    assert main(["compare", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"clipdistill: test: 1 of 26 images are also {where} images (")
    assert "renamed" in line


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_figures(write_arms: Callable[..., Path], tmp_path: Path) -> None:
    path = write_arms()

    def start(output: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "clipdistill", "compare", str(path), f"output={tmp_path / output}"]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)

    assert start("whole").wait(300) == 0
    for stage in ("pilot/learning", "tune/idle/trials", "runs/idle"):
        process = start("killed")
        until(lambda stage=stage: list((tmp_path / "killed" / stage).glob("*/metrics.jsonl")), 200)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed").wait(300) == 0
    found, expected = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    for results in (found, expected):
        results["command"] = ""
        for arm in results["arms"].values():
            for part in ("seconds_of_tuning", "seconds_of_a_run", "search", "runs"):
                del arm[part]
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 5}, "seeds: 5 is not allowed; allowed: >= 6"),
        ({"arms": {"one": {}}}, "arms: "),
        ({"arms": {"one": {}, "../other": {}}}, "arms: "),
        ({"against": "x"}, "against: 'x' is not allowed; allowed: learning, idle"),
        ({"pilot": 1}, "pilot: 1 is not allowed; allowed: 0, or 2 or more"),
        ({"tests": []}, "tests: unknown config key; nearest valid key: test"),
        ({"test": []}, "test: "),
        ({"arms": {"a": {}, "b": {"space": {"optimizer.lr": "log(1, 2)"}}}}, "arms.a.space: empty"),
        ({"settings": {"optimizer.lr": 0.1}}, "arms.learning: optimizer.lr is fixed and searched"),
        ({"settings": {"optimizer.rl": 0.1}}, "optimizer.rl: unknown config key"),
        (
            {"arms": {name: {"space": {"optimizer.lr": "log(1e-3, 1e-2)"}, **more} for name, more in CHOICES.items()}},
            "arms.other: evaluation or train.best_metric differs; allowed: one choice for all arms",
        ),
        (
            {"arms": {name: {"space": {"optimizer.lr": "log(1e-3, 1e-2)"}} for name in "abcd"}},
            "seeds: 6 is not allowed; allowed: 8 or more, as an exact test with fewer can show nothing in 6",
        ),
    ],
)
def test_wrong_input_is_one_line(
    write_arms: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    assert main(["compare", str(write_arms(**changes))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: {message}")
    assert not (tmp_path / "compare").exists()


def test_an_arm_that_is_none(write_arms: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(write_arms()), "--only", "learning,x"]) == 2
    assert "--only: 'x' is not allowed; allowed: learning, idle" in capsys.readouterr().err
