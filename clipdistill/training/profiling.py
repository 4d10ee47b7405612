"""Profile a training step: time per section, FLOPs and memory."""

import secrets
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from clipdistill.distill.stopwatch import Stopwatch
from clipdistill.distributed.collectives import gather_objects, world_size
from clipdistill.distributed.signals import Interruption
from clipdistill.io.machine import device_time, matmul_rate, peak_bytes
from clipdistill.training.trainer import Run, open_run, start_processes

if TYPE_CHECKING:
    from clipdistill.config import Config

WARM_UP = 3
"""Steps that are not measured: memory is allocated, kernels are selected, workers start."""

_STARVED = 0.05
"""Share of a step spent waiting for data from which on data is called the bottleneck."""

SECTIONS = ("data wait", "teacher", "attack", "student forward", "loss", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Measurements of a few steps.

    Attributes:
        seconds: median time of a step.
        sections: median seconds of each section; ``backward`` includes the all-reduce of the gradients.
        exchange: seconds of this all-reduce alone; 0 for one process.
        samples: samples of all processes per step.
        flops: floating-point operations per step and process.
        peak_flops: floating-point operations per second of a large matrix product in the run's precision.
        peak_bytes: peak memory of this process: on a GPU, or resident on a CPU without its workers.
        checkpoint_bytes: size of a checkpoint.
        total_steps: steps of the full run.
        processes: number of processes.
        workers: decoding processes of each.
        device: name of the device.
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
    workers: int
    device: str

    @property
    def samples_per_second(self) -> float:
        """Throughput of all processes."""
        return self.samples / self.seconds

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation (MFU): FLOPs per second of a step, relative to ``peak_flops``."""
        return self.flops / self.seconds / self.peak_flops

    @property
    def bottleneck(self) -> str:
        """Which part makes the others wait, and what would help."""
        waiting = self.sections.get("data wait", 0.0)
        rest = self.samples / (self.seconds - waiting)
        if waiting > _STARVED * self.seconds:
            decoders = f"{self.workers} decoding process(es) of each" if self.workers else "decoding in the process"
            return (
                f"data starves the rest: {self.samples_per_second:,.0f} samples/s from {decoders}, where the other "
                f"sections take {rest:,.0f}; more come with data.workers, data.augmentation.jpeg_decoder, and a "
                "teacher cache with teacher_cache.pixels"
            )
        longest = max((name for name in self.sections if name != "data wait"), key=lambda name: self.sections[name])
        hint = "; a teacher cache removes it" if longest == "teacher" else ""
        return f"data keeps up; the longest section is {longest} ({self.sections[longest] / self.seconds:.0%}{hint})"

    def print(self, console: Console) -> None:
        """Print as a table."""
        table = Table(title=f"a step: {self.seconds * 1e3:,.1f} ms, {self.samples:,} samples, on {self.device}")
        table.add_column("section")
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
        rest = self.seconds - sum(self.sections.values())
        for name, seconds in [*self.sections.items(), ("other", max(0.0, rest))]:
            table.add_row(name, f"{seconds * 1e3:,.1f}", f"{seconds / self.seconds:.1%}")
        console.print(table)
        console.print(self.bottleneck, highlight=False)
        if self.exchange:
            console.print(f"communication: {self.exchange * 1e3:,.1f} ms to exchange the gradients, part of backward")
        console.print(
            f"{self.samples_per_second:,.0f} samples/s by {self.processes} process(es); {self.flops / 1e9:,.1f} "
            f"GFLOP per step and process, MFU {self.utilisation:.1%} of the {self.peak_flops / 1e12:,.2f} TFLOP/s of a "
            f"matrix product; peak memory {self.peak_bytes / 2**30:,.2f} GiB",
            highlight=False,
        )


def profile_steps(config: "Config", steps: int, *, interruption: Interruption | None = None) -> StepProfile:
    """Take and measure some steps of a run, and delete its output; all processes of the run call this.

    Args:
        config: the run.
        steps: number of measured steps, after ``WARM_UP`` others.
        interruption: as for ``train``.

    Raises:
        InputError: as for ``train``.
    """
    train = config.train.model_copy(
        update={
            "steps": WARM_UP + steps,
            "epochs": None,
            "log_every": WARM_UP + steps,
            "evaluate_every": None,
            "save_every": 10**9,
            "trace": False,
            "trackers": [],
        }
    )
    evaluation = config.evaluation.model_copy(update={"folders": []})
    trial = config.model_copy(update={"train": train, "evaluation": evaluation})
    with nullcontext(interruption) if interruption else Interruption() as interruption:
        accelerator = start_processes(trial)
        main = accelerator.is_main_process
        output, temporary = _shared_folder(Path(config.output))
        try:
            trial = trial.model_copy(update={"output": str(output)})
            with open_run(trial, accelerator, interruption=interruption) as run:
                return _measure(config, run)
        finally:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)


def _measure(config: "Config", run: Run) -> StepProfile:
    run.parts.distillation.stopwatch = stopwatch = Stopwatch(run.device)
    run.fit()
    memory = peak_bytes(run.device)
    measured = stopwatch.steps[WARM_UP:]
    names = [name for name in SECTIONS if any(name in times for times in measured)]
    batches = run.parts.loader.batches_before(config.train.epochs or 0)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    processes = run.accelerator.num_processes
    return StepProfile(
        seconds=_median([times[""] for times in measured]),
        sections={name: _median([times.get(name, 0.0) for times in measured]) for name in names},
        exchange=_exchange(run),
        samples=config.data.batch_size * config.train.accumulate * processes,
        flops=stopwatch.flops,
        peak_flops=matmul_rate(run.device, dtype),
        peak_bytes=memory,
        checkpoint_bytes=sum(file.stat().st_size for file in run.output.glob("checkpoints/*/*")),
        total_steps=config.train.steps or round(batches / config.train.accumulate),
        processes=processes,
        workers=run.parts.loader.workers,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
    )


def _shared_folder(output: Path) -> tuple[Path, Path]:
    """A new folder shared by all processes of a run, next to its output if they may run on several machines; and the
    folder to delete afterwards."""
    if world_size() == 1:
        temporary = Path(tempfile.mkdtemp(prefix="clipdistill-"))
        return temporary / "run", temporary
    (token, *_) = gather_objects(secrets.token_hex(4))
    folder = output.with_name(f".{output.name}-profile-{token}")
    return folder, folder


def _exchange(run: Run) -> float:
    """Seconds to all-reduce the gradients, without overlap with the backward pass."""
    if run.accelerator.num_processes == 1:
        return 0.0
    numbers = sum(parameter.numel() for parameter in run.parts.model.parameters() if parameter.requires_grad)
    gradient = torch.zeros(numbers, device=run.device)
    seconds = []
    for _ in range(3):
        started = device_time(run.device)
        torch.distributed.all_reduce(gradient)
        seconds.append(device_time(run.device) - started)
    return _median(seconds)


def _median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())
