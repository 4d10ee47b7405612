"""Checkpoints: a folder a step, written aside and renamed, with the sha256 of every file; the newest valid is found.

RUN/checkpoints/step_00000500/
    student.safetensors    weights and buffers
    ema.safetensors        their moving average, where there is one
    optimizer.pt           loaded with weights_only
    rank_00000.pt          one a rank: random state, position in the stream, class priors
    manifest.json          step, number of ranks, size and sha256 of every file above
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.distributed import gather_objects, rank, world_size
from clipdistill.errors import InputError
from clipdistill.files import sync, sync_tree, write_json

log = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a run needs to go on as if it had never stopped.

    Attributes:
        step: optimizer steps taken.
        tensors: name -> state dict of tensors, each saved as ``<name>.safetensors`` (``student``, ``ema``, ...).
        optimizer: state dict of the optimizer.
        rank_state: this rank's own: random state, position in the stream (tensors and plain values).
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    optimizer: Mapping[str, Any]
    rank_state: Mapping[str, Any]


def save_checkpoint(root: Path, state: TrainingState, *, keep: int) -> Path:
    """Write ``root/step_XXXXXXXX``; called by every rank, over a file system they share.

    Args:
        root: folder of the checkpoints.
        state: rank 0's tensors and optimizer are written, and every rank's ``rank_state``.
        keep: older checkpoints beyond this many are deleted, after the new one is in place. Those of later steps,
            damaged or of a branch that was left, are set aside under the name ``abandoned_step_XXXXXXXX``.
    """
    path = root / f"step_{state.step:08d}"
    temporary = root / f".{path.name}.tmp"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier()
    torch.save(dict(state.rank_state), temporary / f"rank_{rank():05d}.pt")
    _barrier()
    if rank() == 0:
        for name, tensors in state.tensors.items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / f"{name}.safetensors")
        torch.save(dict(state.optimizer), temporary / "optimizer.pt")
        files = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": state.step, "ranks": world_size(), "files": files}
        write_json(temporary / _MANIFEST, manifest)
        sync_tree(temporary)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync(root)
        for later in [other for other in _checkpoints(root) if other.name > path.name]:
            shutil.rmtree(root / f"abandoned_{later.name}", ignore_errors=True)
            later.rename(root / f"abandoned_{later.name}")
        for old in _checkpoints(root)[keep:]:
            shutil.rmtree(old)
    _barrier()
    return path


def find_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; damaged ones are named in the log."""
    for path in _checkpoints(root):
        damage = find_damage(path)
        if damage is None:
            return path
        log.warning("checkpoint %s passed over: %s", path, damage)
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} differs from what was written"
    return None


def load_checkpoint(path: Path) -> TrainingState:
    """Read a checkpoint; each rank gets its own ``rank_state``.

    Raises:
        InputError: damaged, or written by another number of ranks.
    """
    damage = find_damage(path)
    if damage is not None:
        raise InputError(f"checkpoint {path}: {damage}; allowed: a complete, unchanged checkpoint")
    manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    if manifest["ranks"] != world_size():
        raise InputError(
            f"checkpoint {path}: written by {manifest['ranks']} processes, resumed by {world_size()}; allowed: as many"
        )
    return TrainingState(
        step=manifest["step"],
        tensors={file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))},
        optimizer=torch.load(path / "optimizer.pt", weights_only=True),
        rank_state=torch.load(path / f"rank_{rank():05d}.pt", weights_only=True),
    )


def resolve_resume(resume: str, root: Path) -> Path | None:
    """The checkpoint that ``--resume`` names: ``auto`` is the newest valid one under ``root``, if any."""
    if resume == "auto":
        return find_checkpoint(root)
    path = Path(resume)
    if not (path / _MANIFEST).is_file():
        raise InputError(f"--resume {resume}: no checkpoint there; allowed: auto, or a folder with {_MANIFEST}")
    return path


def _checkpoints(root: Path) -> list[Path]:
    """Newest first."""
    return sorted(root.glob("step_????????"), reverse=True)


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _barrier() -> None:
    gather_objects(None)
