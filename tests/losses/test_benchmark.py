"""scripts/benchmark_losses.py: its records, and that its peak memory is exact."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_losses.py"
KEYS = {"loss", "batch", "classes", "dim", "device", "dtype", "seconds", "peak_bytes"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_losses", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_quick_writes_a_record_for_every_loss_and_shape(tmp_path):
    out, picture = tmp_path / "losses.json", tmp_path / "losses.png"
    command = [sys.executable, SCRIPT, "--quick", "--device", "cpu", "--rounds", "1", "--seconds", "0.01"]
    run = subprocess.run([*command, "--json", out, "--plot", picture], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    records = json.loads(out.read_text())
    found = {(r["loss"], r["batch"], r["classes"], r["dim"]): r for r in records}
    assert len(found) == len(records)
    assert all(r.keys() >= KEYS and r["device"] == "cpu" and r["dtype"] == "float32" for r in records)
    assert {r["loss"] for r in records} == {
        "gkl_pairwise",
        "gkl",
        "gkl_fused",
        "gkl_from_features_plain",
        "kl",
        "kl_from_features",
        "cross_entropy",
    }
    for shape in [(64, 1000, None), (256, 1000, None), (1024, 1000, None)]:
        matrix = 4 * shape[0] * shape[1]
        assert found["gkl", *shape]["seconds"] > 0
        assert matrix <= found["gkl", *shape]["peak_bytes"] < found["kl", *shape]["peak_bytes"]
    pairwise = found["gkl_pairwise", 64, 1000, None]
    assert pairwise["peak_bytes"] >= 300 * found["gkl", 64, 1000, None]["peak_bytes"]

    too_large = found["gkl_pairwise", 1024, 1000, None]
    assert too_large["seconds"] is None
    assert too_large["skipped"] == "needs 29 GB, 2 GB are allowed"
    assert "needs 29 GB, 2 GB are allowed" in run.stdout
    assert "GKL over KL at (256, 1000), float32: time" in run.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_only_keeps_the_named_losses(script, tmp_path, monkeypatch):
    out = tmp_path / "losses.json"
    settings = ["--quick", "--device", "cpu", "--rounds", "1", "--seconds", "0.001", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmark_losses.py", *settings, "--only", "kl"])
    script.main()
    assert {r["loss"] for r in json.loads(out.read_text())} == {"kl"}


def test_peak_memory_is_the_largest_sum_held_at_a_time(script):
    def work():
        first = torch.ones(1000)
        second = torch.ones(500)
        del first
        third = torch.ones(250)
        return second, third

    assert script.peak_bytes(work, "cpu") == 4 * 1500


def test_forms_of_the_same_loss_must_agree(script):
    script.check_agreement({"gkl": 2.0, "gkl_pairwise": 2.0001, "kl": 5.0}, "float32")
    with pytest.raises(AssertionError):
        script.check_agreement({"gkl": 2.0, "gkl_pairwise": 2.1}, "float32")
