"""Processes of this and other machines, as named in files that outlive them."""

import contextlib
import os
import socket
from pathlib import Path

_EXITING = 0x4
"""Linux's PF_EXITING, among the flags of a process."""


def machine() -> list[str]:
    """What two processes have in common if they see each other's ids: host, boot, namespace of process ids."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        found.append(str(Path("/proc/self/ns/pid").readlink()))
    return found


def start_of(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since the boot where known; None: it ends or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" or int(fields[6]) & _EXITING else fields[19]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "unknown"
    return None
