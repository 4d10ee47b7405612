"""``scripts/gpu_report.py`` without a GPU: every part runs, on tiny models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_report.py"
PARTS = ["ceilings", "kernels", "losses", "teacher", "student", "trainer", "loader", "peer", "bank", "resume"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_every_part_runs(tmp_path: Path) -> None:
    figures = tmp_path / "dry.json"
    command = [sys.executable, str(SCRIPT), "--dry", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = json.loads(figures.read_text())["parts"]
    assert list(parts) == PARTS
    assert not any("error" in part for part in parts.values())
    assert parts["kernels"]["passed"]
    assert parts["resume"]["killed"]
    assert parts["resume"]["samples"] > 0
    assert parts["resume"]["lost"] == parts["resume"]["repeated"] == parts["resume"]["values_differing"] == 0


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU here; allowed: a machine with one, or --dry" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
