"""Checkpoints: one folder per step, written under a temporary name and renamed, with the sha256 of every file.

RUN/checkpoints/step_00000500/
    student.safetensors    weights and buffers
    ema.safetensors        their moving average, with train.ema
    priors.safetensors     class priors, if a term uses them
    optimizer.pt           loaded with weights_only
    rank_00000.pt          one per rank: random state, position in the stream, sums of the current window and epoch
    identity.json          what the run is made of: see clipdistill.training.identity
    manifest.json          step, number of ranks, evaluation, size and sha256 of every file above, sha256 of itself
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.distributed.collectives import gather_objects, rank, world_size
from clipdistill.errors import InputError, RunError
from clipdistill.io.files import settle, sync, why, write_json, writing
from clipdistill.io.manifest import UnreadableError, find_damage, read_manifest, write_manifest
from clipdistill.io.run_files import ASIDE, IDENTITY_FILE, checkpoint_folder, checkpoint_folders

log = logging.getLogger(__name__)

_NAMED = 3
_UNREADABLE = "allowed: one that can be read, --resume with the folder of another, or --restart, which sets it aside"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a run needs to resume as if it had never stopped.

    Attributes:
        step: optimizer steps taken.
        tensors: name -> state dict of tensors, each saved as ``<name>.safetensors`` (``student``, ``ema``, ...).
        optimizer: state dict of the optimizer.
        rank_states: the separate state (tensors, plain values) of each rank that wrote the checkpoint, in rank order.
        identity: what the run is made of.
        evaluations: results of the step's evaluation; None without one.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]
    rank_states: Sequence[Mapping[str, Any]]
    identity: Mapping[str, Any]
    evaluations: list[dict[str, Any]] | None = None


def save_checkpoint(
    root: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    rank_state: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int = 1,
    keep_best: int = 0,
) -> Path:
    """Write ``root/step_XXXXXXXX``; called by every rank, on a shared file system.

    Args:
        root: folder of the checkpoints.
        step: see `TrainingState`.
        tensors: rank 0's are written.
        optimizer: rank 0's is written.
        rank_state: state of this rank; every rank's is written.
        identity: rank 0's is written.
        keep: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the best metric to keep in addition; others are deleted once the new one
            is in place. Those of the same or later steps, damaged or from an abandoned branch, are renamed to
            ``abandoned_step_XXXXXXXX``, of which the ``keep`` last ones stay.

    Raises:
        RunError: on all ranks, if one of them could not write. Nothing of the new checkpoint remains, and all older
            ones are unchanged.
    """
    path = checkpoint_folder(root, step)
    temporary = root / f".{path.name}.tmp"
    with _together(path, temporary):
        if rank() == 0:
            for stale in root.glob(".step_*.tmp"):
                shutil.rmtree(stale)
            temporary.mkdir(parents=True)
    with _together(path, temporary):
        _save(dict(rank_state), temporary / f"rank_{rank():05d}.pt")
    with _together(path, temporary):
        if rank() == 0:
            for name, state in tensors.items():
                save_file({key: value.contiguous() for key, value in state.items()}, temporary / f"{name}.safetensors")
            _save(dict(optimizer), temporary / "optimizer.pt")
            write_json(temporary / IDENTITY_FILE, identity)
            content = {"step": step, "ranks": world_size(), "metric": None, "evaluations": None}
            write_manifest(temporary, content)
            settle(temporary)
            for later in [other for other in reversed(checkpoint_folders(root)) if other.name >= path.name]:
                shutil.rmtree(root / f"{ASIDE}{later.name}", ignore_errors=True)
                later.touch()
                later.rename(root / f"{ASIDE}{later.name}")
            aside = sorted(root.glob(f"{ASIDE}step_*"), key=lambda each: each.stat().st_mtime_ns)
            for old in aside[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
            temporary.rename(path)
            sync(root)
            _prune(root, keep=keep, keep_best=keep_best)
    return path


def rate_checkpoint(
    root: Path, step: int, *, evaluations: list[dict[str, Any]], metric: float | None, keep: int = 1, keep_best: int = 0
) -> None:
    """Add the results of a step's evaluation to its checkpoint, if that exists; delete those no longer among the best.

    A checkpoint whose ``metric`` is None is never among the best.

    Raises:
        RunError: it cannot be written; the checkpoint is unchanged.
    """
    path = checkpoint_folder(root, step)
    if not path.is_dir():
        return
    manifest = read_manifest(path) | {"metric": metric, "evaluations": evaluations}
    with writing(f"the evaluation in checkpoint {path.name}", path):
        write_manifest(path, manifest)
        sync(path)
        _prune(root, keep=keep, keep_best=keep_best)


def find_checkpoint(root: Path, *, contents: bool = True) -> Path | None:
    """The newest checkpoint whose files are all complete and unchanged; damaged ones are logged and passed over.

    Args:
        root: folder of the checkpoints.
        contents: verify the content of all files, not only their sizes.

    Raises:
        UnreadableError: a newer one cannot be read, and may be complete.
    """
    for path in _list(root):
        damage = _damage(path, contents=contents)
        if damage is None:
            return path
        log.warning("checkpoint %s skipped: %s", path, damage)
    return None


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint that `find_checkpoint` or `resolve_resume` has verified; with any number of ranks.

    Raises:
        RunError: it can no longer be read.
    """
    try:
        manifest = read_manifest(path)
        files = [path / name for name in manifest["files"]]
        return TrainingState(
            step=manifest["step"],
            tensors={file.stem: load_file(file) for file in files if file.suffix == ".safetensors"},
            optimizer=torch.load(path / "optimizer.pt", weights_only=True),
            rank_states=[
                torch.load(path / f"rank_{number:05d}.pt", mmap=True, weights_only=True)  # each rank reads little
                for number in range(manifest["ranks"])
            ],
            identity=json.loads((path / IDENTITY_FILE).read_bytes()),
            evaluations=manifest["evaluations"],
        )
    except (OSError, UnreadableError) as error:
        raise RunError(f"checkpoint {path}: {why(error)}") from error


