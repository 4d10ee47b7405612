"""Checkpoints on a real disk: damage of any kind is found, errors of writing change nothing, the right ones stay."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from clipdistill.errors import InputError, RunError
from clipdistill.io.run_files import checkpoint_folder
from clipdistill.training.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    find_damage,
    load_checkpoint,
    rate_checkpoint,
    resolve_resume,
)
from tests.processes import Runs, assert_identical, until

FILES = (
    *("ema.safetensors", "frozen.safetensors", "identity.json", "manifest.json", "optimizer.pt", "rank_00000.pt"),
    "student.safetensors",
)


def save(
    root: Path,
    step: int,
    *,
    size: int = 20,
    keep: int = 9,
    keep_best: int = 0,
    writer: CheckpointWriter | None = None,
) -> Path:
    torch.manual_seed(step)
    writer = writer or CheckpointWriter(root, keep=keep, keep_best=keep_best)
    writer.start(
        step,
        tensors={"student": {"a": torch.randn(size, 3), "b": torch.ones(())}, "ema": {"a": torch.randn(size, 3)}},
        frozen={"c": torch.arange(60.0)},
        optimizer={"state": {"a": {"exp_avg": torch.randn(size, 3)}}, "param_groups": [{"lr": 0.1}]},
        rank_state={"random": torch.get_rng_state(), "stream": {"step": step, "skipped": {}}},
        identity={"format": 1, "prompts": None},
    )
    writer.finish()
    return checkpoint_folder(root, step)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_loads_what_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    state = load_checkpoint(path)
    torch.manual_seed(7)
    assert state.step == 7
    assert torch.equal(state.tensors["student"]["a"], torch.randn(20, 3))
    assert torch.equal(state.tensors["ema"]["a"], torch.randn(20, 3))
    assert torch.equal(state.optimizer["state"]["a"]["exp_avg"], torch.randn(20, 3))
    (mine,) = state.rank_states
    assert torch.equal(mine["random"], torch.get_rng_state())
    assert mine["stream"] == {"step": 7, "skipped": {}}
    assert state.identity == {"format": 1, "prompts": None}
    assert state.evaluations is None


@pytest.mark.parametrize("name", FILES)
def test_file_cut_short_anywhere_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    content = (newest / name).read_bytes()
    for length in {0, 1, len(content) // 2, len(content) - 1}:
        (newest / name).write_bytes(content[:length])
        caplog.clear()
        assert find_checkpoint(tmp_path) == before
        (record,) = caplog.records
        assert str(newest) in record.getMessage()
        assert name in record.getMessage()
        assert "\n" not in record.getMessage()
    (newest / name).unlink()
    assert find_checkpoint(tmp_path) == before
    (newest / name).write_bytes(content)
    assert find_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    """All bytes of the manifest, and of the others some in every part."""
    path = save(tmp_path, 1)
    rate_checkpoint(tmp_path, 1, evaluations=[{"metrics": {"acc1": 0.1}}], metric=0.1)
    content = (path / name).read_bytes()
    places = range(len(content)) if name == "manifest.json" else range(0, len(content), max(1, len(content) // 100))
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 0x07 if flipped[place] == 0x0A else 1 << place % 8  # another sign for the end of a line
        (path / name).write_bytes(flipped)
        damage = find_damage(path)
        assert damage is not None, f"byte {place}"
        assert name in damage
        assert "\n" not in damage
    with pytest.raises(InputError, match=r"^--resume .*step_00000001: .*; allowed: auto, or"):
        resolve_resume(str(path), tmp_path)
    (path / name).write_bytes(content)
    assert find_damage(path) is None
    assert resolve_resume(str(path), tmp_path) == path


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    metrics = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.9, 6: 0.1, 7: None}
    for step, metric in metrics.items():
        save(tmp_path, step, keep=2, keep_best=2)
        if metric is not None:
            found = [{"metrics": {"acc1": metric}}]
            rate_checkpoint(tmp_path, step, evaluations=found, metric=metric, keep=2, keep_best=2)
    assert names(tmp_path) == [f"step_0000000{step}" for step in (2, 5, 6, 7)]
    assert load_checkpoint(tmp_path / "step_00000002").evaluations == [{"metrics": {"acc1": 0.9}}]
    assert all(find_damage(path) is None for path in tmp_path.iterdir())
    save(tmp_path, 8, keep=1, keep_best=0)
    assert names(tmp_path) == ["step_00000008"]


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".step_00000003.tmp").mkdir()
    (tmp_path / ".step_00000003.tmp" / "student.safetensors").write_bytes(b"half")
    save(tmp_path, 4)
    assert names(tmp_path) == ["step_00000004"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_full_disk_leaves_the_checkpoints_before(small_disk: Path) -> None:
    save(small_disk, 1, size=2000)
    for size in (20_000, 5500):  # the first file does not fit; the last one
        with pytest.raises(
            RunError, match=r"^checkpoint step_00000002 could not be written: .*No space left"
        ) as caught:
            save(small_disk, 2, size=size)
        assert "\n" not in str(caught.value)
        assert "MiB free on the disk of" in str(caught.value)
        assert names(small_disk) == ["step_00000001"]
        assert find_checkpoint(small_disk) == small_disk / "step_00000001"


def test_full_disk_leaves_a_checkpoint_unrated(small_disk: Path) -> None:
    path = save(small_disk, 1)
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(512 * 1024))
    with pytest.raises(
        RunError, match="the evaluation in checkpoint step_00000001 could not be written: No space left"
    ):
        rate_checkpoint(small_disk, 1, evaluations=[{"note": "x" * 8192}], metric=0.5)
    assert find_damage(path) is None
    assert load_checkpoint(path).evaluations is None


def test_readers_meet_only_whole_checkpoints(tmp_path: Path) -> None:
    """Whatever folder has a checkpoint's name is whole, while they are written, rated and deleted."""
    seen, damaged = 0, []
    done = threading.Event()

    def look() -> None:
        nonlocal seen
        while not done.is_set():
            for path in tmp_path.glob("step_*"):
                damage = find_damage(path, contents=False)
                seen += 1
                if damage is not None and path.exists():
                    damaged.append(damage)

    watcher = threading.Thread(target=look)
    watcher.start()
    for step in range(1, 30):
        save(tmp_path, step, keep=1)
        rate_checkpoint(tmp_path, step, evaluations=[], metric=1 / step)
    done.set()
    watcher.join()
    assert seen > 30
    assert damaged == []


