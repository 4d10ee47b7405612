"""Class embeddings (zero-shot weights) and similarity logits.

Shapes: B images, C classes, T templates, L tokens, D features.
"""

import hashlib
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipdistill.io.files import new_file
from clipdistill.models.prompts import PromptSet
from clipdistill.models.towers import Tower

log = logging.getLogger(__name__)


def similarity_logits(image_BD: Tensor, text_CD: Tensor, scale: Tensor | float, bias: Tensor | float | None) -> Tensor:
    """Logits (B, C): ``scale * cosine + bias`` of unit-norm features, in float32."""
    with torch.autocast(image_BD.device.type, enabled=False):
        logits_BC = scale * (image_BD.float() @ text_CD.float().T)
        return logits_BC if bias is None else logits_BC + bias


def class_embeddings(
    tower: Tower,
    prompts: PromptSet,
    *,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
) -> Tensor:
    """Class features (C, D) of a tower, unit norm: the mean over templates of unit-norm text features, as in CLIP.

    Args:
        tower: encodes the prompts, without gradient.
        prompts: classes and templates.
        cache: folder for the result, keyed by the text tower's weights and the prompts' tokens; None: not cached.
        device: of the tower and of the result.
        batch_size: texts encoded at once.
    """
    tokens_NL = tower.tokenize(prompts.texts())
    path = None
    if cache is not None:
        digest = hashlib.sha256(tower.text_fingerprint().encode())
        digest.update(f"{prompts.num_templates}:{tuple(tokens_NL.shape)}".encode())
        digest.update(tokens_NL.numpy().tobytes())
        path = cache / "class_embeddings" / f"{digest.hexdigest()}.safetensors"
        try:
            return load_file(path)["embeddings"].to(device)
        except (OSError, SafetensorError, KeyError):
            pass  # missing, or damaged and about to be replaced
    was_training = tower.training
    tower.eval()
    with torch.no_grad():
        text_ND = torch.cat([tower.encode_tokens(chunk.to(device)) for chunk in tokens_NL.split(batch_size)])
    tower.train(was_training)
    text_CTD = text_ND.view(prompts.num_classes, prompts.num_templates, -1)
    class_CD = F.normalize(text_CTD.mean(1), dim=-1)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as temporary:
                save_file({"embeddings": class_CD.contiguous().cpu()}, temporary)
        except (OSError, SafetensorError) as error:  # they are computed again in the next run
            log.warning("class features are not cached in %s: %s", path.parent, error)
    return class_CD


def class_prompt_tokens(tower: Tower, prompts: PromptSet) -> Tensor:
    """Token ids (C, T, L) of every class in every template, trimmed if that does not change the features."""
    tokens_NL = tower.tokenize(prompts.texts())
    return tokens_NL.view(prompts.num_classes, prompts.num_templates, -1)
