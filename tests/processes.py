"""Training runs of one config, in processes of their own (`scripts.jobs`)."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipdistill.io.jsonl import read_jsonl
from scripts.compare_runs import left_by
from scripts.jobs import Job
from tests.conftest import colour_samples, write_tar


class Runs:
    """Runs of one config, all below one folder.

    Args:
        folder: receives the config, the cache, and each run's folder and log.
        colours: the folder of that fixture.
        student: the student's model config.
        teacher: the exported teacher.
        changes: to the config: its keys are replaced, those of ``train`` one by one.
    """

    def __init__(self, folder: Path, *, colours: Path, student: Path, teacher: Path, **changes: Any) -> None:
        self.folder = folder
        train = {"steps": 16, "log_every": 5, "save_every": 7, "trace": True, "trackers": []}
        config: dict[str, Any] = {
            "teachers": [{"model": f"local-dir:{teacher}"}],
            "student": {"model": str(student)},
            "data": {
                "shards": [str(colours / "train")],
                "batch_size": 4,
                "workers": 0,
                "shuffle": 16,
                "cache": str(folder / "cache"),
            },
            "prompts": str(colours / "prompts"),
            "labels": "dataset",
            "objective": [
                {"loss": "gkl", "gamma": 0.5, "class_prior": True},
                {"loss": "gkl", "over": "captions", "gamma": 0.3},
            ],
            "optimizer": {"lr": 0.003},
            "train": train | changes.pop("train", {}),
        }
        self.config = folder / "config.json"
        self.config.write_text(json.dumps(config | changes))

    def start(self, name: str, *overrides: str, ranks: int = 1, **limits: Any) -> Job:
        """Start a run, or resume it."""
        arguments = ["--config", self.config, "--resume", "auto", f"output={self.folder / name}", *overrides]
        return Job(*arguments, log=self.folder / f"{name}.log", ranks=ranks, **limits)

    def whole(self, *overrides: str, ranks: int = 1) -> Path:
        """The folder of the uninterrupted run."""
        name = f"whole-{ranks}-{hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]}"
        if not (self.folder / name).exists():
            job = self.start(name, *overrides, ranks=ranks)
            assert job.wait() == [0] * ranks, job.text()
        return self.folder / name

    def saved_steps(self, name: str) -> list[int]:
        """The steps of a run's checkpoints."""
        return sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob(f"{name}/checkpoints/step_*"))


def until(condition: Callable[[], Any], seconds: float = 90) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.002)


def long_set(colours: Path, folder: Path, shards: int) -> Path:
    """An evaluation set as long as is wanted: one shard of 420 images, many times."""
    shutil.copytree(colours / "set", folder, ignore=shutil.ignore_patterns("*.tar"))
    first = folder / "test" / "0.tar"
    write_tar(first, colour_samples(420))
    for number in range(1, shards):
        first.with_name(f"{number}.tar").hardlink_to(first)
    (folder / "test" / "nshards.txt").write_text(str(shards))
    return folder


def traced(run: Path, rank: int = 0) -> int:
    """The last step in a rank's trace."""
    records = read_jsonl(run / "samples" / f"rank_{rank:05d}.jsonl")
    return int(records[-1]["step"]) if records else 0


def assert_identical(run: Path, other: Path) -> None:
    """Two runs must have left the same, bit for bit."""
    mine, theirs = ({**left_by(folder), **_traces(folder)} for folder in (run, other))
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if mine[name] != theirs[name]]
    assert different == [], different


def _traces(run: Path) -> dict[str, Any]:
    return {file.name: read_jsonl(file) for file in (run / "samples").glob("*")}
