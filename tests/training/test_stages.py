"""A chain of runs from one config: as the runs one by one, resumed where it stopped, in one process and in several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.config import load_config, load_stages
from clipdistill.errors import InputError
from clipdistill.io.run_files import SUMMARY_FILE
from clipdistill.training.trainer import train
from tests.conftest import TINY_MODEL
from tests.training.test_trainer import launch


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "smaller-student.json"
    path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 1}}))
    return path


@pytest.fixture
def chain(write_config: Callable[..., Path], small: Path, tmp_path: Path) -> Path:
    """An assistant between the teacher and the student, which also inherits the assistant's layers."""
    stages: list[dict[str, Any]] = [
        {"name": "assistant", "train": {"steps": 4}},
        {
            "name": "student",
            "teachers": [{"model": "previous"}],
            "student": {"model": str(small), "init": {"from": "previous"}},
            "objective": [{"loss": "kl", "temperature": 2.0}],
        },
    ]
    return write_config(output=str(tmp_path / "chain"), stages=stages)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "open_clip_model.safetensors")


def assert_equal(ours: Path, theirs: Path) -> None:
    mine, other = weights(ours), weights(theirs)
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_a_chain_is_its_runs_one_by_one(
    chain: Path, write_config: Callable[..., Path], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", str(chain), "optimizer.lr=0.002"]) == 0
    printed = capsys.readouterr().out
    runs = [tmp_path / "chain" / name for name in ("1-assistant", "2-student")]
    assert [f"student: {run / 'student'}" in printed for run in runs] == [True, True]
    common = ["optimizer.lr=0.002"]
    first = train(load_config(write_config(output=str(tmp_path / "first")), [*common, "train.steps=4"]))
    assert_equal(runs[0], first.output)
    config = write_config(
        output=str(tmp_path / "second"),
        teachers=[{"model": f"local-dir:{first.student}"}],
        student={"model": str(small), "init": {"from": str(first.student)}},
        objective=[{"loss": "kl", "temperature": 2.0}],
    )
    assert_equal(runs[1], train(load_config(config, common)).output)


def test_a_chain_goes_on_where_it_stopped(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The finished stage is kept as it is; the other one goes on from its checkpoint to the same weights."""
    command = ["train", "--config", str(chain), "train.save_every=2"]
    assert main([*command, f"output={tmp_path / 'whole'}"]) == 0
    assert main([*command]) == 0
    second = tmp_path / "chain" / "2-student"
    (second / SUMMARY_FILE).unlink()
    for path in sorted((second / "checkpoints").iterdir())[1:]:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    before = (tmp_path / "chain" / "1-assistant" / "metrics.jsonl").read_bytes()
    assert main(command) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 0
    assert (tmp_path / "chain" / "1-assistant" / "metrics.jsonl").read_bytes() == before
    assert_equal(second, tmp_path / "whole" / "2-student")
    # another assistant is another teacher
    assert main([*command, "--restart", "stages.1.train.steps=2", "seed=1"]) == 0
    assert main(["train", "--config", str(chain), "--resume", str(second / "checkpoints")]) == 2


@pytest.mark.slow
def test_ranks_run_a_chain(chain: Path, tmp_path: Path) -> None:
    launch(chain, f"output={tmp_path / 'two'}", processes=2)
    assert (tmp_path / "two" / "2-student" / SUMMARY_FILE).is_file()
    launch(chain, f"output={tmp_path / 'two'}", "--resume", "auto", processes=2)


def stage(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages: [] is not allowed; allowed: a list of mappings, each with a name"),
        ({"name": "a"}, "stages: {'name': 'a'} is not allowed; allowed: a list of mappings"),
        ([{"seed": 1}], "allowed: a list of mappings, each with a name"),
        ([stage("a/b")], "allowed: a list of mappings, each with a name of letters"),
        ([stage("a"), stage("a")], "stages: ['a', 'a'] is not allowed; allowed: different names"),
        ([stage("a"), stage("b", train={"step": 3})], "stage b: train.step: unknown config key"),
        ([stage("a", teachers=[{"model": "previous"}])], "stage a: model: 'previous' is not allowed; allowed: another"),
    ],
)  # fmt: skip
def test_wrong_stages_are_one_line(write_config: Callable[..., Path], stages: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_stages(write_config(stages=stages))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_commands_name_the_one_that_takes_stages(chain: Path) -> None:
    with pytest.raises(InputError, match="a chain of runs, which `clipdistill train` runs"):
        load_config(chain)
