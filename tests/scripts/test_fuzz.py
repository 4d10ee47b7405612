"""The fuzz of shards through its command line: small here, all of it when slow tests are run."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_shards.py"
FAULTS = ("crashes", "hangs", "wrong_samples", "lost_samples", "miscounted", "executed")


def fuzz(folder, *arguments):
    result = folder / "fuzz.json"
    command = [sys.executable, str(SCRIPT), "--json", str(result), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert result.exists(), done.stderr
    return done.returncode, json.loads(result.read_text()), done.stdout


def assert_flawless(status, found, output, shards):
    assert {kind: found[kind] for kind in FAULTS} == dict.fromkeys(FAULTS, 0), output
    assert status == 0
    assert found["shards"] == shards
    assert found["samples"] == found["good"] + sum(found["skipped"].values())
    assert found["good"] > found["samples"] / 2
    assert shards / 4 < found["damaged_shards"] < shards
    assert {"machine", "versions", "command", "seed", "seconds"} <= found.keys()


def test_sixty_mutated_shards_are_read_without_a_fault(tmp_path):
    assert_flawless(*fuzz(tmp_path, "--shards", 60, "--seed", 1), shards=60)


@pytest.mark.slow
def test_two_thousand_mutated_shards_are_read_without_a_fault(tmp_path):
    status, found, output = fuzz(tmp_path, "--shards", 2000, "--seed", 2)
    assert_flawless(status, found, output, shards=2000)
    assert {"broken image", "too many pixels", "no image", "duplicate member", "duplicate key", "broken json"} <= found[
        "skipped"
    ].keys()


def test_a_shard_over_its_time_is_a_fault_and_is_kept(tmp_path):
    status, found, _ = fuzz(tmp_path, "--only", 5, "--seed", 7, "--seconds-per-shard", 0, "--keep", tmp_path / "kept")
    assert status == 1
    assert (found["shards"], found["hangs"]) == (1, 1)
    kept = json.loads((tmp_path / "kept" / "7-5.json").read_text())
    assert (kept["seed"], kept["number"]) == (7, 5)
    with tarfile.open(tmp_path / "kept" / "7-5.tar") as tar:
        assert tar.getmembers()
