"""``train --profile`` and ``estimate``: what they count, against what is known; and that they leave nothing behind."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.cli import main
from clipdistill.config import load_config
from clipdistill.distill.stopwatch import Stopwatch
from clipdistill.models.loading import load_student
from clipdistill.training.profiling import profile_steps
from tests.conftest import colour_samples, write_tar


def test_time_in_an_inner_section_is_not_the_outer_one_s() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch.step():
        with stopwatch.section("outer"):
            time.sleep(0.05)
            with stopwatch.section("inner"):
                time.sleep(0.2)
            time.sleep(0.05)
        with stopwatch.section("inner"):
            time.sleep(0.1)
    (times,) = stopwatch.steps
    assert 0.3 <= times["inner"] < times[""]
    assert 0.1 <= times["outer"] <= times[""] - times["inner"]


def test_what_a_step_computes(write_config: Callable[..., Path], tiny_model: Path) -> None:
    """One teacher pass, and three passes' worth for the student, of the images; a little for the loss."""
    config = load_config(write_config(student={"model": str(tiny_model), "text": "teacher"}))
    profile = profile_steps(config, 2)
    tower = load_student(str(tiny_model))
    with FlopCounterMode(display=False) as counter:
        tower.encode_image(torch.zeros(8, 3, *tower.image_size, dtype=torch.uint8))
    assert 3.5 * counter.get_total_flops() < profile.flops < 4.5 * counter.get_total_flops()
    assert profile.samples == 8
    assert sum(profile.sections.values()) <= profile.seconds * 1.2
    assert {"data wait", "teacher", "student forward", "loss", "backward", "optimizer"} <= profile.sections.keys()
    assert profile.exchange == 0
    assert profile.checkpoint_bytes > 0
    assert profile.total_steps == 6


def test_profile_says_which_part_starves_which(write_config: Callable[..., Path]) -> None:
    profile = profile_steps(load_config(write_config()), 1)
    sections = {"data wait": 0.3, "teacher": 0.5, "backward": 0.2}
    hungry = replace(profile, seconds=1.0, samples=100, workers=3, sections=sections)
    assert hungry.bottleneck.startswith("data starves the rest: 100 samples/s from 3 decoding process(es)")
    assert "the other sections take 143" in hungry.bottleneck
    fed = replace(hungry, sections=sections | {"data wait": 0.01})
    assert fed.bottleneck == "data keeps up; the longest section is teacher (50%; a teacher cache removes it)"
    cached = replace(hungry, sections={"data wait": 0.01, "backward": 0.7})
    assert cached.bottleneck == "data keeps up; the longest section is backward (70%)"


def test_profile_leaves_nothing_behind(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(Path(tempfile.gettempdir()).glob("clipdistill-*"))
    command = ["train", "--config", str(write_config()), "--profile", "2", "train.trackers=[tensorboard]"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "student forward" in said
    assert "samples/s by 1 process" in said
    assert not (tmp_path / "run").exists()
    assert set(Path(tempfile.gettempdir()).glob("clipdistill-*")) == before


@pytest.mark.slow
def test_estimate_finds_hours_disk_and_a_batch(write_config: Callable[..., Path], tmp_path: Path) -> None:
    figures = tmp_path / "estimate.json"
    config = write_config(train={"epochs": 100, "keep": 2, "trackers": []})
    assert main(["estimate", "--config", str(config), "--largest", "16", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["total_steps"] == 100 * (50 // 8)
    assert found["hours"] == pytest.approx(found["total_steps"] * found["seconds"] / 3600)
    assert found["disk_bytes"] == 3 * found["checkpoint_bytes"]
    assert [each["batch_size"] for each in found["sweep"]] == [8, 16]
    assert not (tmp_path / "run").exists()


def test_bad_input(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config", str(write_config()), "--profile", "0"])
    assert "--profile: 0 is not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(write_config: Callable[..., Path], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    config = write_config()
    command = [*launcher, "scripts/train.py", "--config", str(config), "--profile", "2", "train.trackers=[tensorboard]"]
    (tmp_path / "cache").mkdir()
    before = set(tmp_path.iterdir())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "16 samples" in done.stdout
    assert "ms to exchange the gradients" in done.stdout
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_fault_of_one_process_is_a_line(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A label outside the class list, which only one rank meets."""
    samples = colour_samples(64)
    samples[37]["cls"] = 9
    write_tar(tmp_path / "shards" / "0.tar", samples)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    config = write_config()
    overrides = [f"data.shards=[{tmp_path / 'shards'}]", "labels=dataset", "objective.0.class_prior=true"]
    command = [*launcher, "scripts/train.py", "--config", str(config), "--profile", "9", *overrides]
    (tmp_path / "cache").mkdir()
    before = set(tmp_path.iterdir())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("clipdistill: ")]
    assert "0 to 3" in line
    assert "clipdistill/training/trainer.py" not in done.stderr
    assert set(tmp_path.iterdir()) == before
