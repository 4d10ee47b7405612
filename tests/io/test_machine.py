"""``io.machine``, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, sys
import torch
from clipdistill.io.machine import keep_freed_memory

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    activations = [torch.ones(mib, 2**18) for mib in (20, 4, 40, 1)]

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    step()
before = page_faults()
for _ in range(20):
    step()
print(page_faults() - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    assert page_faults("keep") < page_faults("default") / 10


CORES = """
import os, sys
from pathlib import Path
from clipdistill.io.machine import cores_per_process
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
print(cores_per_process(Path(sys.argv[2])))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity")
@pytest.mark.parametrize(
    ("cores", "quota", "processes", "expected"),
    [
        (2, "max 100000", "1", 2),
        (2, "max 100000", "2", 1),
        (2, "max 100000", "3", 1),
        (1, "max 100000", "1", 1),
        (2, "150000 100000", "1", 1),
        (2, "50000 100000", "1", 1),
        (2, "damaged", "1", 2),
    ],
)
def test_cores_are_what_the_system_grants(
    tmp_path: Path, cores: int, quota: str, processes: str, expected: int
) -> None:
    if len(os.sched_getaffinity(0)) < cores:
        pytest.skip("fewer cores")
    (tmp_path / "cpu.max").write_text(quota)
    command = [sys.executable, "-c", CORES, str(cores), str(tmp_path / "cpu.max")]
    environment = os.environ | {"LOCAL_WORLD_SIZE": processes}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == expected
