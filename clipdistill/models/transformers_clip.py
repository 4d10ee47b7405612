"""Load a CLIP model of transformers as the equivalent open_clip model."""

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.factory import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipdistill.errors import InputError
from clipdistill.io.urls import one_line
from clipdistill.models.custom_code import load_folder_tokenizer
from clipdistill.models.towers import FrozenModel
from clipdistill.models.weights import describe_mismatch

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights, in the order in which transformers looks for them; or, for each, an index of its parts."""

_ACTIVATIONS: dict[str, dict[str, str]] = {
    "quick_gelu": {},
    "gelu": {},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
BLOCK_MODULES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Modules of a transformer block: transformers' name -> open_clip's."""

_TOWERS = {
    "text_model": {
        "encoder.layers": "transformer.resblocks",
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    },
    "vision_model": {
        "encoder.layers": "visual.transformer.resblocks",
        "embeddings.class_embedding": "visual.class_embedding",
        "embeddings.position_embedding.weight": "visual.positional_embedding",
        "embeddings.patch_embedding": "visual.conv1",
        "pre_layrnorm": "visual.ln_pre",
        "post_layernorm": "visual.ln_post",
    },
}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",))
"""Files that each kind of tokenizer needs at least to be loaded by transformers."""
_PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def load_transformers_clip(
    folder: Path,
    *,
    logit_scale: float | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> FrozenModel:
    """Load a folder that ``CLIPModel.save_pretrained`` and its processor wrote.

    Raises:
        InputError: another kind of model, one that open_clip cannot express, damaged weights, or no tokenizer.
    """
    from transformers import CLIPConfig, CLIPImageProcessor

    try:
        config: Any = CLIPConfig.from_pretrained(folder)
        state = _read_weights(folder)
    except (OSError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"model {folder}: cannot be loaded: {one_line(error)[:300]}") from error
    model_config = _model_config(folder, config)
    clip = open_clip.CLIP(**model_config, output_dict=True)
    mapped = _map_state(state, layers={"text_model": config.text_config, "vision_model": config.vision_config})
    try:
        clip.load_state_dict(mapped)
    except RuntimeError as error:
        raise InputError(
            f"model {folder}: weights do not match the architecture: {describe_mismatch(error)}"
        ) from error
    set_model_preprocess_cfg(clip, preprocess_config(folder, config.vision_config.image_size, CLIPImageProcessor))
    tokenizer = load_checked_tokenizer(folder, config.text_config.max_position_embeddings)
    model_config["text_cfg"]["hf_tokenizer_name"] = str(folder.resolve())
    model = FrozenModel(str(folder), clip, model_config, tokenizer, logit_scale=logit_scale, precision=precision)
    return model.to(device)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder: one file, or the parts that an index lists."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_file(folder / name)
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
            state: dict[str, Tensor] = {}
            for part in sorted(set(parts.values())):
                if Path(part).name != part:
                    raise ValueError(f"{index.name} names {part!r}, which is not a file beside it")
                state |= _read_file(folder / part)
            return {name: state[name] for name in parts}
    raise InputError(
        f"model {folder}: has no weights; allowed: {' or '.join(_WEIGHTS)}, whole or in parts with an index"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_checked_tokenizer(folder: Path, context_length: int) -> Any:
    """Load the tokenizer beside the model; without its files, transformers would build one with an empty vocabulary."""
    allowed = "a folder with tokenizer.json, or vocab.json and merges.txt, as the processor's save_pretrained writes"
    if not any(all(any(folder.glob(name)) for name in names) for names in _TOKENIZER_FILES):
        raise InputError(f"model {folder}: has no tokenizer; allowed: {allowed}")
    try:
        tokenizer = load_folder_tokenizer(folder, context_length=context_length)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"model {folder}: its tokenizer cannot be loaded: {one_line(error)[:300]}") from error
    if set(tokenizer.tokenizer.get_vocab()) <= set(tokenizer.tokenizer.all_special_tokens):
        raise InputError(f"model {folder}: its tokenizer's vocabulary has only special tokens; allowed: {allowed}")
    return tokenizer


def _model_config(folder: Path, config: Any) -> dict[str, Any]:
    """open_clip's config of the same architecture."""
    text, vision = config.text_config, config.vision_config
    allowed = "; allowed: an architecture like OpenAI's CLIP"
    if config.model_type != "clip":
        raise InputError(f"model {folder}: model_type {config.model_type!r}{allowed}")
    activations = {text.hidden_act, vision.hidden_act}
    if not activations <= _ACTIVATIONS.keys() or ("quick_gelu" in activations and len(activations) > 1):
        raise InputError(f"model {folder}: activations {text.hidden_act} and {vision.hidden_act}{allowed}")
    legacy = text.eos_token_id == 2  # transformers then pools at the largest token id
    return {
        "embed_dim": config.projection_dim,
        "quick_gelu": "quick_gelu" in activations,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_shape(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
            **({"pool_type": "argmax"} if legacy else {"pool_type": "eos", "eos_id": text.eos_token_id}),
            **_shape(text),
        },
    }


def _shape(tower: Any) -> dict[str, Any]:
    return {
        "layers": tower.num_hidden_layers,
        "width": tower.hidden_size,
        "mlp_ratio": tower.intermediate_size / tower.hidden_size,
        "norm_kwargs": {"eps": tower.layer_norm_eps},
        "act_kwargs": _ACTIVATIONS[tower.hidden_act] or None,
    }


def _map_state(state: dict[str, Tensor], *, layers: dict[str, Any]) -> dict[str, Tensor]:
    """Rename tensors to open_clip's names; unknown ones keep theirs, so that loading rejects them."""
    mapped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tower, _, rest = name.partition(".")
        if rest == "embeddings.position_ids" or (".self_attn." in name and "out_proj" not in name):
            continue
        if name in _PROJECTIONS:
            mapped[_PROJECTIONS[name]] = tensor.T.contiguous()
            continue
        for source, target in (_TOWERS.get(tower, {}) | (BLOCK_MODULES if ".layers." in name else {})).items():
            rest = rest.replace(source, target)
        mapped[rest if tower in _TOWERS else name] = tensor
    for tower, config in layers.items():
        for number in range(config.num_hidden_layers):
            block = f"{_TOWERS[tower]['encoder.layers']}.{number}.attn.in_proj"
            for part in ("weight", "bias"):
                names = [f"{tower}.encoder.layers.{number}.self_attn.{each}_proj.{part}" for each in "qkv"]
                if all(name in state for name in names):
                    mapped[f"{block}_{part}"] = torch.cat([state[name] for name in names])
    return mapped


def preprocess_config(folder: Path, image_size: int, processor_class: Any) -> dict[str, Any]:
    """open_clip's preprocessing config from the image processor beside the model; OpenAI's where there is none.

    Args:
        folder: of the model.
        image_size: of its image tower.
        processor_class: the image processor of its kind of model.

    Raises:
        InputError: pixels that open_clip's transform cannot make.
    """
    config = PreprocessCfg(size=image_size)
    if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        processor = processor_class.from_pretrained(folder)
        size = dict(processor.size)
        interpolation = _INTERPOLATIONS.get(int(processor.resample))
        crop = dict(processor.crop_size) if processor.do_center_crop else None
        squash = size == {"height": image_size, "width": image_size}
        shortest = size == {"shortest_edge": image_size} and crop is not None
        cropped = crop in (None, {"height": image_size, "width": image_size})
        if not (processor.do_resize and (squash or shortest) and cropped and interpolation):
            resized = f"resized to {size} ({processor.resample})" if processor.do_resize else "not resized"
            raise InputError(
                f"model {folder}: images {resized} and {f'cropped to {crop}' if crop else 'not cropped'}; allowed: the "
                f"model's input size of {image_size}, as the shortest edge with a crop or as height and width, with "
                "bicubic or bilinear resizing"
            )
        factor = processor.rescale_factor if processor.do_rescale else 1
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
        config = PreprocessCfg(
            size=image_size,
            mean=tuple(value / (255 * factor) for value in mean),  # open_clip's pixels are divided by 255
            std=tuple(value / (255 * factor) for value in std),
            interpolation=interpolation,
            resize_mode="squash" if squash else "shortest",
        )
    return vars(config)