def resolve_resume(resume: str, root: Path) -> Path | None:
    """The checkpoint that ``--resume`` names: ``auto`` is the newest complete one under ``root``, if there are any.

    Raises:
        InputError: the named checkpoint is not complete; or none is, a newer one cannot be read, or they are gone.
    """
    if resume == "auto":
        found = find_checkpoint(root)
        folders = _list(root)
        if found is None and folders:
            damages = "; ".join(f"{path.name}: {_damage(path)}" for path in folders[:_NAMED])
            more = f"; and {len(folders) - _NAMED} more" if len(folders) > _NAMED else ""
            raise InputError(
                f"--resume auto: no checkpoint in {root} is complete ({damages}{more}); allowed: --restart, which sets "
                "them aside, or another output"
            )
        return found
    path = Path(resume)
    damage = _damage(path)
    if damage is not None:
        raise InputError(f"--resume {resume}: {damage}; allowed: auto, or the folder of a complete checkpoint")
    return path


def _list(root: Path) -> list[Path]:
    """Folders of all checkpoints, newest first."""
    try:
        os.listdir(root)  # noqa: PTH208 (Path.glob ignores errors)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"checkpoints {root}: cannot be read: {why(error)}; {_UNREADABLE}") from error
    return checkpoint_folders(root)


def _damage(path: Path, *, contents: bool = True) -> str | None:
    try:
        return find_damage(path, contents=contents)
    except UnreadableError as error:
        raise UnreadableError(f"checkpoint {path}: {error}; {_UNREADABLE}") from error


@contextmanager
def _together(path: Path, temporary: Path) -> Iterator[None]:
    """A part of the writing: when the block ends, all ranks have completed it, or all raise RunError."""
    fault = ""
    try:
        with writing(f"checkpoint {path.name}", path.parent):
            yield
    except RunError as error:
        fault = str(error)
    for number, other in enumerate(gather_objects(fault)):
        if other:
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(f"rank {number}: {other}" if world_size() > 1 else other)


def _save(state: Mapping[str, Any], file: Path) -> None:
    try:
        with file.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
    except RuntimeError as error:  # raised by torch instead of the disk's OSError
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _prune(root: Path, *, keep: int, keep_best: int) -> None:
    """Delete all but the newest and the best checkpoints; each is renamed first, so that none is left incomplete."""
    paths = checkpoint_folders(root)
    rated = sorted(((metric, path) for path in paths if (metric := _metric(path)) is not None), reverse=True)
    kept = {*paths[:keep], *(path for _, path in rated[:keep_best])}
    for old in (path for path in paths if path not in kept):
        hidden = root / f".{old.name}.tmp"
        shutil.rmtree(hidden, ignore_errors=True)
        old.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _metric(path: Path) -> float | None:
    try:
        metric: float | None = read_manifest(path)["metric"]
    except InputError:
        return None
    return metric
