"""The folder of a run: claim it, find its newest checkpoint, and read a finished run's result.

RUN/
    .lock             while a process writes here: which one (clipdistill.io.lock)
    config.yaml       the resolved config
    identity.json     what the run is made of: see clipdistill.training.identity
    metrics.jsonl     one record per line
    checkpoints/      see clipdistill.training.checkpoint
    samples/          with train.trace: see clipdistill.training.sample_log
    student/          the exported student of a finished run
    summary.json      steps, skipped samples, evaluations of a finished run; size and sha256 of its student's files
    abandoned_001/    all of the above, of a run that ``--restart`` has set aside
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipdistill.config import Config, load_saved_config, settings_of_result
from clipdistill.errors import InputError
from clipdistill.io.files import write_json
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.lock import LOCK_FILE
from clipdistill.io.manifest import UnreadableError, find_change, fingerprints
from clipdistill.io.run_files import (
    ASIDE,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    IDENTITY_FILE,
    METRICS_FILE,
    STUDENT_FOLDER,
    SUMMARY_FILE,
)
from clipdistill.training.checkpoint import find_checkpoint, resolve_resume
from clipdistill.training.identity import FORMAT, Identity, check_same_run, read_identity


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
        summary = {
            "steps": self.steps,
            "skipped": dict(self.skipped),
            "evaluations": self.evaluations,
            "student": fingerprints(self.student),
        }
        write_json(self.output / SUMMARY_FILE, summary)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: the complete checkpoint to resume from; None: the run starts from the beginning.
        identity: what the run was made of so far; None: it is new.
        finished: its result, if there is nothing left to do.
        restart: what the folder holds is to be set aside.
        new: there was no folder.
    """

    checkpoint: Path | None = None
    identity: Identity | None = None
    finished: RunResult | None = None
    restart: bool = False
    new: bool = False


def find_start(config: Config, *, resume: str | None, restart: bool) -> Start:
    """Decide where a run starts; changes nothing.

    Raises:
        InputError: the folder holds another run, a run of other settings or other files; the checkpoint to resume from
            is not complete; or all of the run's are damaged, unreadable or gone.
    """
    output = Path(config.output)
    taken = output.is_dir() and any(_is_of_run(path) for path in output.iterdir())
    if taken and resume is None and not restart:
        raise InputError(f"output: {output} holds another run; allowed: a new folder, --resume auto, or --restart")
    if taken and not (output / CONFIG_FILE).is_file():
        raise InputError(f"output: {output} holds other files; allowed: a new folder, or the folder of this run")
    if resume is None:
        return Start(restart=taken)
    checkpoint = resolve_resume(resume, output / CHECKPOINTS_FOLDER)
    identity = read_identity((output if checkpoint is None else checkpoint) / IDENTITY_FILE)
    finished = _read_result(output) if resume == "auto" else None
    if checkpoint is None and finished is None and taken:
        _check_nothing_is_lost(output)
    if identity is not None:
        check_same_run(identity, {"format": FORMAT, "settings": settings_of_result(config)}, run=config.output)
    return Start(checkpoint=checkpoint, identity=identity, finished=finished)


def _read_result(output: Path) -> RunResult | None:
    """Result of a finished run; None if it has not finished, or its student is not as it was exported."""
    try:
        summary = json.loads((output / SUMMARY_FILE).read_bytes())
        result = RunResult(
            output=output,
            student=output / STUDENT_FOLDER,
            steps=summary["steps"],
            evaluations=summary["evaluations"],
            skipped=summary["skipped"],
        )
        return result if find_change(result.student, summary["student"]) is None else None
    except FileNotFoundError:
        return None
    except (UnreadableError, OSError) as error:
        raise InputError(f"{output}: {error}; allowed: a readable folder, or --restart") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_nothing_is_lost(output: Path) -> None:
    """Refuse to start a run from the beginning if its records show that it had a checkpoint.

    Raises:
        InputError: they do.
    """
    last = max((record["step"] for record in read_jsonl(output / METRICS_FILE)), default=0)
    every = load_saved_config(output / CONFIG_FILE).train.save_every
    if last > every or (output / SUMMARY_FILE).exists():
        raise InputError(
            f"--resume auto: {METRICS_FILE} in {output} reaches step {last}, but there is no checkpoint; allowed: to "
            "put the checkpoints back, --restart, which sets the records aside, or another output"
        )


def set_aside(output: Path) -> None:
    """Move all that a run's folder holds into a new folder in it."""
    number = 1
    while (aside := output / f"{ASIDE}{number:03d}").exists():
        number += 1
    aside.mkdir()
    config_last = sorted(filter(_is_of_run, output.iterdir()), key=lambda path: path.name == CONFIG_FILE)
    for path in config_last:
        path.rename(aside / path.name)


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


def _is_of_run(path: Path) -> bool:
    return not (_is_leftover(path) or path.name == LOCK_FILE or path.name.startswith(ASIDE))


def complete_checkpoint(output: Path) -> str:
    """Description of the newest complete checkpoint, for messages."""
    try:
        path = find_checkpoint(output / CHECKPOINTS_FOLDER, contents=False)
    except InputError as error:
        return str(error)
    return "no checkpoint yet" if path is None else f"checkpoint {path.name} is complete; --resume auto continues"