@pytest.fixture
def runs(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path: Path) -> Runs:
    return Runs(
        tmp_path, colours=colours, student=tiny_model, teacher=teacher_folder, train={"steps": 6, "log_every": 1}
    )


def stop_after_a_checkpoint(runs: Runs, ranks: int) -> Path:
    stopped = runs.start("run", "train.save_every=1", "train.keep=1", ranks=ranks)
    until(lambda: runs.saved_steps("run"))
    stopped.kill()
    newest = find_checkpoint(runs.folder / "run" / "checkpoints")
    assert newest is not None
    return newest


@pytest.mark.parametrize(
    ("ranks", "fails", "limit"),
    [pytest.param(1, 0, 1_000_000, id="one-rank"), pytest.param(2, 1, 5000, id="the-second-of-two")],
)
def test_run_that_cannot_write_a_checkpoint_goes_on_later(runs: Runs, ranks: int, fails: int, limit: int) -> None:
    """A limit of the file size stops a checkpoint; of the second rank, its own small file."""
    newest = stop_after_a_checkpoint(runs, ranks)
    content = {file.name: file.read_bytes() for file in newest.iterdir()}
    job = runs.start("run", "train.save_every=1", ranks=ranks, file_sizes={fails: limit})
    assert job.wait(60) == [1] * ranks, job.text()
    (line,) = job.lines()
    assert line.startswith(f"clipdistill: {'rank 1: ' if fails else ''}checkpoint step_0000000")
    assert "could not be written" in line
    assert "File too large" in line
    assert line.endswith(f"checkpoint {newest.name} is complete; --resume auto continues")
    assert "Traceback" not in job.text()
    assert names(newest.parent) == [newest.name]
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == content
    again = runs.start("run", ranks=ranks)
    assert again.wait() == [0] * ranks, again.text()
    assert_identical(runs.folder / "run", runs.whole(ranks=ranks))


