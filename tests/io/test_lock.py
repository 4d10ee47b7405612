"""The lock of an output: between real processes, after kills, and beside holders on other machines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipdistill.errors import InputError, RunError
from clipdistill.io.lock import Lock
from tests.processes import until

HOLDER = """
import os, sys, time
from pathlib import Path
from clipdistill.io.lock import Lock
lock = Lock(Path(sys.argv[1]), "output: a")
if os.fork() == 0:  # a data worker, which outlives its parent
    time.sleep(60)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds the lock, with a forked child."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "a" / ".lock"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_holder_is_named_and_a_killed_one_followed_at_once(
    holder: "subprocess.Popen[bytes]", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a" / ".lock"
    os.kill(holder.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"^output: a: in use by pid {holder.pid} on host .*; allowed: ") as caught:
        Lock(file, "output: a")
    assert "\n" not in str(caught.value)
    holder.kill()
    started = time.monotonic()
    with Lock(file, "output: a"):
        assert time.monotonic() - started < 2
        assert json.loads(file.read_text())["pid"] == os.getpid()
        assert f"taken over from pid {holder.pid}" in caplog.text
        with pytest.raises(InputError, match=f"in use by pid {os.getpid()} "):
            Lock(file, "output: a")
    assert not file.exists()


def left_behind(file: Path, **changes: object) -> None:
    """A lock file whose holder cannot be seen from here."""
    with Lock(file, "output: a"):
        content = json.loads(file.read_text())
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content | changes))


def test_a_holder_on_another_machine_is_followed_when_its_heart_has_stopped(tmp_path: Path) -> None:
    file = tmp_path / "a" / ".lock"
    left_behind(file, host="elsewhere", machine=["elsewhere"])
    started = time.monotonic()
    with Lock(file, "output: a", stale_after=0.3):
        assert time.monotonic() - started > 0.25
    left_behind(file, host="elsewhere", machine=["elsewhere"])
    beat = "import os, sys, time\nwhile True:\n  os.utime(sys.argv[1])\n  time.sleep(0.1)"
    heart = subprocess.Popen([sys.executable, "-c", beat, file])
    before = file.stat().st_mtime_ns
    until(lambda: file.stat().st_mtime_ns != before)
    try:
        with pytest.raises(InputError, match=r"in use by pid \d+ on host elsewhere"):
            Lock(file, "output: a", stale_after=5.0)
    finally:
        heart.kill()
        heart.wait()


@pytest.mark.parametrize("content", ["", "{", "[]", "\0" * 100, '{"pid": 1}'])
def test_a_damaged_lock_file_belongs_to_nobody(tmp_path: Path, content: str) -> None:
    file = tmp_path / ".lock"
    file.write_text(content)
    with Lock(file, "output: a"):
        pass
    assert not file.exists()


def test_a_dead_holder_whose_id_was_given_again_is_followed(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    left_behind(file, pid=1, started="1")
    with Lock(file, "output: a") as lock:
        lock.check()


def test_a_lock_that_was_lost_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    lock = Lock(file, "output: a")
    file.unlink()
    with Lock(file, "output: a") as other:
        with pytest.raises(RunError, match=r"^output: a: another process has taken it over"):
            lock.check()
        lock.release()
        other.check()


def test_a_heart_beats(tmp_path: Path) -> None:
    with Lock(tmp_path / ".lock", "output: a", stale_after=0.3):
        before = (tmp_path / ".lock").stat().st_mtime_ns
        until(lambda: (tmp_path / ".lock").stat().st_mtime_ns > before, 10)


def test_of_many_that_start_at_once_one_wins(tmp_path: Path) -> None:
    race = """
import sys, time
from pathlib import Path
from clipdistill.io.lock import Lock
print("ready", flush=True)
sys.stdin.readline()
try:
    Lock(Path(sys.argv[1]), "output: a")
    print("held", flush=True)
    sys.stdin.readline()
except ValueError:
    print("refused", flush=True)
"""
    left_behind(tmp_path / ".lock", pid=1, started="1")
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", race, tmp_path / ".lock"]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outcomes = [process.stdout.readline() for process in processes if process.stdout is not None]
    for process in processes:
        process.communicate("\n")
    assert sorted(outcomes) == ["held\n", *["refused\n"] * 3]
