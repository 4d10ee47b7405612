"""Image towers of timm: ``timm/NAME`` or ``timm/NAME.TAG``, as the Hub names them.

A tower becomes the image tower of an ordinary open_clip model, whose config names it; its pixels are those of its tag:
size, mean, standard deviation, interpolation.
"""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers import to_2tuple
from torch import nn

from clipdistill.errors import InputError
from clipdistill.io.paths import expand
from clipdistill.models.weights import plain_weights

PREFIX = "timm/"

_HARMLESS = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate")
"""Arguments of a saved architecture that the image tower replaces."""
_CROPS = {"squash": "squash", "border": "longest"}
"""open_clip's names of timm's crop modes; every other one crops."""
_HEADS = (("", "linear"), ("avg", ""))
"""``timm_pool`` and ``timm_proj``. A projection of the pooled features; or timm's own classifier, for towers that widen
the pooled features (MobileNetV4, EfficientViT), where open_clip's projection has the wrong width."""


@dataclass(frozen=True, kw_only=True)
class TimmTower:
    """An architecture of timm.

    Attributes:
        name: ``NAME`` or ``NAME.TAG``.
        vision_config: ``vision_cfg`` of an open_clip model config.
        preprocess: ``preprocess_cfg`` of open_clip.
    """

    name: str
    vision_config: dict[str, Any]
    preprocess: dict[str, Any]

    def register(self) -> str:
        """Register a model config with this image tower with open_clip, and return its registered name; the width and
        the text tower in it are replaced when a model is made."""
        registered = f"timm-{self.name}"
        config = {"embed_dim": 512, "vision_cfg": dict(self.vision_config), "text_cfg": {}}
        open_clip.factory._MODEL_CONFIGS[registered] = config
        return registered


def is_timm(model: str) -> bool:
    """Whether a model name stands for an image tower of timm."""
    return model.startswith(PREFIX)


def find_timm_tower(model: str, pretrained: str = "") -> TimmTower:
    """Look up an image tower; nothing is allocated, nothing loaded.

    Args:
        model: ``timm/NAME`` or ``timm/NAME.TAG``.
        pretrained: a tag; a file of weights; a folder as ``timm.models.save_for_hf`` writes it, whose pixels are used.
            Empty: those of the name's tag, or of timm's default.

    Raises:
        InputError: unknown name or tag; a folder of another architecture; not an image tower with a vector of features.
    """
    name = model.removeprefix(PREFIX)
    architecture, tag = timm.models.split_model_name_tag(name)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.0)
        raise InputError(f"model {model}: no architecture of timm; nearest: {PREFIX}{near[0]}")
    stated = _read_folder(model, architecture, pretrained)
    if pretrained and stated is None and not expand(pretrained).is_file():
        if tag and tag != pretrained:
            raise InputError(
                f"model {model}, pretrained {pretrained}: not its tag; allowed: {tag}, or a file or folder of weights"
            )
        name = f"{architecture}.{pretrained}"
        tag = pretrained
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        allowed = ", ".join(each.partition(".")[2] for each in tags) or "none: it has no tags"
        raise InputError(f"model {model}, tag {tag}: unknown; allowed: {allowed}, or a file or folder as pretrained")
    config = timm.get_pretrained_cfg(name)
    values: dict[str, Any] = {**(config.to_dict() if config is not None else {}), **(stated or {})}
    channels, height, width = values.get("input_size") or (3, 224, 224)
    if channels != 3:
        raise InputError(f"model {model}: takes {channels} channels; allowed: a tower of RGB images")
    size = height if height == width else [height, width]
    preprocess = {
        "size": (height, width),
        "mode": "RGB",
        "mean": tuple(values.get("mean", timm.data.IMAGENET_DEFAULT_MEAN)),
        "std": tuple(values.get("std", timm.data.IMAGENET_DEFAULT_STD)),
        "interpolation": "bilinear" if values.get("interpolation") == "bilinear" else "bicubic",
        "resize_mode": _CROPS.get(values.get("crop_mode", ""), "shortest"),
        "fill_color": 0,
    }
    vision_config = {"timm_model_name": name, "image_size": size, **_find_head(model, name, (height, width))}
    return TimmTower(name=name, vision_config=vision_config, preprocess=preprocess)


