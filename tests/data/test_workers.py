"""Workers that die, at the worst moment."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import resource_sharer
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset

from clipdistill.data.workers import dead_worker_message, from_workers
from clipdistill.errors import InputError
from tests.processes import until


class DeafThenDead(IterableDataset[object]):
    """Its worker closes the socket through which it would hand over its tensor, and dies a second later: long enough
    for the parent to find the socket gone, and the worker alive."""

    def __init__(self, deaf: Event) -> None:
        super().__init__()
        self.deaf = deaf

    def __iter__(self) -> Iterator[object]:
        yield "nothing to hand over"
        yield torch.zeros(4)
        sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
        until(lambda: sharer._address is not None)
        Path(sharer._address).unlink()
        self.deaf.set()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_while_its_tensor_is_fetched_is_named() -> None:
    deaf = multiprocessing.get_context("fork").Event()
    items = from_workers(DeafThenDead(deaf), workers=1, max_pixels=100)
    assert next(items) == "nothing to hand over"
    assert deaf.wait(60)
    with pytest.raises(RuntimeError) as caught:
        next(items)
    message = dead_worker_message(caught.value)
    assert message is not None
    assert message.endswith("is killed by signal: Killed")


KILLED_IN_EVENT = """
import os, signal, sys
from torch.utils.data import IterableDataset, get_worker_info
from clipdistill.data.workers import dead_worker_message, from_workers

def kill(frame, event, argument):
    if frame.f_code.co_name == "is_set" and (event == "return" or getattr(argument, "__name__", "") == "acquire"):
        os.kill(os.getpid(), signal.SIGKILL)

class Numbers(IterableDataset):
    def __iter__(self):
        yield 1
        if get_worker_info().id == 0:
            sys.setprofile(kill)
        while True:
            yield 2

try:
    for _ in from_workers(Numbers(), workers=2, max_pixels=100):
        pass
except RuntimeError as error:
    print(dead_worker_message(error))
"""


def test_a_worker_killed_while_it_checks_for_the_end_does_not_hang_its_parent() -> None:
    """multiprocessing's Event has a lock, with which the worker would die."""
    parent = subprocess.Popen([sys.executable, "-c", KILLED_IN_EVENT], stdout=subprocess.PIPE, start_new_session=True)
    try:
        output, _ = parent.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
    assert output.startswith(b"DataLoader worker (pid"), output
    assert parent.returncode == 0


def test_other_errors_are_not_about_workers() -> None:
    assert dead_worker_message(RuntimeError("CUDA out of memory")) is None


def test_the_end_of_one_leaves_the_workers_of_another_alone() -> None:
    """Even if it ends with an error."""

    class Numbers(IterableDataset[int]):
        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def __iter__(self) -> Iterator[object]:
            yield from range(self.last)
            yield InputError("no more")

    first = from_workers(Numbers(1), workers=1, max_pixels=100)
    assert next(first) == 0
    second = from_workers(Numbers(10**9), workers=1, max_pixels=100)
    assert next(second) == 0
    with pytest.raises(InputError, match="no more"):
        next(first)
    assert list(islice(second, 1000)) == list(range(1, 1001))
    second.close()
    assert not multiprocessing.active_children()
