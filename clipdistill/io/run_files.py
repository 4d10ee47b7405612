"""Names of the files and folders of a run; `training.run_folder` describes them."""

from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
IDENTITY_FILE = "identity.json"
FROZEN_FILE = "frozen.safetensors"
STUDENT_FOLDER = "student"
CHECKPOINTS_FOLDER = "checkpoints"
SAMPLES_FOLDER = "samples"
ASIDE = "abandoned_"
"""Begins the names of what is set aside: ``abandoned_001`` in a run, ``abandoned_step_00000500`` among checkpoints."""


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Folders of all checkpoints, newest first."""
    return sorted(checkpoints.glob("step_????????"), reverse=True)
