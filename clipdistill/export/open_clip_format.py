"""open_clip's format: ``open_clip_config.json`` and ``open_clip_model.safetensors``, loaded with ``local-dir:``."""

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.export.parity import (
    HALF_BOUND,
    ParityError,
    Runnable,
    difference,
    image_features,
    reference_of,
    synthetic_probe,
    text_features,
)
from clipdistill.io.files import new_folder, write_json
from clipdistill.models.loading import load_frozen_model
from clipdistill.models.towers import Tower

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

PARITY_BOUND = 1e-5
"""Largest difference of unit-norm features, in float32, between a model and its reloaded export."""


def export_open_clip(tower: Tower, folder: Path, *, dtype: torch.dtype = torch.float32) -> float:
    """Write a folder that open_clip loads, with the tokenizer's files if it has any, and verify it.

    Args:
        tower: the model.
        folder: must not exist; written under a temporary name, and renamed once its reloaded features agree.
        dtype: of the floating-point weights (float16 halves the file; parity is then checked to 1e-2).

    Returns:
        The largest difference in features between the tower and its reloaded export.

    Raises:
        InputError: the folder exists.
        ParityError: the reloaded export differs; nothing is left behind.
    """
    if folder.exists():
        raise InputError(f"output {folder}: exists; allowed: a new folder")
    probe = synthetic_probe(tower, count=4)
    was_training = tower.training
    tower.eval()
    reference = reference_of(tower, probe)
    tower.train(was_training)
    with new_folder(folder) as temporary:
        if hasattr(tower.tokenizer, "save_pretrained"):
            tower.tokenizer.save_pretrained(str(temporary))
        write_open_clip(tower, temporary, dtype=dtype)
        found = difference(load_open_clip(temporary, device=tower.device), probe, reference)
        bound = PARITY_BOUND if dtype == torch.float32 else HALF_BOUND
        if not found <= bound:
            raise ParityError(f"export {folder}: features differ by {found:.2e} when reloaded, more than {bound:.0e}")
    return found


def write_open_clip(tower: Tower, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config and weights into a folder that already holds the tokenizer's files, if any are needed."""
    state = {name: _cast(tensor, dtype) for name, tensor in tower.clip.state_dict().items()}
    write_json(folder / CONFIG_FILE, _config(tower))
    save_weights(state, folder / WEIGHTS_FILE, beside=folder / CONFIG_FILE)


def save_weights(state: dict[str, Tensor], path: Path, *, beside: Path) -> None:
    """Write a safetensors file with the permissions of the file ``beside``: safetensors' own are private."""
    save_file(state, path, metadata={"format": "pt"})
    shutil.copymode(beside, path)


def load_open_clip(folder: Path, *, device: torch.device | str = "cpu") -> Runnable:
    """Load the exported model with open_clip."""
    tower = load_frozen_model(f"local-dir:{folder}", device=device)

    return Runnable(
        name=WEIGHTS_FILE,
        runtime="open_clip",
        image=lambda pixels_BCHW: image_features(tower, pixels_BCHW),
        text=lambda texts: text_features(tower, texts),
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _config(tower: Tower) -> dict[str, Any]:
    model_config: dict[str, Any] = json.loads(json.dumps(tower.model_config))
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        model_config["text_cfg"]["hf_tokenizer_name"] = "."
    model_config["vision_cfg"].pop("timm_model_pretrained", None)
    return {"model_cfg": model_config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(tower.clip)}
