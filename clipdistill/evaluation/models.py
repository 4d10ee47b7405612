"""Models to evaluate, by any of their names, and what tells one from another."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.evaluation.benchmark_format import MEAN
from clipdistill.evaluation.sets.samples import digest
from clipdistill.evaluation.transformers_clip import load_transformers_clip
from clipdistill.io.jsonl import read_jsonl
from clipdistill.io.manifest import find_damage
from clipdistill.io.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    STUDENT_FOLDER,
    checkpoint_folder,
    checkpoint_folders,
)
from clipdistill.io.urls import one_line
from clipdistill.models.towers import Teacher, Tower, load_student, load_teacher

ALLOWED = (
    "a run's folder, an export, a transformers CLIP folder, hf-hub:OWNER/NAME, local-dir:FOLDER, or an open_clip name"
)


def load_for_evaluation(
    model: str,
    pretrained: str = "",
    *,
    step: int | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Tower:
    """Load a model, frozen.

    Args:
        model: a run's folder, an export, a folder of transformers, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, an
            open_clip name, or a model config (.json).
        pretrained: tag or weights file, for an open_clip name or a config.
        step: of a run, the checkpoint of this step in place of the final student.
        precision: fp32 or bf16 (autocast).
        device: where it runs.

    Raises:
        InputError: no such model, damaged weights, or weights of another architecture.
    """
    folder = Path(model)
    if step is not None:
        return _load_checkpoint(folder, step, precision=precision, device=device)
    for candidate in (folder / STUDENT_FOLDER, folder):
        if (candidate / "open_clip_config.json").is_file():
            return load_teacher(f"local-dir:{candidate}", precision=precision, device=device)
    if (folder / "config.json").is_file():
        return load_transformers_clip(folder, precision=precision, device=device)
    if folder.is_dir():
        raise InputError(
            f"model {model}: no open_clip_config.json in it or in student/, and no config.json; allowed: {ALLOWED} "
            "(of a run that has not ended, a checkpoint: --step or --best)"
        )
    return load_teacher(model, pretrained=pretrained, precision=precision, device=device)


def best_step(run: Path, metric: str = MEAN) -> int:
    """The step of the best of a run's checkpoints that are still there; of equals, the earliest.

    Args:
        run: its folder.
        metric: one that its metrics.jsonl has; more is better.

    Raises:
        InputError: no checkpoint was evaluated by this metric.
    """
    scores = {
        record["step"]: record[metric]
        for record in read_jsonl(run / METRICS_FILE)
        if record.get(metric) is not None and checkpoint_folder(run / CHECKPOINTS_FOLDER, record["step"]).is_dir()
    }
    if not scores:
        raise InputError(
            f"--best {metric}: no checkpoint in {run} has a value of it in {METRICS_FILE}; allowed: one that has"
        )
    return max(scores, key=lambda step: (scores[step], -step))


def fingerprint(tower: Tower) -> str:
    """sha256 of everything that a model's results come from: weights, architectures, pixels, tokens and precision."""
    tokens = tower.tokenizer(["a photo of a Cat.", "two\twords, naïve"]).tolist()
    scale, bias = tower.clip.logit_scale.item(), tower.logit_bias()
    logits = [scale, None if bias is None else bias.item()]
    return digest([tower.image_fingerprint(), tower.text_fingerprint(), logits, tokens])


def _load_checkpoint(run: Path, step: int, *, precision: str, device: torch.device | str) -> Tower:
    """A run's student as a checkpoint has it: the moving average where there is one."""
    checkpoint = checkpoint_folder(run / CHECKPOINTS_FOLDER, step)
    if not checkpoint.is_dir():
        steps = sorted(int(path.name[5:]) for path in checkpoint_folders(run / CHECKPOINTS_FOLDER))
        raise InputError(f"model {run}: no checkpoint of step {step}; allowed: {', '.join(map(str, steps)) or 'none'}")
    damage = find_damage(checkpoint)
    if damage is not None:
        raise InputError(f"checkpoint {checkpoint}: {damage}; allowed: a complete, unchanged checkpoint")
    averaged = checkpoint / "ema.safetensors"
    weights = averaged if averaged.is_file() else checkpoint / "student.safetensors"
    settings: Any = load_config(run / CONFIG_FILE)
    teacher = None
    if settings.student.text == "teacher":
        teacher = load_teacher(settings.teachers[0].model, pretrained=settings.teachers[0].pretrained)
    student = load_student(
        settings.student.model, pretrained=settings.student.pretrained, text_mode=settings.student.text, teacher=teacher
    )
    try:
        student.load_state_dict(load_file(weights))
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {weights}: cannot be loaded: {one_line(error)[:300]}") from error
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"checkpoint {weights}: weights do not match the architecture: {detail}") from error
    name = f"{run}, step {step}"
    return Teacher(name, student.clip, student.model_config, student.tokenizer, precision=precision).to(device)
