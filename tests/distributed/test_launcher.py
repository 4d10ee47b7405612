"""What Accelerate's launcher was asked for, and what it started: real launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ACCELERATE = "accelerate.commands.launch"


def launched(tmp_path: Path, launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A launcher over a command that is refused for its --device, if not before."""
    module = [sys.executable, "-m", launcher, *arguments]
    script = [str(ROOT / "scripts" / "evaluate.py"), "--model", "x", "--data", "x", "--device", "none"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*module, *script], env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_one_process_in_place_of_two_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 2\nuse_cpu: true\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
    )
    for arguments in (["--cpu", "--num_processes", "2"], ["--config_file", str(config)]):
        done = launched(tmp_path, ACCELERATE, *arguments)
        assert done.returncode != 0
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("clipdistill: ")]
        assert "num_processes 2, but it has started 1; allowed: --multi_gpu, or on CPUs torchrun" in line


@pytest.mark.slow
def test_as_many_as_asked_for_are_accepted(tmp_path: Path) -> None:
    commands = [[ACCELERATE, "--cpu", "--num_processes", "1"], ["torch.distributed.run", "--nproc_per_node", "2"]]
    for command in commands:
        done = launched(tmp_path, *command)
        lines = [line for line in done.stderr.splitlines() if line.startswith("clipdistill: ")]
        assert lines
        assert all(line.startswith("clipdistill: --device none: not available here") for line in lines), done.stderr
