"""Nested embeddings: a model whose features are the first dimensions of another's (Matryoshka).

Source: Kusupati et al., Matryoshka Representation Learning (NeurIPS 2022, arXiv 2205.13147).

Shapes: N images or texts, D features, d of them.
"""

import copy
from typing import Any

import torch
from open_clip.model import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models.towers import FrozenModel, Tower


def cut_to(tower: Tower, dimensions: int, *, name: str = "") -> FrozenModel:
    """A copy of a model whose embeddings are the first ``dimensions`` of the model's, as one of open_clip.

    Args:
        tower: the model; it stays as it is.
        dimensions: d.
        name: of the copy; empty: that of the model.

    Raises:
        InputError: d is not below the model's width, or a tower whose last layer is not known.
    """
    if not 1 <= dimensions < tower.embed_dim:
        raise InputError(
            f"dimensions: {dimensions} of {tower.name}; allowed: 1 to {tower.embed_dim - 1}, fewer than it has"
        )
    clip = copy.deepcopy(tower.clip)
    for holder, attribute, axis in (_image_output(clip.visual, tower.name), _text_output(clip, tower.name)):
        _cut(holder, attribute, axis, dimensions)
    config = {**tower.model_config, "embed_dim": dimensions}
    return FrozenModel(name or tower.name, clip, config, tower.tokenizer, precision=tower.precision).to(tower.device)


def _image_output(visual: Any, name: str) -> tuple[Any, str, int]:
    """Where an image tower's embeddings are made: the holder, its attribute, the axis of the embeddings' dimensions."""
    if isinstance(visual, TimmModel):
        last = getattr(visual.head, "proj", None)
        if last is None and hasattr(visual.head, "mlp"):
            last = visual.head.mlp.fc2
        if last is None:
            last = visual.trunk.get_classifier()
        if isinstance(last, nn.Linear):
            return last, "weight", 0
    elif isinstance(visual, VisionTransformer) and isinstance(visual.proj, nn.Parameter):
        return visual, "proj", 1
    elif isinstance(visual, ModifiedResNet):
        return visual.attnpool.c_proj, "weight", 0
    raise _unknown("image", name)


def _text_output(clip: Any, name: str) -> tuple[Any, str, int]:
    holder = getattr(clip, "text", clip)
    last = getattr(holder, "text_projection", None)
    if isinstance(last, nn.Parameter) and (holder is clip or isinstance(holder, TextTransformer)):
        return holder, "text_projection", 1
    if last is None:
        last = getattr(holder, "proj", None)
    if isinstance(last, nn.Linear):
        return last, "weight", 0
    raise _unknown("text", name)


def _cut(holder: Any, attribute: str, axis: int, dimensions: int) -> None:
    for part in (attribute, "bias") if isinstance(holder, nn.Linear) else (attribute,):
        weight = getattr(holder, part)
        if weight is not None:
            kept = weight.detach().narrow(axis if part == attribute else 0, 0, dimensions).clone()
            setattr(holder, part, nn.Parameter(kept, requires_grad=weight.requires_grad))
    if isinstance(holder, nn.Linear):
        holder.out_features = dimensions


def _unknown(tower: str, name: str) -> InputError:
    return InputError(f"dimensions: the last layer of the {tower} tower of {name} is not known; allowed: other models")


def narrowed(features_ND: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Unit-norm features (N, d) of the first dimensions of features (N, D)."""
    return nn.functional.normalize(features_ND[:, :dimensions], dim=-1)
