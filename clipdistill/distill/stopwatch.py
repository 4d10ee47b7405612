"""Seconds of each section of a training step."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.io.machine import device_time


class NoStopwatch:
    """Measures nothing and synchronises no device."""

    def section(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """A part of a step."""
        return nullcontext()

    def step(self) -> AbstractContextManager[None]:
        """A step."""
        return nullcontext()


class Stopwatch(NoStopwatch):
    """Seconds of each section of each step; the device is synchronised at every section boundary.

    The time of a nested section does not count towards the outer one.

    Attributes:
        steps: for each step, its seconds by section, and the total under ``""``.
        flops: floating-point operations of the first step, on this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[dict[str, float]] = []
        self.flops = 0
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """A part of a step."""
        self._account()
        self._open.append(name)
        try:
            yield
        finally:
            self._account()
            self._open.pop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step."""
        self.steps.append({})
        with ExitStack() as stack:
            counter = stack.enter_context(FlopCounterMode(display=False)) if len(self.steps) == 1 else None
            started = self._since = device_time(self._device)
            yield
        self.steps[-1][""] = device_time(self._device) - started
        if counter is not None:
            self.flops = counter.get_total_flops()

    def _account(self) -> None:
        """Add the time since the last boundary to the innermost section."""
        now = device_time(self._device)
        if self._open and self.steps:
            times = self.steps[-1]
            times[self._open[-1]] = times.get(self._open[-1], 0.0) + now - self._since
        self._since = now
