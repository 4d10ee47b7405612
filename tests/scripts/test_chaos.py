"""Kills and resumes through scripts/chaos.py, with real processes and signals; and that its comparison can fail."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.training.checkpoint import find_checkpoint
from scripts.compare_runs import compare_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def chaos(output: Path, *arguments: str) -> dict[str, Any]:
    """The figures that the program wrote; it must have found nothing wrong."""
    figures = output.with_suffix(".json")
    command = [sys.executable, "scripts/chaos.py", "--output", output, "--json", figures, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(figures.read_text())


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small campaign's folder and figures."""
    output = tmp_path_factory.mktemp("chaos") / "runs"
    return output, chaos(output, "--kills", "4", "--seed", "3", "--workers", "0", "--steps", "9")


def test_killed_and_resumed_run_equals_the_undisturbed_one(campaign: tuple[Path, dict[str, Any]]) -> None:
    _, figures = campaign
    assert figures["kills"] == figures["resumes"] == sum(figures["phases"].values()) == 4
    assert figures["seen"] == 9 * 2 * 8
    assert figures["lost"] == figures["repeated"] == figures["differing_tensors"] == 0
    assert figures["violations"] == []


def test_two_processes_with_workers_killed_and_resumed(tmp_path: Path) -> None:
    figures = chaos(tmp_path / "runs", "--kills", "8", "--seed", "1", "--processes", "2", "--steps", "18")
    assert figures["kills"] == figures["resumes"] == 8
    assert figures["seen"] == 18 * 2 * 8 * 2
    assert figures["lost"] == figures["repeated"] == figures["differing_tensors"] == 0


def test_help_names_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/chaos.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(f"--{flag} " in done.stdout for flag in ("kills", "seed", "processes", "workers", "json", "output"))


# The comparison, on a run that was changed by hand after its end.


@pytest.fixture
def runs(campaign: tuple[Path, dict[str, Any]], tmp_path: Path) -> tuple[Path, Path]:
    """The undisturbed run, and a copy of a killed one."""
    output, _ = campaign
    return output / "reference" / "run", Path(shutil.copytree(output / "round_00" / "run", tmp_path / "run"))


def edit_trace(run: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    path = run / "samples" / "rank_00000.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    edit(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_untouched_copy_is_the_same(runs: tuple[Path, Path]) -> None:
    result = compare_runs(*runs)
    assert result.same()
    assert result.compared > 500


def test_a_step_cut_from_the_trace_is_lost(runs: tuple[Path, Path]) -> None:
    edit_trace(runs[1], lambda records: records.remove(records[4]))
    result = compare_runs(*runs)
    assert (result.lost, result.repeated) == (16, 0)


def test_a_step_seen_twice_is_repeated(runs: tuple[Path, Path]) -> None:
    edit_trace(runs[1], lambda records: records.append(records[4]))
    result = compare_runs(*runs)
    assert (result.lost, result.repeated) == (0, 16)


def test_two_samples_in_exchanged_places_are_noticed(runs: tuple[Path, Path]) -> None:
    def exchange(records: list[dict[str, Any]]) -> None:
        keys = records[2]["keys"]
        keys[0], keys[1] = keys[1], keys[0]

    edit_trace(runs[1], exchange)
    result = compare_runs(*runs)
    assert (result.lost, result.repeated) == (2, 2)


def test_the_same_samples_with_other_pixels_are_noticed(runs: tuple[Path, Path]) -> None:
    edit_trace(runs[1], lambda records: records[2].update(pixels="0" * 32))
    result = compare_runs(*runs)
    assert (result.lost, result.repeated) == (16, 16)


def test_a_missing_trace_is_lost(runs: tuple[Path, Path]) -> None:
    (runs[1] / "samples" / "rank_00000.jsonl").unlink()
    result = compare_runs(*runs)
    assert (result.lost, result.repeated) == (result.seen, 0)


def test_one_changed_bit_of_the_exported_student_is_named(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "student" / "open_clip_model.safetensors"
    tensors = load_file(path)
    tensors["visual.head.proj.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, path)
    assert compare_runs(*runs).differing == ["student/open_clip_model.safetensors: visual.head.proj.weight"]


@pytest.mark.parametrize("file", ["optimizer.pt", "rank_00000.pt"])
def test_one_changed_number_of_a_checkpoint_is_named(runs: tuple[Path, Path], file: str) -> None:
    checkpoint = find_checkpoint(runs[1] / "checkpoints")
    assert checkpoint is not None
    state = torch.load(checkpoint / file, weights_only=True)
    if file == "optimizer.pt":
        next(iter(state["state"].values()))["exp_avg"].view(-1)[0] += 1e-6
    else:
        state["stream"]["cursors"][0]["position"] += 1
    torch.save(state, checkpoint / file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = (checkpoint / file).read_bytes()
    manifest["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    (name,) = compare_runs(*runs).differing
    assert name.startswith(f"checkpoints/{checkpoint.name}/{file}: ")


def test_a_damaged_checkpoint_is_not_taken_for_the_last(runs: tuple[Path, Path]) -> None:
    checkpoint = find_checkpoint(runs[1] / "checkpoints")
    assert checkpoint is not None
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert len(compare_runs(*runs).differing) > 500


def test_metrics_are_compared_save_for_timings(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["samples_per_second"] += 1
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare_runs(*runs).same()
    records[1]["loss"] += 1e-12
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare_runs(*runs).differing == ["metrics.jsonl: record 1: loss"]
