"""Training runs in processes of their own, one a rank, started by hand as a batch system would: with environment
variables, and nobody who cleans up after them.

They come from a server that has everything imported, so that each starts in a fraction of a second.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from clipdistill.cli import main
from clipdistill.io.jsonl import read_jsonl
from scripts.compare_runs import left_by
from tests.conftest import colour_samples, write_tar

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clipdistill.training.trainer", "clipdistill.cli", "tests.processes"])


def _train(arguments: Sequence[str], environment: Mapping[str, str], log: str, file_size: int | None) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own
    os.setpgid(0, 0)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(main(["train", *arguments]))


class Job:
    """Ranks of one run.

    Args:
        arguments: of ``clipdistill train``.
        log: receives what all ranks print.
        ranks: how many.
        file_sizes: of some ranks, the largest file in bytes that they may write.
    """

    def __init__(
        self, *arguments: object, log: Path, ranks: int = 1, file_sizes: Mapping[int, int] | None = None
    ) -> None:
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.ranks = []
        for rank in range(ranks):
            place = world | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
            environment = ENVIRONMENT | {name: str(value) for name, value in place.items()}
            limit = (file_sizes or {}).get(rank)
            target = (list(map(str, arguments)), environment, str(log), limit)
            self.ranks.append(_context.Process(target=_train, args=target))
        for process in self.ranks:
            process.start()
        self.pids = [process.pid for process in self.ranks]

    def children(self) -> list[psutil.Process]:
        """The data workers of all ranks."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(pid).children(recursive=True)
        return found

    def wait(self, seconds: float = 120) -> list[int | None]:
        """The exit codes of all ranks, which must end in time."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, f"still running after {seconds} s: {codes}\n{self.text()}"
        return codes

    def kill(self) -> None:
        """SIGKILL all ranks."""
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def text(self) -> str:
        """What the ranks have printed."""
        return self.log.read_text() if self.log.exists() else ""

    def lines(self) -> list[str]:
        """The lines that clipdistill has printed about its end."""
        return [line for line in self.text().splitlines() if line.startswith("clipdistill: ")]


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
        name = f"whole-{ranks}" + "".join(f"-{override.replace('/', '_')}" for override in overrides)
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
    assert [name for name in mine if mine[name] != theirs[name]] == []


def _traces(run: Path) -> dict[str, Any]:
    return {file.name: read_jsonl(file) for file in (run / "samples").glob("*")}
