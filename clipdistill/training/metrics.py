"""A run's metrics: one flat JSON record per line, a progress bar on a terminal, plain lines otherwise."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from clipdistill.distributed.collectives import gather_objects, own_part, sum_over_ranks, widest_float, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.io.jsonl import JsonlWriter, filter_jsonl
from clipdistill.io.run_files import METRICS_FILE


class MetricsLog:
    """Writes ``metrics.jsonl`` and shows progress; does nothing except on the main process.

    Args:
        output: the run's folder.
        main: whether this process writes.
        first_step: steps already taken; an interrupted run's records of later steps are dropped.
        total_steps: length of the run.
        evaluate_first: whether the run resumes with the evaluation of ``first_step``; an existing record of it is
            dropped.

    Raises:
        RunError: here or in ``write``: the disk is full...
    """

    def __init__(
        self, output: Path, *, main: bool, first_step: int, total_steps: int, evaluate_first: bool = False
    ) -> None:
        self.total_steps = total_steps
        self.main = main
        self._progress: Progress | None = None
        if not main:
            return
        path = output / METRICS_FILE
        if path.exists():
            filter_jsonl(
                path,
                lambda record: (
                    record["step"] < first_step
                    or (record["step"] == first_step and not (evaluate_first and MEAN in record))
                ),
            )
        self._writer = JsonlWriter(path)
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step, state="")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; non-finite values become null, as JSON has no NaN."""
        if not self.main:
            return
        self._writer.write(_finite(record))
        text = _summary(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], state=text)
        else:
            print(f"step {record['step']}/{self.total_steps}  {text}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        if self.main:
            self._writer.sync()

    def close(self) -> None:
        """Close the file and end the progress bar."""
        if self.main:
            self._writer.close()
        if self._progress is not None:
            self._progress.stop()


class Window:
    """Sums over the steps between two metrics records, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad_step = torch.tensor(math.inf, dtype=widest_float(device), device=device)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._samples = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, step: int, losses: Mapping[str, Tensor], grad_norm: Tensor, *, samples: int, waited: float) -> None:
        """Add a step: this rank's share of the losses, gradient norm, samples, and seconds waited for data."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._sums["grad_norm"] = self._sums.get("grad_norm", 0.0) + grad_norm.detach() / world_size()
        finite = torch.isfinite(losses["loss"]) & torch.isfinite(grad_norm)
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step))
        self._steps += 1
        self._samples += samples
        self._waited += waited

    def first_bad_step(self) -> float:
        """The first step of this rank whose loss or gradient was not finite; infinity if there was none."""
        return float(self.bad_step)

    def close(self) -> dict[str, float]:
        """Means over the window and over ranks, throughput of all ranks, share of the time spent waiting for data.

        Times and sample counts cover only this process's lifetime: after a resume, they start at the resume.
        """
        values = torch.stack([value.to(widest_float(self.device)) for value in self._sums.values()])
        seconds = time.perf_counter() - self._started
        record = dict(zip(self._sums, (sum_over_ranks(values) / self._steps).tolist(), strict=True))
        record["samples_per_second"] = self._samples * world_size() / seconds
        record["data_wait_share"] = sum(gather_objects(self._waited)) / world_size() / seconds
        self._sums = {}
        self._steps = 0
        self._restart_clock()
        return record

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums for the next record."""
        return {"steps": self._steps, "sums": {name: value.cpu() for name, value in self._sums.items()}}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue a window from the states of all ranks that saved."""
        self._steps = states[0]["steps"]
        self._sums = {
            name: own_part([state["sums"][name] for state in states]).to(self.device, copy=True)
            for name in states[0]["sums"]
        }


def choose_trackers(trackers: Sequence[str] | None) -> list[str]:
    """The trackers of the config; by default tensorboard, if installed.

    Raises:
        InputError: a tracker that Accelerate does not support, or that is not installed.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if trackers is None:
        return [tracker for tracker in available if tracker == "tensorboard"]
    for tracker in trackers:
        if tracker not in available:
            allowed = ", ".join(available) or "none, as none is installed"
            raise InputError(f"train.trackers: {tracker!r} is not allowed; allowed: {allowed}")
    return list(trackers)


def flatten(tree: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Flatten nested dicts and lists to one dict of scalars with dotted keys, as trackers expect."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {prefix: tree if isinstance(tree, (str, int, float, bool)) else str(tree)}
    flat: dict[str, str | int | float | bool] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
        for key, value in record.items()
    }


def _summary(record: dict[str, Any]) -> str:
    if MEAN in record:
        return f"zero-shot {record[MEAN]:.1%}"
    parts = [f"loss {record['loss']:.4f}", f"{record['samples_per_second']:.0f} samples/s"]
    skipped = sum(value for key, value in record.items() if key.startswith("skipped/"))
    if record["data_wait_share"] > 0.05:
        parts.append(f"{record['data_wait_share']:.0%} waiting for data")
    if skipped:
        parts.append(f"{skipped} samples skipped")
    return ", ".join(parts)
