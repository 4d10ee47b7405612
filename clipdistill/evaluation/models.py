"""Load models for evaluation, by any of their names; choose a run's best checkpoint; fingerprint a model."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipdistill.config import load_saved_config
from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.evaluation.sets.samples import digest
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.manifest import UnreadableError, find_damage
from clipdistill.io.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    FROZEN_FILE,
    IDENTITY_FILE,
    METRICS_FILE,
    STUDENT_FOLDER,
    checkpoint_folder,
    checkpoint_folders,
)
from clipdistill.io.urls import one_line
from clipdistill.models.adapted import transformers_folder
from clipdistill.models.loading import TeacherSettings, load_frozen_model
from clipdistill.models.towers import FrozenModel, Tower
from clipdistill.models.weights import describe_mismatch

ALLOWED = (
    "a run's folder, an export, a transformers CLIP or SigLIP folder, hf-hub:OWNER/NAME, local-dir:FOLDER, an "
    "open_clip name, or python:MODULE:FACTORY"
)


def load_for_evaluation(
    model: str,
    pretrained: str = "",
    *,
    step: int | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Tower:
    """Load a model as a frozen one.

    Args:
        model: a run's folder, an export, a folder of transformers, or as ``teachers.model``.
        pretrained: tag or weights file, for an open_clip name or a config.
        step: load a run's checkpoint of this step instead of its final student.
        precision: fp32 or bf16 (autocast).
        device: where it runs.

    Raises:
        InputError: no such model, damaged weights, or weights that do not match the architecture.
    """
    folder = Path(model)
    if step is not None:
        return _load_checkpoint(folder, step, precision=precision, device=device)
    for candidate in (folder / STUDENT_FOLDER, folder):
        if (candidate / "open_clip_config.json").is_file():
            return load_frozen_model(f"local-dir:{candidate}", precision=precision, device=device)
    if folder.is_dir() and transformers_folder(model) is None:
        raise InputError(
            f"model {model}: no open_clip_config.json in it or in student/, and no config.json; allowed: {ALLOWED} "
            "(for an unfinished run, a checkpoint: --step or --best)"
        )
    settings = TeacherSettings.model_validate({"model": model, "pretrained": pretrained, "precision": precision})
    return settings.load().to(device)


def best_step(run: Path, metric: str = MEAN) -> int:
    """Step of the best checkpoint that a run still has; of equals, the earliest.

    Args:
        run: its folder.
        metric: a name in its metrics.jsonl; higher is better.

    Raises:
        InputError: no checkpoint has a value of this metric.
    """
    scores = {
        record["step"]: record[metric]
        for record in read_jsonl(run / METRICS_FILE)
        if record.get(metric) is not None and checkpoint_folder(run / CHECKPOINTS_FOLDER, record["step"]).is_dir()
    }
    if not scores:
        raise InputError(
            f"--best {metric}: no checkpoint in {run} has a value of it in {METRICS_FILE}; allowed: a metric that "
            "evaluations during training logged"
        )
    return max(scores, key=lambda step: (scores[step], -step))


def fingerprint(tower: Tower) -> str:
    """sha256 of all that determines a model's results: weights, architecture, pixels, tokens and precision."""
    tokens = tower.tokenizer(["a photo of a Cat.", "two\twords, naïve"]).tolist()
    scale, bias = tower.clip.logit_scale.item(), tower.logit_bias()
    logits = [scale, None if bias is None else bias.item()]
    return digest([tower.image_fingerprint(), tower.text_fingerprint(), logits, tokens])


def _pixels_of(checkpoint: Path) -> dict[str, Any] | None:
    """The pixel settings of the student of a checkpoint, as its record states them; None without a record."""
    try:
        pixels: dict[str, Any] | None = json.loads((checkpoint / IDENTITY_FILE).read_bytes())["student"]["pixels"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pixels


def _load_checkpoint(run: Path, step: int, *, precision: str, device: torch.device | str) -> Tower:
    """Load a run's student from a checkpoint: the moving average where there is one."""
    checkpoint = checkpoint_folder(run / CHECKPOINTS_FOLDER, step)
    if not checkpoint.is_dir():
        steps = sorted(int(path.name[5:]) for path in checkpoint_folders(run / CHECKPOINTS_FOLDER))
        raise InputError(f"model {run}: no checkpoint of step {step}; allowed: {', '.join(map(str, steps)) or 'none'}")
    try:
        damage = find_damage(checkpoint)
    except UnreadableError as error:
        damage = str(error)
    if damage is not None:
        raise InputError(f"checkpoint {checkpoint}: {damage}; allowed: a complete, unchanged checkpoint")
    averaged = checkpoint / "ema.safetensors"
    weights = averaged if averaged.is_file() else checkpoint / "student.safetensors"
    config = load_saved_config(run / CONFIG_FILE)
    teachers = [each.load() for each in config.teachers] if config.student.text == "teacher" else []
    student = config.student.build(teachers)
    pixels = _pixels_of(checkpoint)
    if pixels is not None:
        student.set_preprocessing(pixels)
    try:
        frozen = checkpoint / FROZEN_FILE
        state = {**(load_file(frozen) if frozen.is_file() else {}), **load_file(weights)}
        student.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("projections.")})
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {weights}: cannot be loaded: {one_line(error)[:300]}") from error
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {weights}: weights do not match the architecture: {describe_mismatch(error)}"
        ) from error
    name = f"{run}, step {step}"
    return FrozenModel(name, student.clip, student.model_config, student.tokenizer, precision=precision).to(device)
