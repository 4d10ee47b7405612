"""Where a training step's time goes, what it computes, and what memory it takes."""

import os
import platform
import resource
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.distributed.collectives import gather_objects, world_size

if TYPE_CHECKING:
    from clipdistill.config import Config
    from clipdistill.distributed.signals import Interruption
    from clipdistill.training.trainer import Run

WARM_UP = 3
"""Steps that are not measured: memory is found, kernels are chosen, workers start."""

SECTIONS = ("data wait", "teacher", "student forward", "loss", "backward", "optimizer")


class NoStopwatch:
    """Measures nothing, and makes no device wait."""

    def section(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """A part of a step."""
        return nullcontext()

    def step(self) -> AbstractContextManager[None]:
        """A step."""
        return nullcontext()


class Stopwatch(NoStopwatch):
    """Seconds of the sections of each step; the device is waited for at every border.

    A section inside another one is not part of the outer one.

    Attributes:
        steps: for each step, its seconds by section, and under ``""`` in all.
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
            started = self._since = _now(self._device)
            yield
        self.steps[-1][""] = _now(self._device) - started
        if counter is not None:
            self.flops = counter.get_total_flops()

    def _account(self) -> None:
        """The time since the last border belongs to the innermost section."""
        now = _now(self._device)
        if self._open and self.steps:
            times = self.steps[-1]
            times[self._open[-1]] = times.get(self._open[-1], 0.0) + now - self._since
        self._since = now


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """A few measured steps.

    Attributes:
        seconds: of a step, the median.
        sections: seconds of its parts, medians; ``backward`` has the exchange of gradients in it.
        exchange: seconds that this exchange takes alone; 0 for one process.
        samples: of all processes in a step.
        flops: of a step and process.
        peak_flops: floating-point operations a second of a large matrix product in the run's precision.
        peak_bytes: largest memory of this process: on the device, or of a CPU process without its workers.
        checkpoint_bytes: size of a checkpoint.
        total_steps: of the whole run.
        processes: of the run.
        device: its name.
    """

    seconds: float
    sections: dict[str, float]
    exchange: float
    samples: int
    flops: int
    peak_flops: float
    peak_bytes: int
    checkpoint_bytes: int
    total_steps: int
    processes: int
    device: str

    @property
    def samples_per_second(self) -> float:
        """Of all processes."""
        return self.samples / self.seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation (MFU): the step's operations over what the device could do in its time."""
        return self.flops / self.seconds / self.peak_flops

    def print(self, console: Console) -> None:
        """As a table."""
        table = Table(title=f"a step: {self.seconds * 1e3:,.1f} ms, {self.samples:,} samples, on {self.device}")
        table.add_column("section")
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
        rest = self.seconds - sum(self.sections.values())
        for name, seconds in [*self.sections.items(), ("other", max(0.0, rest))]:
            table.add_row(name, f"{seconds * 1e3:,.1f}", f"{seconds / self.seconds:.1%}")
        console.print(table)
        if self.exchange:
            console.print(f"communication: {self.exchange * 1e3:,.1f} ms to exchange the gradients, part of backward")
        console.print(
            f"{self.samples_per_second:,.0f} samples/s by {self.processes} process(es); {self.flops / 1e9:,.1f} GFLOP "
            f"a step and process, MFU {self.utilisation:.1%} of the {self.peak_flops / 1e12:,.2f} TFLOP/s of a matrix "
            f"product here; peak memory {self.peak_bytes / 2**30:,.2f} GiB",
            highlight=False,
        )


def profile_steps(config: "Config", steps: int, *, interruption: "Interruption | None" = None) -> StepProfile:
    """Take some steps of a run, of which nothing is left behind; all processes of the run call this.

    Args:
        config: the run.
        steps: how many are measured, after ``WARM_UP`` others.
        interruption: as of ``train``.

    Raises:
        InputError: as ``train``.
    """
    from clipdistill.distributed.signals import Interruption
    from clipdistill.training.trainer import open_run, start_processes

    train = replace(
        config.train,
        steps=WARM_UP + steps,
        epochs=None,
        log_every=WARM_UP + steps,
        evaluate_every=None,
        save_every=10**9,
        trace=False,
        trackers=[],
    )
    trial = replace(config, train=train, evaluation=replace(config.evaluation, folders=[]))
    with nullcontext(interruption) if interruption else Interruption() as interruption:
        accelerator = start_processes(trial)
        main = accelerator.is_main_process
        output, temporary = _shared_folder(Path(config.output))
        try:
            trial = replace(trial, output=str(output))
            with open_run(trial, accelerator, interruption=interruption) as run:
                return _measure(config, run)
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)


def _measure(config: "Config", run: "Run") -> StepProfile:
    run.stopwatch = stopwatch = Stopwatch(run.device)
    run.fit()
    peak_bytes = _peak_bytes(run.device)
    measured = stopwatch.steps[WARM_UP:]
    names = [name for name in SECTIONS if any(name in times for times in measured)]
    batches = run.loader.batches_before(config.train.epochs or 0)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    processes = run.accelerator.num_processes
    return StepProfile(
        seconds=_median([times[""] for times in measured]),
        sections={name: _median([times.get(name, 0.0) for times in measured]) for name in names},
        exchange=_exchange(run),
        samples=config.data.batch_size * config.train.accumulate * processes,
        flops=stopwatch.flops,
        peak_flops=matmul_rate(run.device, dtype),
        peak_bytes=peak_bytes,
        checkpoint_bytes=sum(file.stat().st_size for file in run.output.glob("checkpoints/*/*")),
        total_steps=config.train.steps or round(batches / config.train.accumulate),
        processes=processes,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
    )


def _shared_folder(output: Path) -> tuple[Path, Path]:
    """A new folder that all processes of a run see, beside its output where they may be on several machines; and what
    is to be removed of it."""
    if world_size() == 1:
        temporary = Path(tempfile.mkdtemp(prefix="clipdistill-"))
        return temporary / "run", temporary
    (token, *_) = gather_objects(secrets.token_hex(4))
    folder = output.with_name(f".{output.name}-profile-{token}")
    return folder, folder


def _exchange(run: "Run") -> float:
    """Seconds to add up gradients over the processes, with nothing else going on."""
    if run.accelerator.num_processes == 1:
        return 0.0
    numbers = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    gradient = torch.zeros(numbers, device=run.device)
    seconds = []
    for _ in range(3):
        started = _now(run.device)
        torch.distributed.all_reduce(gradient)
        seconds.append(_now(run.device) - started)
    return _median(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = _now(device)
        a @ b
        best = min(best, _now(device) - started)
    return 2 * n**3 / best


def machine() -> str:
    """The processor, its cores, and the threads that torch takes, for the record of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch with {torch.get_num_threads()} threads"


def _now(device: torch.device) -> float:
    """The time when the device has done all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
