"""The machine: its memory allocator, and its name, clock, peak memory and matmul rate for measurements."""

import ctypes
import math
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for later allocations of this process and of its later children.

    By default it returns the memory of a step's activations to the kernel, and every step pays page faults to get it
    back. Has no effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""From malloc.h."""


def cores_per_process(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores for this process: those that the system grants it, divided among a launcher's processes on this machine.

    Args:
        quota: file of Linux's cgroup v2 with a container's share of processor time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, math.floor(min(cores, _read_quota(quota))) // processes)


def _read_quota(file: Path) -> float:
    """A share of processor time, in cores; infinity without a limit."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = device_time(device)
        a @ b
        best = min(best, device_time(device) - started)
    return 2 * n**3 / best


def describe_machine() -> str:
    """Processor, number of cores and torch threads, as recorded with a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads"


def device_time(device: torch.device) -> float:
    """The time in seconds, after the device has finished all queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: on a GPU, or resident on a CPU without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
