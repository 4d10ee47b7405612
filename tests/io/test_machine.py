"""``io.machine``, in processes of their own."""

import subprocess
import sys

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
