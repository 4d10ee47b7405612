"""Ship a tower: one folder that open_clip loads with ``local-dir:`` or, pushed to the Hub, ``hf-hub:``."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.files import new_folder, write_json
from clipdistill.towers import Tower, load_teacher

PARITY_BOUND = 1e-5
"""Largest difference of unit-norm features, in float32, between a model and its reloaded export."""


def export_open_clip(tower: Tower, folder: Path, *, dtype: torch.dtype = torch.float32) -> float:
    """Write ``open_clip_config.json``, ``open_clip_model.safetensors`` and the tokenizer's files, and check them.

    Args:
        tower: what to ship.
        folder: must not exist yet; written aside and renamed when it is complete and loads to the same features.
        dtype: of the floating-point weights in the file (float16 halves it; parity is then checked to 1e-2).

    Returns:
        The largest difference of features between the tower and its reloaded export.

    Raises:
        InputError: the folder exists.
        RuntimeError: the reloaded export differs; nothing is left behind.
    """
    if folder.exists():
        raise InputError(f"output {folder}: exists; allowed: a new folder")
    with new_folder(folder) as temporary:
        state = {name: _cast(tensor, dtype) for name, tensor in tower.clip.state_dict().items()}
        save_file(state, temporary / "open_clip_model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "open_clip_config.json", _open_clip_config(tower))
        if hasattr(tower.tokenizer, "save_pretrained"):
            tower.tokenizer.save_pretrained(str(temporary))
        difference = _parity(tower, temporary)
        bound = PARITY_BOUND if dtype == torch.float32 else 1e-2
        if difference > bound:
            raise RuntimeError(
                f"export {folder}: features differ by {difference:.2e} when reloaded, more than {bound:.0e}"
            )
    return difference


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _open_clip_config(tower: Tower) -> dict[str, Any]:
    model_config: dict[str, Any] = json.loads(json.dumps(tower.model_config))
    if model_config["text_cfg"].get("hf_tokenizer_name"):
        model_config["text_cfg"]["hf_tokenizer_name"] = "."
    model_config["vision_cfg"].pop("timm_model_pretrained", None)
    return {"model_cfg": model_config, "preprocess_cfg": open_clip.get_model_preprocess_cfg(tower.clip)}


@torch.no_grad()
def _parity(tower: Tower, folder: Path) -> float:
    reloaded = load_teacher(f"local-dir:{folder}", device=tower.device)
    generator = torch.Generator().manual_seed(0)
    size = tower.image_size
    images = torch.randint(0, 256, (4, 3, size, size), generator=generator, dtype=torch.uint8)
    images = images.to(tower.device)
    texts = ["a photo of a cat", "arrow left circle", "two words"]
    was_training = tower.training
    tower.eval()
    pairs = (
        (tower.encode_image(images), reloaded.encode_image(images)),
        (
            tower.encode_tokens(tower.tokenize(texts).to(tower.device)),
            reloaded.encode_tokens(reloaded.tokenize(texts).to(tower.device)),
        ),
    )
    tower.train(was_training)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
