"""Checkpoints: one folder per step, written under a temporary name and renamed, with the sha256 of every file.

RUN/checkpoints/step_00000500/
    student.safetensors    trained weights, and buffers
    ema.safetensors        their moving average, with train.ema
    frozen.safetensors     frozen weights, if there are any: one file on disk for all checkpoints of a process
    priors.safetensors     class priors, if a term uses them
    optimizer.pt           loaded with weights_only
    rank_00000.pt          one per rank: random state, position in the stream, sums of the current window and epoch
    identity.json          what the run is made of: see clipdistill.training.identity
    manifest.json          step, number of ranks, evaluation, size and sha256 of every file above, sha256 of itself
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.distributed.collectives import AsyncMax, gather_objects, rank, world_size
from clipdistill.errors import InputError, RunError
from clipdistill.io.files import settle, sync, why, write_json, writing
from clipdistill.io.manifest import (
    UnreadableError,
    find_damage,
    fingerprint,
    fingerprints,
    read_manifest,
    write_manifest,
)
from clipdistill.io.run_files import ASIDE, FROZEN_FILE, IDENTITY_FILE, checkpoint_folder, checkpoint_folders

log = logging.getLogger(__name__)

_NAMED = 3
_UNREADABLE = "allowed: one that can be read, --resume with the folder of another, or --restart, which sets it aside"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a run needs to resume as if it had never stopped.

    Attributes:
        step: optimizer steps taken.
        tensors: name -> state dict of tensors, each saved as ``<name>.safetensors``: ``student``, ``ema``, ...
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


class CheckpointWriter:
    """Writes checkpoints in a thread, from copies of the state in the host's memory, while training goes on.

    All ranks call its methods together, on a shared file system. A checkpoint has no name before it is complete. The
    next one begins when it is.

    Args:
        root: folder of the checkpoints.
        keep: number of newest checkpoints to keep.
        keep_best: number of checkpoints with the best metric to keep in addition; others are deleted once a new one is
            in place. Those of the same or later steps, damaged or from an abandoned branch, are renamed to
            ``abandoned_step_XXXXXXXX``, of which the ``keep`` last ones stay.
    """

    def __init__(self, root: Path, *, keep: int = 1, keep_best: int = 0) -> None:
        self._root = root
        self._keep = keep
        self._keep_best = keep_best
        self._part: _Part | None = None
        self._frozen: _Written | None = None
        self._votes = AsyncMax()

    def start(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        frozen: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        identity: Mapping[str, Any],
    ) -> None:
        """Copy the state, and begin to write ``root/step_XXXXXXXX``; the checkpoint before is completed first.

        Args:
            step: see `TrainingState`.
            tensors: rank 0's are written.
            frozen: the same tensors at every step. This writer's first checkpoint writes them; later ones link to its
                file, as long as that is what was written.
            optimizer: rank 0's is written.
            rank_state: state of this rank; every rank's is written.
            identity: rank 0's is written.

        Raises:
            RunError: as ``finish``.
        """
        self.finish()
        path = checkpoint_folder(self._root, step)
        temporary = self._root / f".{path.name}.tmp"
        with _together(path, temporary):
            if rank() == 0:
                for stale in self._root.glob(".step_*.tmp"):
                    shutil.rmtree(stale)
                temporary.mkdir(parents=True)
        part = {rank_file(rank()): _copied(dict(rank_state))}
        if rank() == 0:
            part |= {f"{name}.safetensors": _copied(dict(state)) for name, state in tensors.items()}
            part |= {FROZEN_FILE: dict(frozen)} if frozen else {}
            part |= {"optimizer.pt": _copied(dict(optimizer)), IDENTITY_FILE: dict(identity)}
        self._part = _Part(step, path, temporary, part, frozen=self._frozen)

    def poll(self) -> None:
        """Complete the checkpoint that is being written, if all ranks have written their parts; call it every step.

        Raises:
            RunError: as ``finish``.
        """
        if self._part is not None and self._votes(_WRITING if self._part.is_alive() else _WRITTEN) == _WRITTEN:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it.

        Raises:
            RunError: on all ranks, if one of them could not write. Nothing of the new checkpoint remains, and all older
                ones are unchanged.
        """
        part, self._part = self._part, None
        if part is None:
            return
        self._votes.close()
        part.join()
        with _together(part.path, part.temporary):
            if part.error is not None:
                raise part.error
        files = {name: found for of_rank in gather_objects(part.files) for name, found in of_rank.items()}
        with _together(part.path, part.temporary):
            if rank() == 0:
                self._complete(part, files)

    def salvage(self) -> None:
        """As ``finish``, in a run that ends with an error, where no other rank may answer: rank 0 completes the
        checkpoint if all ranks have written their parts, and else deletes it."""
        part, self._part = self._part, None
        if part is None:
            return
        part.join(_SALVAGE_SECONDS)
        names = [rank_file(number) for number in range(world_size())]
        until = time.monotonic() + _SALVAGE_SECONDS
        while rank() == 0 and part.error is None and not part.is_alive() and time.monotonic() < until:
            if all((part.temporary / name).exists() for name in names):
                with contextlib.suppress(OSError):
                    self._complete(part, fingerprints(part.temporary))
                return
            time.sleep(0.05)
        if rank() == 0:
            shutil.rmtree(part.temporary, ignore_errors=True)

    def _complete(self, part: "_Part", files: Mapping[str, Any]) -> None:
        """Give a checkpoint its manifest and its name."""
        root, path = self._root, part.path
        content = {"step": part.step, "ranks": world_size(), "metric": None, "evaluations": None}
        write_manifest(part.temporary, content | {"files": dict(sorted(files.items()))})
        settle(part.temporary)
        for later in [other for other in reversed(checkpoint_folders(root)) if other.name >= path.name]:
            shutil.rmtree(root / f"{ASIDE}{later.name}", ignore_errors=True)
            later.touch()
            later.rename(root / f"{ASIDE}{later.name}")
        aside = sorted(root.glob(f"{ASIDE}step_*"), key=lambda each: each.stat().st_mtime_ns)
        for old in aside[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        part.temporary.rename(path)
        sync(root)
        if FROZEN_FILE in files:
            self._frozen = _Written(path / FROZEN_FILE, files[FROZEN_FILE])
        _prune(root, keep=self._keep, keep_best=self._keep_best)
        log.info("checkpoint %s", path)


_WRITTEN, _WRITING = 1, 2
"""Votes of the ranks, of which the largest counts; 0: not all have voted yet."""

_SALVAGE_SECONDS = 5.0


class _Written(NamedTuple):
    """A file of an earlier checkpoint."""

    path: Path
    fingerprint: dict[str, Any]


class _Part(threading.Thread):
    """This rank's files of a checkpoint, and the thread that writes them.

    Attributes:
        files: their fingerprints, when they are written.
        error: why they could not be written.
    """

    def __init__(
        self, step: int, path: Path, temporary: Path, contents: Mapping[str, Any], *, frozen: _Written | None
    ) -> None:
        super().__init__(name=f"checkpoint {step}", daemon=True)
        self.step, self.path, self.temporary = step, path, temporary
        self.files: dict[str, Any] = {}
        self.error: Exception | None = None
        self._contents = contents
        self._frozen = frozen
        self.start()

    def run(self) -> None:
        """Write the files; the last one, by whose name ``salvage`` recognises a part that is whole, is the rank's."""
        try:
            for name, content in reversed(list(self._contents.items())):
                file = self.temporary / name
                if name == FROZEN_FILE:
                    if self._link_frozen(file):
                        continue
                    content = _copied(content)
                self._write(file, content)
                self.files[name] = fingerprint(file)
        except Exception as error:  # raised in the main thread
            self.error = error
        self._contents = {}

    def _link_frozen(self, file: Path) -> bool:
        """Link to the frozen weights of an earlier checkpoint; False if they are gone or damaged, or where the file
        system has no links."""
        if self._frozen is None:
            return False
        try:
            os.link(self._frozen.path, file)
            if fingerprint(file) == self._frozen.fingerprint:
                self.files[file.name] = self._frozen.fingerprint
                return True
            log.warning("%s differs from what was written: it is written again", self._frozen.path)
            file.unlink()
        except OSError as error:
            log.debug("%s is written again: %s", self._frozen.path, why(error))
            file.unlink(missing_ok=True)
        return False

    def _write(self, file: Path, content: Any) -> None:
        unfinished = file.with_name(f".{file.name}")
        match file.suffix:
            case ".safetensors":
                save_file({key: value.contiguous() for key, value in content.items()}, unfinished)
            case ".pt":
                _save(content, unfinished)
            case _:
                write_json(unfinished, content)
        sync(unfinished)
        unfinished.rename(file)


def rank_file(number: int) -> str:
    """Name of the file with a rank's state."""
    return f"rank_{number:05d}.pt"


def _copied(value: Any) -> Any:
    """A state whose tensors are copies in the host's memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


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
                torch.load(path / rank_file(number), mmap=True, weights_only=True)  # each rank reads little
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
