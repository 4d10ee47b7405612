"""Ranks that die, freeze or fail: the others end with one line that names it, and the run can go on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from scripts.jobs import ENVIRONMENT, Job, is_alive
from tests.conftest import colour_samples, write_tar
from tests.processes import Runs, assert_identical, long_set, traced, until

CONTINUES = r"last finished step \d+; checkpoint step_\d{8} is complete; --resume auto continues"


@pytest.fixture(scope="module")
def runs(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(
        tmp_path_factory.mktemp("runs"),
        colours=colours,
        student=tiny_model,
        teacher=teacher_folder,
        train={"save_every": 3},
    )


def start(runs: Runs, name: str, *overrides: str) -> Job:
    """Four ranks with a worker each."""
    return runs.start(name, "data.workers=1", "data.batch_size=2", *overrides, ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [2, 0])
def test_killed_rank_is_named_and_the_run_goes_on(runs: Runs, victim: int) -> None:
    """Rank 0 is the one that the others are connected with: each of them then speaks for itself."""
    name = f"killed-{victim}"
    job = start(runs, name)
    until(lambda: traced(runs.folder / name) >= 5 and runs.saved_steps(name))
    workers = job.children()
    os.kill(job.pids[victim], signal.SIGKILL)
    expected = [1, 1, 1, 1]
    expected[victim] = -signal.SIGKILL
    assert job.wait(30) == expected, job.text()
    assert len(job.lines()) == (1 if victim else 3), job.text()
    for line in job.lines():
        assert re.fullmatch(
            rf"clipdistill: rank {victim} of 4 is gone \(host \S+, pid {job.pids[victim]}\); {CONTINUES}", line
        )
    assert "Traceback" not in job.text()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    again = start(runs, name)
    assert again.wait() == [0, 0, 0, 0], again.text()
    assert_identical(runs.folder / name, runs.whole("data.workers=1", "data.batch_size=2", ranks=4))


@pytest.mark.slow
def test_killed_rank_under_torchrun(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "--config",
        str(runs.config),
        "--resume",
        "auto",
        f"output={run}",
        "data.batch_size=2",
        "data.workers=1",
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    command = [sys.executable, *launcher, "scripts/train.py", *arguments]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    until(lambda: traced(run) >= 5 and list(run.glob("checkpoints/step_*")), 180)
    ranks = [child for child in psutil.Process(job.pid).children() if "scripts/train.py" in child.cmdline()]
    processes = [job, *psutil.Process(job.pid).children(recursive=True)]
    assert len(ranks) == 4
    ranks[2].kill()
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("clipdistill: ")]
    assert re.fullmatch(rf"clipdistill: rank \d of 4 is gone \(host \S+, pid {ranks[2].pid}\); {CONTINUES}", line)
    _, alive = psutil.wait_procs(processes[1:], timeout=10)
    assert not alive
    again = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    assert again.returncode == 0, again.stderr
    assert_identical(run, runs.whole("data.workers=1", "data.batch_size=2", ranks=4))


def test_bad_input_of_one_rank_ends_all_with_its_line(runs: Runs, tmp_path: Path) -> None:
    """A label outside the class list, which only one rank meets."""
    samples = colour_samples(64)
    samples[37]["cls"] = 9
    write_tar(tmp_path / "shards" / "0.tar", samples)
    job = runs.start("input", f"data.shards=[{tmp_path / 'shards'}]", "data.workers=1", ranks=2)
    assert job.wait(60) == [2, 2], job.text()
    (line,) = job.lines()
    assert "9" in line
    assert "0 to 3" in line
    assert "Traceback" not in job.text()


def test_dead_data_worker_is_named(runs: Runs) -> None:
    job = runs.start("worker", "data.workers=2", "train.steps=1000")
    until(lambda: traced(runs.folder / "worker") >= 4 and runs.saved_steps("worker"))
    victim = job.children()[0]
    victim.kill()
    assert job.wait(60) == [1], job.text()
    (line,) = job.lines()
    assert re.fullmatch(rf"clipdistill: DataLoader worker \(pid.* {victim.pid}\) .*; {CONTINUES}", line)
    assert "Traceback" not in job.text()


@pytest.mark.slow
def test_frozen_rank_is_given_up_in_time(runs: Runs) -> None:
    job = start(runs, "frozen", "train.rank_timeout=12", "train.steps=1000")
    until(lambda: traced(runs.folder / "frozen") >= 5 and runs.saved_steps("frozen"))
    os.kill(job.pids[1], signal.SIGSTOP)
    frozen = time.monotonic()
    codes = [job.join(rank, 60) for rank in (0, 2, 3)]
    assert time.monotonic() - frozen < 40
    assert codes == [1, 1, 1]
    os.kill(job.pids[1], signal.SIGKILL)
    (line,) = job.lines()
    assert re.fullmatch(
        rf"clipdistill: rank 1 of 4 gave no sign of life for \d+ s \(host \S+, pid \d+\); {CONTINUES}", line
    )


@pytest.mark.slow
def test_others_wait_for_a_long_evaluation_and_notice_if_it_dies(runs: Runs, colours: Path, tmp_path: Path) -> None:
    """Longer than the time-out."""
    sets = f"evaluation.folders=[{long_set(colours, tmp_path / 'long', 200)}]"
    settings = [sets, "evaluation.batch_size=1", "train.evaluate_every=3", "train.steps=6", "train.rank_timeout=4"]
    job = runs.start("evaluated", *settings, ranks=2)
    until(lambda: runs.saved_steps("evaluated") == [3])
    time.sleep(8)
    assert runs.saved_steps("evaluated") == [3], "the evaluation was too short for this test"
    assert all(map(is_alive, job.pids)), job.text()
    os.kill(job.pids[0], signal.SIGKILL)
    assert job.wait(20) == [-signal.SIGKILL, 1], job.text()
    (line,) = job.lines()
    assert line.startswith("clipdistill: rank 0 of 2 is gone")
    assert line.endswith("checkpoint step_00000003 is complete; --resume auto continues")
