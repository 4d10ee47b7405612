"""``clipdistill tune`` as its user runs it: what it chooses and leaves, kills, shared studies, content that changes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipdistill.cli import main
from clipdistill.config import load_config, to_dict
from clipdistill.evaluation import evaluate_sets, load_for_evaluation, open_set
from tests.conftest import colour_samples, write_tar
from tests.processes import until

SPACE = ("optimizer.lr=log(1e-4, 1e-1)", "objective.0.gamma=uniform(0, 1)")


@pytest.fixture
def tune(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., int]:
    """Run the command in this process."""

    def run(*arguments: object, trials: int = 5, space: tuple[str, ...] = SPACE) -> int:
        output = ("--output", str(tmp_path / "tune"))
        return main(
            ["tune", "--config", str(write_config()), "--trials", str(trials), *output, *map(str, arguments), *space]
        )

    return run


def trials_of(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "trials.json").read_text())["trials"]
    return sorted(found, key=lambda trial: trial["number"])


def results_of(folder: Path) -> list[tuple[Any, ...]]:
    """What a study found, in order, without the numbers and times of its trials."""
    return [(each["settings"], each["value"], each["evaluations"], each["run"]) for each in trials_of(folder)]


def test_the_best_trial_is_the_one_with_the_best_accuracy_on_the_validation_set(
    tune: Callable[..., int], write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(trials=6) == 0
    output = capsys.readouterr().out
    folder = tmp_path / "tune"
    trials = trials_of(folder)
    assert len(trials) == 6
    base = load_config(write_config())
    assert trials[0]["settings"] == {"optimizer.lr": 0.003, "objective.0.gamma": 0.5}, "the config as it is comes first"
    best = max((trial for trial in trials if trial["value"] is not None), key=lambda trial: trial["value"])
    assert f"best: evaluation/mean {best['value']:.4f}, " in output

    student = load_for_evaluation(str(folder / best["run"]))
    (record,) = evaluate_sets(student, [open_set(base.evaluation.folders[0])], model="x")
    assert record["metrics"]["acc1"] == pytest.approx(best["value"], abs=1e-9)

    config = load_config(folder / "best.yaml")
    assert config.optimizer.lr == best["settings"]["optimizer.lr"]
    assert config.objective[0].gamma == best["settings"]["objective.0.gamma"]
    stated = yaml.safe_load((folder / "best.yaml").read_text())
    assert stated["objective"] == [{"loss": "gkl", "gamma": best["settings"]["objective.0.gamma"]}]
    assert stated["optimizer"].keys() == {"name", "lr"}
    ours, theirs = to_dict(config), to_dict(base)
    different = {key for key in ours if ours[key] != theirs[key]}
    assert different - {"optimizer", "objective"} == {"output", "data", "teacher_cache"}
    page = (folder / "tune.html").read_text()
    assert "optimizer.lr" in page
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page)


def test_trials_train_from_one_teacher_cache(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune("--views", 3, trials=2) == 0
    assert len(list((tmp_path / "tune" / "embeddings").glob("*.safetensors"))) == 3
    for trial in trials_of(tmp_path / "tune"):
        config = load_config(tmp_path / "tune" / trial["run"] / "config.yaml")
        assert config.teacher_cache.folder.endswith("tune/embeddings")
        assert config.data.views == 3
        assert not (tmp_path / "tune" / trial["run"] / "checkpoints").exists()


def test_without_a_cache_where_the_space_changes_what_it_would_hold(
    tune: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert tune(trials=2, space=("data.augmentation.flip=uniform(0, 1)",)) == 0
    assert "no teacher cache: data.augmentation.flip changes" in caplog.text
    assert not (tmp_path / "tune" / "embeddings").exists()


LEARNABLE = ("objective=[{loss: clip, over: prompts}]", "labels=dataset", "teachers=[]", "train.steps=24")
"""The tests' teacher is random; the labels teach something."""


@pytest.mark.slow
def test_hopeless_trials_end_early(tune: Callable[..., int], tmp_path: Path) -> None:
    space = ("optimizer.lr=choice(0.01, 1e-9)", "optimizer.weight_decay=uniform(0, 0.1)", *LEARNABLE)
    assert tune(trials=12, space=space) == 0
    trials = trials_of(tmp_path / "tune")
    stopped = [trial for trial in trials if trial["value"] is None]
    assert stopped
    assert {trial["settings"]["optimizer.lr"] for trial in stopped} == {1e-9}
    assert all(max(map(int, trial["evaluations"])) < 24 for trial in stopped)