@pytest.mark.slow
def test_run_that_cannot_write_its_metrics_goes_on_later(runs: Runs) -> None:
    """Only the first rank writes them, and the other ends with it."""
    newest = stop_after_a_checkpoint(runs, 2)
    metrics = runs.folder / "run" / "metrics.jsonl"
    long = b'{"step": 0, "note": "' + b"x" * 7000 + b'"}\n'
    metrics.write_bytes(long + metrics.read_bytes())
    job = runs.start("run", "train.save_every=1000", ranks=2, file_sizes={0: 8000})
    assert job.wait(60) == [1, 1], job.text()
    (line,) = job.lines()
    assert line.startswith("clipdistill: metrics.jsonl could not be written: File too large (")
    assert line.endswith(f"checkpoint {newest.name} is complete; --resume auto continues")
    metrics.write_bytes(metrics.read_bytes().removeprefix(long))
    again = runs.start("run", ranks=2)
    assert again.wait() == [0, 0], again.text()
    assert_identical(runs.folder / "run", runs.whole(ranks=2))


def test_a_checkpoint_holds_the_state_at_its_start(tmp_path: Path) -> None:
    """Training goes on while it is written: weights, optimizer and random state change in place."""
    weight, moment, noise = torch.zeros(1000, 1000), torch.zeros(1000, 1000), torch.zeros(10)
    writer = CheckpointWriter(tmp_path)
    writer.start(
        3,
        tensors={"student": {"weight": weight}},
        frozen={},
        optimizer={"state": {"weight": {"exp_avg": moment}}},
        rank_state={"random": {"noise": noise}},
        identity={"format": 1},
    )
    for changed in (weight, moment, noise):
        changed.fill_(7.0)
    writer.finish()
    state = load_checkpoint(tmp_path / "step_00000003")
    saved = [state.tensors["student"]["weight"], state.optimizer["state"]["weight"]["exp_avg"]]
    for tensor in (*saved, state.rank_states[0]["random"]["noise"]):
        assert not tensor.any()


def test_a_checkpoint_is_complete_some_steps_later(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path)
    writer.poll()
    state = {"student": {"a": torch.ones(3)}}
    content = {"tensors": state, "frozen": {}, "optimizer": {}, "rank_state": {}, "identity": {}}
    writer.start(1, **content)
    until(lambda: writer.poll() or (tmp_path / "step_00000001").exists())
    assert find_damage(tmp_path / "step_00000001") is None
    writer.start(2, **content)
    writer.start(3, **content)
    assert find_checkpoint(tmp_path) == tmp_path / "step_00000002"
    writer.salvage()
    assert names(tmp_path) == ["step_00000003"]
    writer.finish()


def test_frozen_weights_are_on_disk_once(tmp_path: Path) -> None:
    """Those of another process are written anew: its checkpoints do not depend on the same bytes."""
    writer = CheckpointWriter(tmp_path, keep=2)
    paths = [save(tmp_path, step, writer=writer) for step in (1, 2, 3)]
    paths.append(save(tmp_path, 4))
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    files = [(path / "frozen.safetensors").stat().st_ino for path in paths[1:]]
    assert files[0] == files[1] != files[2]
    for path in paths[1:]:
        assert find_damage(path) is None
        assert torch.equal(load_checkpoint(path).tensors["frozen"]["c"], torch.arange(60.0))


@pytest.mark.parametrize("change", ["damaged", "deleted", "no links"])
def test_frozen_weights_are_written_again_where_the_earlier_file_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    writer = CheckpointWriter(tmp_path, keep=9)
    earlier = save(tmp_path, 1, writer=writer) / "frozen.safetensors"
    match change:
        case "damaged":
            with earlier.open("r+b") as file:
                file.seek(-4, 2)
                file.write(b"\0" * 4)
        case "deleted":
            earlier.unlink()
        case "no links":
            monkeypatch.setattr("os.link", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    path = save(tmp_path, 2, writer=writer)
    assert find_damage(path) is None
    assert torch.equal(load_checkpoint(path).tensors["frozen"]["c"], torch.arange(60.0))


def test_nothing_of_a_checkpoint_that_cannot_be_salvaged_stays(small_disk: Path) -> None:
    save(small_disk, 1)
    writer = CheckpointWriter(small_disk)
    state = {"a": torch.randn(100_000)}
    writer.start(2, tensors={"student": state}, frozen={}, optimizer={}, rank_state={}, identity={})
    writer.salvage()
    assert names(small_disk) == ["step_00000001"]
