"""SIGTERM and SIGINT in real processes: the step is finished and saved, all ranks stop after the same one, and the
resumed run is the uninterrupted one, bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from scripts.jobs import ENVIRONMENT, Job
from tests.processes import Runs, assert_identical, long_set, traced, until


@pytest.fixture(scope="module")
def runs(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(
        tmp_path_factory.mktemp("runs"),
        colours=colours,
        student=tiny_model,
        teacher=teacher_folder,
        train={"accumulate": 2, "ema": 0.9},
    )


@pytest.mark.parametrize(
    ("number", "ranks", "workers", "target"),
    [
        pytest.param(signal.SIGTERM, 1, 0, "one", id="term"),
        pytest.param(signal.SIGINT, 1, 2, "groups", id="ctrl-c-with-workers", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, 2, "groups", id="two-ranks-all-signalled", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, 2, "last", id="two-ranks-one-signalled", marks=pytest.mark.slow),
    ],
)
def test_signal_finishes_the_step_and_saves(
    runs: Runs, request: pytest.FixtureRequest, number: signal.Signals, ranks: int, workers: int, target: str
) -> None:
    name = request.node.callspec.id
    expected, run = runs.whole(f"data.workers={workers}", ranks=ranks), runs.folder / name
    job = runs.start(name, f"data.workers={workers}", ranks=ranks)
    until(lambda: traced(run) >= 3)
    data_workers = job.children()
    assert len(data_workers) >= ranks * workers
    if target == "groups":
        for pid in job.pids:
            os.killpg(pid, number)
    else:
        os.kill(job.pids[-1], number)
    assert job.wait(60) == [75] * ranks, job.text()
    stopped_after = traced(run)
    assert 3 <= stopped_after < 16
    assert {traced(run, rank) for rank in range(ranks)} == {stopped_after}
    assert runs.saved_steps(name)[-1] == stopped_after
    line = f"clipdistill: stopped by {number.name} after step {stopped_after}; saved; --resume auto continues"
    assert job.lines() == [line]
    assert "Traceback" not in job.text()
    _, alive = psutil.wait_procs(data_workers, timeout=10)
    assert not alive
    again = runs.start(name, f"data.workers={workers}", ranks=ranks)
    assert again.wait() == [0] * ranks, again.text()
    assert_identical(run, expected)


def test_second_signal_exits_at_once(runs: Runs) -> None:
    """In a step that would take minutes, with workers."""
    job = runs.start("twice", "train.accumulate=100000", "data.workers=2")
    until(lambda: len(job.children()) >= 2 and (runs.folder / "twice" / "metrics.jsonl").exists())
    time.sleep(0.5)
    data_workers = job.children()
    os.kill(job.pids[0], signal.SIGTERM)
    time.sleep(0.5)
    assert not job.ended()
    os.kill(job.pids[0], signal.SIGTERM)
    assert job.wait(5) == [128 + signal.SIGTERM]
    _, alive = psutil.wait_procs(data_workers, timeout=2)
    assert not alive


@pytest.mark.parametrize("delay", [0.0, 3.0])
def test_signal_during_start_up_leaves_at_once(runs: Runs, tmp_path: Path, delay: float) -> None:
    """While libraries are being imported; while the models are."""
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", "--config", runs.config, f"output={tmp_path / 'run'}"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    time.sleep(delay)
    process.terminate()
    started = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - started < 15
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("clipdistill: stopped by SIGTERM")
    assert not (tmp_path / "run").exists()


def stop_a_worker(runs: Runs, name: str, *overrides: str, ranks: int = 1) -> tuple[Job, psutil.Process]:
    """Start a run, and suspend the last of its data workers once the run has taken some steps."""
    job = runs.start(name, "data.workers=2", "train.steps=1000", "train.save_every=1000", *overrides, ranks=ranks)
    until(lambda: traced(runs.folder / name) >= 3)
    worker = job.children()[-1]
    worker.suspend()
    last = -1
    while last != traced(runs.folder / name):  # what was prepared is used up
        last = traced(runs.folder / name)
        time.sleep(0.5)
    return job, worker


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_does_not_wait_for_a_worker_that_hangs(runs: Runs, ranks: int) -> None:
    """One rank alone saves its last whole step: with accumulation, the wait may be in the middle of one."""
    name = f"stuck-{ranks}"
    job, worker = stop_a_worker(runs, name, "train.accumulate=1", ranks=ranks)
    started = time.monotonic()
    for pid in job.pids:
        os.kill(pid, signal.SIGTERM)
    assert job.wait(30) == [75] * ranks, job.text()
    assert time.monotonic() - started < 20
    assert not worker.is_running()
    assert "Traceback" not in job.text()
    step = traced(runs.folder / name)
    line = "clipdistill: stopped by SIGTERM while waiting for data"
    if ranks == 1:
        assert job.lines() == [f"{line}, after step {step}; saved; --resume auto continues"]
        assert runs.saved_steps(name) == [step]
    else:
        assert job.lines()[0].startswith(line)
    again = runs.start(name, "train.accumulate=1", "train.steps=1000", "data.workers=2", ranks=ranks)
    until(lambda: traced(runs.folder / name) > step + 3)
    again.kill()


def test_a_worker_that_hangs_is_named(runs: Runs) -> None:
    job, worker = stop_a_worker(runs, "hangs", "data.worker_timeout=2")
    assert job.wait(30) == [1], job.text()
    (line,) = job.lines()
    named = rf"clipdistill: data worker 1 \(pid {worker.pid}\) has given nothing for [23] s "
    assert re.match(
        named + r"\(data\.worker_timeout: 2\); it was reading \d\.tar; last finished step \d+; no checkpoint yet$", line
    ), line
    assert "Traceback" not in job.text()
    assert not worker.is_running()


def test_a_second_run_on_an_output_is_refused(runs: Runs) -> None:
    first = runs.start("shared", "train.steps=1000")
    until(lambda: traced(runs.folder / "shared") >= 3)
    for ranks in (1, 2):
        log = runs.folder / f"second-{ranks}.log"
        second = Job("--config", runs.config, "--restart", f"output={runs.folder / 'shared'}", log=log, ranks=ranks)
        assert second.wait(60) == [2] * ranks, second.text()
        (line,) = second.lines()
        assert line.startswith(f"clipdistill: output: {runs.folder / 'shared'}: in use by pid {first.pids[0]} on host ")
    step = traced(runs.folder / "shared")
    until(lambda: traced(runs.folder / "shared") > step)
    first.kill()


def test_signal_during_an_evaluation_is_made_up_for(runs: Runs, colours: Path, tmp_path: Path) -> None:
    """The evaluation is made to take most of the time; its checkpoint is there before."""
    overrides = [
        f"evaluation.folders=[{long_set(colours, tmp_path / 'long', 2)}]",
        *("evaluation.batch_size=1", "train.evaluate_every=2", "train.steps=4"),
    ]
    job = runs.start("evaluated", *overrides)
    until(lambda: runs.saved_steps("evaluated") == [2])
    os.kill(job.pids[0], signal.SIGTERM)
    assert job.wait(10) == [75], job.text()
    (line,) = job.lines()
    complete = "last finished step 2; checkpoint step_00000002 is complete"
    assert line.startswith(f"clipdistill: stopped by SIGTERM; {complete}")
    again = runs.start("evaluated", *overrides)
    assert again.wait() == [0], again.text()
    whole = runs.start("evaluated-whole", *overrides)
    assert whole.wait() == [0], whole.text()
    assert_identical(runs.folder / "evaluated", runs.folder / "evaluated-whole")


@pytest.mark.slow
def test_signal_to_torchrun_reaches_the_ranks(runs: Runs, tmp_path: Path) -> None:
    """The launcher passes it on, waits, and makes 1 of the code."""
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*launcher, "scripts/train.py", "--config", runs.config, f"output={run}"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
        start_new_session=True,
    )
    until(lambda: traced(run) >= 3, 120)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    stopped_after = traced(run)
    assert (run / "checkpoints" / f"step_{stopped_after:08d}").is_dir()
    assert f"clipdistill: stopped by SIGTERM after step {stopped_after}; saved" in stderr