def test_a_trial_that_diverges_is_stopped_and_the_search_goes_on(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune(trials=4, space=("optimizer.lr=choice(0.003, 1e30)", "optimizer.warmup_steps=0")) == 0
    stopped = [trial for trial in trials_of(tmp_path / "tune") if trial["value"] is None]
    assert stopped
    assert all("not finite" in trial["stopped"] for trial in stopped)


def test_a_searched_setting_wins_over_a_fixed_one_that_holds_it(tune: Callable[..., int], tmp_path: Path) -> None:
    space = ("objective.0.gamma=uniform(0, 1)", "objective=[{loss: gkl, beta: 0.3}]")
    assert tune(trials=2, space=space) == 0
    for trial in trials_of(tmp_path / "tune"):
        (term,) = load_config(tmp_path / "tune" / trial["run"] / "config.yaml").objective
        assert (term.beta, term.gamma) == (0.3, trial["settings"]["objective.0.gamma"])


@pytest.mark.slow
def test_more_trials_continue_a_study(tune: Callable[..., int], tmp_path: Path) -> None:
    assert tune(trials=2) == 0
    first = results_of(tmp_path / "tune")
    assert tune(trials=4) == 0
    assert results_of(tmp_path / "tune")[:2] == first
    assert len(trials_of(tmp_path / "tune")) == 4


def start(config: Path, output: Path, *, trials: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "clipdistill", "tune", "--config", str(config), "--output", str(output)]
    command += ["--trials", str(trials), *SPACE]
    log = output.with_suffix(".log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_goes_on_to_the_same_result(
    write_config: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    config = write_config(train={"steps": 12, "log_every": 2, "save_every": 2, "trackers": []})
    whole = start(config, tmp_path / "whole", trials=5)
    assert whole.wait(180) == 0
    runs = tmp_path / "killed" / "trials"
    process = start(config, tmp_path / "killed", trials=5)
    until(lambda: len(list(runs.glob("*/metrics.jsonl"))) == 3 and list(runs.glob("*/checkpoints/step_*")))
    process.send_signal(number)
    assert process.wait(60) in (75, -signal.SIGKILL)
    assert not (tmp_path / "killed" / "best.yaml").exists()
    assert start(config, tmp_path / "killed", trials=5).wait(180) == 0
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")


@pytest.mark.slow
def test_processes_share_a_study(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config()
    processes = [start(config, tmp_path / "shared", trials=6) for _ in range(2)]
    assert [process.wait(180) for process in processes] == [0, 0]
    trials = trials_of(tmp_path / "shared")
    assert [trial["number"] for trial in trials] == list(range(6))
    assert len({trial["run"] for trial in trials}) == 6


@pytest.mark.slow
def test_another_search_in_the_same_folder_is_refused(
    tune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(trials=1) == 0
    capsys.readouterr()
    for arguments, space, message in (
        ((), ("optimizer.lr=log(1e-4, 1e-2)",), "space.optimizer.lr is "),
        (("optimizer.weight_decay=0.3",), SPACE, "settings.optimizer.weight_decay is 0.3"),
    ):
        assert tune(*arguments, trials=2, space=space) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"clipdistill: --output {tmp_path / 'tune'}: {message}")
        assert line.endswith("allowed: the same, or another output")


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["training", "validation"])
def test_a_study_ends_where_its_data_change(
    tune: Callable[..., int],
    write_config: Callable[..., Path],
    colours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: str,
) -> None:
    shutil.copytree(colours, tmp_path / "data")
    space = (
        "optimizer.lr=log(1e-4, 1e-1)",
        f"data.shards=[{tmp_path / 'data' / 'train'}]",
        f"evaluation.folders=[{tmp_path / 'data' / 'set'}]",
    )
    assert tune("--online", trials=1, space=space) == 0
    path = {"training": "train/1.tar", "validation": "set/test/1.tar"}[changed]
    write_tar(tmp_path / "data" / path, colour_samples(9, first=2000))
    capsys.readouterr()
    assert tune("--online", trials=2, space=space) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert {"training": "shard", "validation": "validation.0 is digest"}[changed] in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimizer.momentun=uniform(0, 1)"], "optimizer.momentun: no setting of the config"),
        (["objective.3.gamma=uniform(0, 1)"], "objective.3.gamma: no setting of the config"),
        (["objective.0.gamma=uniform(0, 2)"], "objective.0.gamma: 2.0 is not allowed; allowed: 0 to 1"),
        (["optimizer.lr=log(1e-4, 1e-2)", "evaluation.folders=[]"], "evaluation.folders: empty; allowed: at least one"),
        (["optimizer.lr=log(1, 0)"], "optimizer.lr: log(1, 0) is not allowed"),
        (["train.steps=3"], "space: empty"),
        (
            ["objective.0.gamma=uniform(0, 0.9)", "objective=choice([{loss: gkl}], [{loss: gkl, beta: 0.1}])"],
            "objective.0.gamma: has no effect, as another argument replaces it",
        ),
    ],
)
def test_wrong_input_is_one_line(
    tune: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert tune(space=tuple(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: {message}")
    assert not (tmp_path / "tune").exists()


def test_a_launcher_is_refused(write_config: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "clipdistill", "tune", "--config", str(write_config()), "--trials", "2", *SPACE]
    done = subprocess.run(command, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "several of which share an --output" in done.stderr
