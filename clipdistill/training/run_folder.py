"""The folder of a run: claim it, find its newest checkpoint, and read a finished run's result.

RUN/
    config.yaml       the resolved config
    metrics.jsonl     one record per line
    checkpoints/      see clipdistill.training.checkpoint
    samples/          with train.trace: see clipdistill.training.sample_log
    student/          the exported student of a finished run
    summary.json      steps, skipped samples, evaluations of a finished run
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import Config, check_same_run, load_saved_config
from clipdistill.errors import InputError
from clipdistill.io.files import write_json
from clipdistill.io.run_files import CHECKPOINTS_FOLDER, CONFIG_FILE, STUDENT_FOLDER, SUMMARY_FILE
from clipdistill.training.checkpoint import find_checkpoint, resolve_resume


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a finished run.

    Attributes:
        output: the run's folder.
        student: the exported student's folder.
        steps: total optimizer steps.
        evaluations: one CLIP_benchmark record per set, of the final student.
        skipped: bad samples by reason.
    """

    output: Path
    student: Path
    steps: int
    evaluations: list[dict[str, Any]]
    skipped: Mapping[str, int]

    def save(self) -> None:
        """Write the summary, which marks the run as finished."""
        summary = {"steps": self.steps, "skipped": dict(self.skipped), "evaluations": self.evaluations}
        write_json(self.output / SUMMARY_FILE, summary)


def finished_run(config: Config) -> RunResult | None:
    """Result of the run in the config's output folder; None if it has not finished.

    Raises:
        InputError: it had other settings.
    """
    output = Path(config.output)
    if not (output / SUMMARY_FILE).is_file():
        return None
    check_same_run(load_saved_config(output / CONFIG_FILE), config)
    summary = json.loads((output / SUMMARY_FILE).read_text(encoding="utf-8"))
    return RunResult(
        output=output,
        student=output / STUDENT_FOLDER,
        steps=summary["steps"],
        evaluations=summary["evaluations"],
        skipped=summary["skipped"],
    )


def find_start(config: Config, resume: str | None) -> Path | None:
    """The complete checkpoint to resume from; None: the run starts from the beginning.

    Raises:
        InputError: the folder holds another run or other files, or the named checkpoint is not complete.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; allowed: a folder")
    taken = output.is_dir() and any(not _is_leftover(path) for path in output.iterdir())
    if taken and resume is None:
        raise InputError(f"output: {output} holds another run; allowed: a new folder, or --resume auto")
    if taken and not (output / CONFIG_FILE).is_file():
        raise InputError(f"output: {output} holds other files; allowed: a new folder, or the folder of this run")
    if resume is None:
        return None
    checkpoint = resolve_resume(resume, output / CHECKPOINTS_FOLDER)
    started = output if checkpoint is None else checkpoint.parent.parent
    if (started / CONFIG_FILE).is_file():
        check_same_run(load_saved_config(started / CONFIG_FILE), config)
    return checkpoint


def clear_leftovers(output: Path, *, finished: bool) -> None:
    """Delete a killed run's temporary files; unless ``finished``, also an earlier result of the run."""
    if not finished:
        (output / SUMMARY_FILE).unlink(missing_ok=True)
        shutil.rmtree(output / STUDENT_FOLDER, ignore_errors=True)
    for path in filter(_is_leftover, output.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"


def complete_checkpoint(output: Path) -> str:
    """Description of the newest complete checkpoint, for messages."""
    path = find_checkpoint(output / CHECKPOINTS_FOLDER, contents=False)
    return "no checkpoint yet" if path is None else f"checkpoint {path.name} is complete; --resume auto continues"
