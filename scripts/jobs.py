"""Training runs in separate processes, to be killed and resumed: for the chaos script and for tests.

A job is started as by a user, with ``python`` or torchrun; or its ranks are started one by one, as by a batch system,
from a server that has imported everything, so that each starts in a fraction of a second.
"""

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

from clipdistill.cli import main

TRAIN = Path(__file__).with_name("train.py")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_MARK = "CLIPDISTILL_JOB"
"""Environment variable that identifies the processes of a job."""

_numbers = itertools.count()


class Job:
    """Ranks of one run.

    Args:
        arguments: of ``clipdistill train``.
        log: receives the output of all ranks.
        ranks: number of ranks.
        launcher: start it with ``python``, or torchrun for several ranks; otherwise rank by rank.
        file_sizes: without launcher, the largest file in bytes that a rank may write, by rank.
    """

    def __init__(
        self,
        *arguments: object,
        log: Path,
        ranks: int = 1,
        launcher: bool = False,
        file_sizes: Mapping[int, int] | None = None,
    ) -> None:
        self.log = log
        self.started = time.monotonic()
        self._size = ranks
        self._mark = f"{os.getpid()}.{next(_numbers)}"
        self._ranks: list[int] = []
        self._workers: list[int] = []
        words = [str(argument) for argument in arguments]
        self._leaders: list[_Process] = [self._launch(words)] if launcher else self._start(words, file_sizes or {})

    def _launch(self, arguments: Sequence[str]) -> "_Process":
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._size}"]
        command = [sys.executable, *(torchrun if self._size > 1 else []), str(TRAIN), *arguments]
        with self.log.open("a") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | ENVIRONMENT | {_MARK: self._mark},
                start_new_session=True,
            )
        return _Process(process)

    def _start(self, arguments: Sequence[str], file_sizes: Mapping[int, int]) -> list["_Process"]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        world = {"WORLD_SIZE": self._size, "LOCAL_WORLD_SIZE": self._size}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # type: ignore[dict-item]
        processes = []
        for rank in range(self._size):
            place = world | {"RANK": rank, "LOCAL_RANK": rank} if self._size > 1 else {}
            environment = ENVIRONMENT | {name: str(value) for name, value in place.items()}
            target = (arguments, environment, str(self.log), file_sizes.get(rank))
            processes.append(_server().Process(target=_train, args=target))
        for process in processes:
            process.start()
        return [_Process(process) for process in processes]

    # What runs.

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks; for a launched job, empty until the launcher has started all of them."""
        if not self._ranks:
            leaders = [leader.pid for leader in self._leaders]
            launched = self._size > 1 and len(leaders) == 1
            found = _children(leaders[0]) if launched else leaders
            self._ranks = found if len(found) == self._size else []
        return self._ranks

    @property
    def leader(self) -> int:
        """Id of the process that was started first: the launcher, if there is one."""
        return self._leaders[0].pid

    def workers(self) -> list[int]:
        """Ids of the data workers of all ranks; cached once found, as the search takes many milliseconds."""
        if not self._workers:
            self._workers = [child for rank in self.pids for child in _children(rank)]
        return self._workers

    def children(self) -> list[psutil.Process]:
        """The current data workers of all ranks."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(pid).children(recursive=True)
        return found

    def processes(self) -> list[psutil.Process]:
        """All living processes of a launched job, including orphans."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and is_alive(process.pid):
                    found.append(process)
        return found

    # Its end.

    def ended(self) -> bool:
        """Whether the processes that were started have ended."""
        return None not in self.codes

    @property
    def codes(self) -> list[int | None]:
        """Exit codes of the processes that were started; None: still running."""
        return [leader.code() for leader in self._leaders]

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Wait for the end; returns the exit codes of all ranks, or of the launcher.

        Raises:
            AssertionError: they have not ended in time.
        """
        self._join(seconds)
        assert self.ended(), f"still running after {seconds} s: {self.codes}\n{self.text()}"
        return self.codes

    def join(self, rank: int, seconds: float) -> int | None:
        """Wait for one rank; returns its exit code."""
        self._leaders[rank].join(seconds)
        return self._leaders[rank].code()

    def wait_for_all(self, seconds: float) -> str | None:
        """Wait for all processes of a launched job; describes those that outlived it and were killed, if any."""
        deadline = time.monotonic() + seconds
        self._join(seconds)
        ended = self.ended()
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.kill_rest()
        if left:
            return f"{left} processes left {seconds:.0f} s later{'' if ended else ', the first of the job among them'}"
        return None

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for leader in self._leaders:
            leader.join(max(0.0, deadline - time.monotonic()))

    # Signals.

    def signal(self, pid: int, number: int) -> bool:
        """Send a signal to one process; returns whether it was alive."""
        alive = is_alive(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return alive

    def signal_groups(self, number: int) -> bool:
        """Send a signal to all processes at once, like a batch system or a terminal; returns whether any was alive."""
        living = [pid for pid in (self.leader, *self.pids) if is_alive(pid)]
        for pid in set(living):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)
        return bool(living)

    def kill(self) -> None:
        """SIGKILL the processes that were started."""
        for leader in self._leaders:
            self.signal(leader.pid, signal.SIGKILL)
        self._join(60)

    def kill_rest(self) -> int:
        """SIGKILL the remaining processes of a launched job; returns their number."""
        count = 0
        while left := self.processes():
            count = max(count, len(left))
            for process in left:
                self.signal(process.pid, signal.SIGKILL)
            self.ended()  # reaps
            time.sleep(0.01)
        self._join(60)
        return count

    # What it printed.

    def text(self) -> str:
        """The output of all ranks."""
        return self.log.read_text() if self.log.exists() else ""

    def lines(self) -> list[str]:
        """The messages that clipdistill has printed when it ended."""
        return [line for line in self.text().splitlines() if line.startswith("clipdistill: ")]


class _Process:
    """A process started by subprocess or multiprocessing."""

    def __init__(self, process: "subprocess.Popen[bytes] | multiprocessing.process.BaseProcess") -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def code(self) -> int | None:
        """Its exit code; None: still running."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        if isinstance(self._process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        else:
            self._process.join(seconds)


def is_alive(pid: int) -> bool:
    """Whether a process is running."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _children(pid: int) -> list[int]:
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children() if is_alive(child.pid)]
    return []


def _server() -> "multiprocessing.context.ForkServerContext":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipdistill.training.trainer", "clipdistill.cli", __name__])
    return context


def _train(arguments: Sequence[str], environment: Mapping[str, str], log: str, file_size: int | None) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process started normally
    os.setpgid(0, 0)
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(main(["train", *arguments]))
