"""A run's metrics: one flat JSON record a line, a progress bar on a terminal, plain lines elsewhere."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

from clipdistill.errors import InputError
from clipdistill.files import write_text

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes ``metrics.jsonl`` and shows progress; on other than the main process it does nothing.

    Args:
        output: the run's folder.
        main: whether this process writes.
        first_step: steps already taken; later records of an interrupted run are dropped.
        total_steps: length of the run.
    """

    def __init__(self, output: Path, *, main: bool, first_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.main = main
        self._progress: Progress | None = None
        if not main:
            return
        path = output / METRICS_FILE
        kept = [record for record in read_metrics(path) if record["step"] <= first_step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)
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
        """Append a record; values that are not finite become null, as JSON has no NaN."""
        if not self.main:
            return
        self._file.write(json.dumps(_finite(record)) + "\n")
        text = _summary(record)
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], state=text)
        else:
            print(f"step {record['step']}/{self.total_steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush and end the progress bar."""
        if self.main:
            self._file.close()
        if self._progress is not None:
            self._progress.stop()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def choose_trackers(trackers: Sequence[str] | None) -> list[str]:
    """The trackers asked for; unless any are, tensorboard where it is installed.

    Raises:
        InputError: one that Accelerate does not know, or that is not installed.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if trackers is None:
        return [tracker for tracker in available if tracker == "tensorboard"]
    for tracker in trackers:
        if tracker not in available:
            allowed = ", ".join(available) or "none is installed"
            raise InputError(f"train.trackers: {tracker!r} is not allowed; allowed: {allowed}")
    return list(trackers)


def flatten(tree: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested dicts and lists as one dict of scalars with dotted keys, as trackers want it."""
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
    if "evaluation/mean_acc1" in record:
        return f"zero-shot top-1 {record['evaluation/mean_acc1']:.1%}"
    parts = [f"loss {record['loss']:.4f}", f"{record['samples_per_second']:.0f} samples/s"]
    skipped = sum(value for key, value in record.items() if key.startswith("skipped/"))
    if record["data_wait_share"] > 0.05:
        parts.append(f"{record['data_wait_share']:.0%} waiting for data")
    if skipped:
        parts.append(f"{skipped} samples skipped")
    return ", ".join(parts)