def load_timm_weights(visual: TimmModel, tower: TimmTower, pretrained: str) -> None:
    """Load a tower's weights, all but its classifier's, into an open_clip image tower.

    Args:
        visual: built from the tower's ``vision_config``.
        tower: its architecture.
        pretrained: as for ``find_timm_tower``; a tag's weights are those of the Hub.

    Raises:
        InputError: the weights belong to another architecture.
    """
    source = expand(pretrained)
    if source.is_dir():
        source = next(path for path in (source / "model.safetensors", source / "pytorch_model.bin") if path.is_file())
    if source.is_file():
        model: Any = timm.create_model(tower.name, num_classes=0)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        with plain_weights(str(source)) as file:
            found = timm.models.load_checkpoint(model, file, strict=False, filter_fn=convert, weights_only=True)
        classifier = model.pretrained_cfg.get("classifier") or ()
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        strange = [name for name in found.unexpected_keys if not name.startswith(heads)] if heads else []
        unfit = [*found.missing_keys, *strange]
        if unfit:
            raise InputError(
                f"model {PREFIX}{tower.name}, pretrained {pretrained}: {len(unfit)} weights do not fit, such as "
                f"{unfit[0]}; allowed: weights of this architecture"
            )
        loaded = model.state_dict()
    else:
        loaded = timm.create_model(tower.name, pretrained=True, num_classes=0).state_dict()
    _, unexpected = visual.trunk.load_state_dict(loaded, strict=False)
    assert not unexpected, unexpected


def _read_folder(model: str, architecture: str, pretrained: str) -> dict[str, Any] | None:
    """The pixel settings of a folder of timm; None if ``pretrained`` is no folder."""
    folder = Path(expand(pretrained))
    if not pretrained or not folder.is_dir():
        return None
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise InputError(
            f"model {model}, pretrained {pretrained}: no model.safetensors in it; allowed: a folder with one"
        )
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        theirs = config.get("architecture", architecture)
        arguments = {name: value for name, value in (config.get("model_args") or {}).items() if name not in _HARMLESS}
        stated: Mapping[str, Any] = config.get("pretrained_cfg") or {}
        found = {
            name: stated[name] for name in ("input_size", "mean", "std", "interpolation", "crop_mode") if name in stated
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"model {model}, pretrained {pretrained}: config.json cannot be read: {error}") from error
    if theirs != architecture:
        raise InputError(f"model {model}, pretrained {pretrained}: weights of {theirs}; allowed: {architecture}")
    usual = list(config_of.input_size)[1:] if (config_of := timm.get_pretrained_cfg(architecture)) else []
    if "img_size" in arguments and to_2tuple(arguments["img_size"]) == tuple(usual):
        arguments.pop("img_size")
    if arguments:
        raise InputError(
            f"model {model}, pretrained {pretrained}: an architecture with model_args {arguments}; allowed: its usual "
            "ones, as open_clip's config cannot state others"
        )
    return found


def _find_head(model: str, name: str, size: tuple[int, int]) -> dict[str, str]:
    """The first head with which the tower gives embeddings of the wanted width, tried without memory."""
    width = 8
    for pool, projection in _HEADS:
        try:
            with torch.device("meta"), torch.no_grad():
                visual: nn.Module = TimmModel(name, width, image_size=size, pool=pool, proj=projection).eval()
                found = visual(torch.zeros(1, 3, *size))
        except (RuntimeError, AttributeError, AssertionError, TypeError):
            continue
        if isinstance(found, torch.Tensor) and found.shape == (1, width):
            return {"timm_pool": pool, "timm_proj": projection}
    raise InputError(f"model {model}: gives no vector of features for an image; allowed: a tower with a classifier")
