"""transformers' format, for architectures that map exactly to a ``CLIPModel``.

open_clip can build many more kinds of models; ``unmapped`` lists the parts that do not map.

Shapes: B images, N texts, D features, H and W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from clipdistill.export.open_clip_format import save_weights
from clipdistill.export.parity import (
    ParityError,
    Probe,
    Reference,
    Runnable,
    image_features,
    smooth_pictures,
    transform_images,
)
from clipdistill.io.files import write_json
from clipdistill.models.towers import Tower
from clipdistill.models.transformers_clip import BLOCK_MODULES

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"

GREY_LEVELS = 1.0
"""Largest mean difference, of 255, of the processor's pixels from open_clip's, as libraries round differently."""


def unmapped(tower: Tower) -> list[str]:
    """The parts of a model that do not map to a ``CLIPModel``, each with its difference; empty if all map."""
    clip = tower.clip
    visual, text = clip.visual, tower.text
    reasons = [
        *_unmapped_image_tower(visual),
        *_unmapped_text_tower(text, getattr(text, "attn_mask", None) is not None),
    ]
    if clip.logit_bias is not None:
        reasons.append("logits: a bias (sigmoid-trained)")
    if clip.logit_scale.numel() != 1:
        reasons.append("logits: more than one scale")
    if _preprocessing(tower)["resize_mode"] == "longest":
        reasons.append("preprocessing: resize mode 'longest'")
    return reasons


def _unmapped_image_tower(visual: Any) -> Iterator[str]:
    if not isinstance(visual, VisionTransformer):
        trunk = getattr(visual, "trunk", None)
        kind = "a timm model" if trunk is not None else "not a vision transformer"
        yield f"image tower: {type(trunk if trunk is not None else visual).__name__}, {kind}"
        return
    if visual.attn_pool is not None:
        yield "image tower: attention pooling"
    elif visual.pool_type != "tok":
        yield f"image tower: pooling {visual.pool_type!r} in place of the class token"
    if isinstance(visual.ln_pre, nn.Identity):
        yield "image tower: no layer norm before the blocks (no_ln_pre)"
    if visual.proj is None:
        yield "image tower: no projection"
    if len(set(visual.image_size)) > 1 or len(set(visual.patch_size)) > 1:
        yield "image tower: images or patches that are not square"
    yield from _unmapped_blocks("image tower", visual, [visual.ln_pre, visual.ln_post])


def _unmapped_text_tower(text: Any, causal: bool) -> Iterator[str]:
    if not isinstance(text, TextTransformer | open_clip.CLIP):
        yield f"text tower: {type(text).__name__}"
        return
    if not causal:
        yield "text tower: no causal mask"
    if getattr(text, "cls_emb", None) is not None:
        yield "text tower: a class token (embed_cls)"
    elif _pool_type(text) not in ("argmax", "eos"):
        yield f"text tower: pooling {_pool_type(text)!r} in place of the end of the text"
    elif _eos_id(text) == 2:
        yield "text tower: end of the text has id 2, which transformers reads as the highest id"
    projection = text.text_projection
    if projection is None:
        yield "text tower: no projection"
    elif isinstance(projection, nn.Linear) and projection.bias is not None:
        yield "text tower: a projection with bias"
    yield from _unmapped_blocks("text tower", text, [text.ln_final])


def _unmapped_blocks(where: str, tower: Any, norms: list[Any]) -> Iterator[str]:
    blocks = list(tower.transformer.resblocks)
    other = next((block for block in blocks if not isinstance(block, ResidualAttentionBlock)), None)
    if other is not None:
        yield f"{where}: blocks of another kind ({type(other).__name__})"
        return
    if any(not isinstance(scale, nn.Identity) for block in blocks for scale in (block.ls_1, block.ls_2)):
        yield f"{where}: layer scale"
    activations = {_activation(block.mlp.gelu) for block in blocks}
    if len(activations) > 1 or None in activations:
        yield f"{where}: activation {type(blocks[0].mlp.gelu).__name__}"
    norms = [norm for norm in norms if not isinstance(norm, nn.Identity)]
    norms += [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
    if any(not isinstance(norm, nn.LayerNorm) or norm.weight is None for norm in norms):
        yield f"{where}: norms other than layer norm"
    elif len({norm.eps for norm in norms}) > 1:
        yield f"{where}: layer norms of several epsilons"


def _activation(module: nn.Module) -> str | None:
    """transformers' name of an activation."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return None


def _pool_type(text: Any) -> str:
    return getattr(text, "text_pool_type", None) or text.pool_type


def _eos_id(text: Any) -> int:
    """Id of the token at which texts are pooled; with ``argmax``, the highest id."""
    if _pool_type(text) == "argmax":
        return text.token_embedding.num_embeddings - 1
    return getattr(text, "text_eos_id", None) or text.eos_id


def _preprocessing(tower: Tower) -> dict[str, Any]:
    return open_clip.get_model_preprocess_cfg(tower.clip)


def write_transformers(tower: Tower, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config, weights and processor of a model without `unmapped` parts, beside its tokenizer's files.

    The config's dtype is float32 for any stored ``dtype``, so that the model computes in float32 by default, as in
    open_clip.
    """
    config = _config(tower)
    state = _state(tower)
    with torch.device("meta"):
        CLIPModel(config).load_state_dict(state, strict=True, assign=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    write_json(folder / CONFIG_FILE, config.to_dict())
    save_weights(tensors, folder / WEIGHTS_FILE, beside=folder / CONFIG_FILE)
    _image_processor(tower).save_pretrained(str(folder))


def _config(tower: Tower) -> CLIPConfig:
    visual, text = tower.clip.visual, tower.text
    eos_id = _eos_id(text)
    vision = {
        **_block_config(visual),
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "projection_dim": tower.embed_dim,
    }
    words = {
        **_block_config(text),
        "vocab_size": text.token_embedding.num_embeddings,
        "max_position_embeddings": text.positional_embedding.shape[0],
        "projection_dim": tower.embed_dim,
        "eos_token_id": eos_id,
        **_other_special_ids(tower.tokenizer, eos_id),
    }
    return CLIPConfig(
        vision_config=vision,
        text_config=words,
        projection_dim=tower.embed_dim,
        logit_scale_init_value=tower.clip.logit_scale.item(),
        architectures=["CLIPModel"],
        dtype="float32",
    )


def _other_special_ids(tokenizer: Any, eos_id: int) -> dict[str, int | None]:
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return {"bos_token_id": tokenizer.sot_token_id, "pad_token_id": eos_id}
    return {"bos_token_id": tokenizer.tokenizer.bos_token_id, "pad_token_id": tokenizer.tokenizer.pad_token_id}


def _block_config(tower: Any) -> dict[str, Any]:
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(block.mlp.gelu),
        "layer_norm_eps": block.ln_1.eps,
    }


def _state(tower: Tower) -> dict[str, Tensor]:
    """open_clip's weights under transformers' names."""
    visual, text = tower.clip.visual, tower.text
    projection = text.text_projection
    state = {
        "logit_scale": tower.clip.logit_scale.reshape(()),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": projection.weight if isinstance(projection, nn.Linear) else projection.T,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
        **_weight_and_bias("vision_model.pre_layrnorm", visual.ln_pre),
        **_weight_and_bias("vision_model.post_layernorm", visual.ln_post),
        **_weight_and_bias("text_model.final_layer_norm", text.ln_final),
    }
    for model, blocks in (("vision_model", visual.transformer.resblocks), ("text_model", text.transformer.resblocks)):
        for number, block in enumerate(blocks):
            prefix = f"{model}.encoder.layers.{number}"
            for target, source in BLOCK_MODULES.items():
                state |= _weight_and_bias(f"{prefix}.{target}", block.get_submodule(source))
            parts = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
            for letter, weight, bias in parts:
                state[f"{prefix}.self_attn.{letter}_proj.weight"] = weight
                state[f"{prefix}.self_attn.{letter}_proj.bias"] = bias
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _weight_and_bias(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}  # type: ignore[dict-item]


def _image_processor(tower: Tower) -> CLIPImageProcessor:
    settings = _preprocessing(tower)
    side, _ = tower.image_size
    square = {"height": side, "width": side}
    squash = settings["resize_mode"] == "squash"
    bilinear = settings["interpolation"] == "bilinear"
    return CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not squash,
        resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def load_transformers(folder: Path) -> Runnable:
    """Load the exported model and its tokenizer with transformers."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def image(pixels_BCHW: Tensor) -> Tensor:
        return F.normalize(model.get_image_features(pixel_values=pixels_BCHW).pooler_output, dim=-1)

    @torch.no_grad()
    def text(texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        return F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    return Runnable(name=WEIGHTS_FILE, runtime="transformers", image=image, text=text)


@dataclass(frozen=True, kw_only=True)
class ProcessorParity:
    """Comparison of the exported processor's pixels with those of open_clip's transform.

    Attributes:
        grey_levels: mean absolute difference, of 255, on images that both crop at the same place.
        agreement: share of the probe's images with the same top-1 class from the processor's pixels.
    """

    grey_levels: float
    agreement: float


def compare_processor(folder: Path, tower: Tower, probe: Probe, reference: Reference) -> ProcessorParity:
    """Compare the exported processor with open_clip's transform.

    If the margin of a crop is odd, transformers crops one pixel further to the left or top than torchvision. The grey
    levels are therefore measured on images with a side ratio of 3, which have even margins.

    Raises:
        ParityError: the grey levels differ by more than `GREY_LEVELS`, or the pixels have another shape.
    """
    processor = AutoImageProcessor.from_pretrained(folder)
    side = 2 * tower.image_size[0]
    long = smooth_pictures(2, height=side, width=3 * side) + smooth_pictures(2, height=3 * side, width=side)
    pixels_BCHW = processor(images=long, return_tensors="pt").pixel_values
    expected_BCHW = transform_images(tower, long)
    if pixels_BCHW.shape != expected_BCHW.shape:
        found, expected = tuple(pixels_BCHW.shape[1:]), tuple(expected_BCHW.shape[1:])
        raise ParityError(f"{PREPROCESSOR_FILE}: pixels of shape {found}; allowed: {expected}")
    std_C11 = torch.tensor(processor.image_std).view(3, 1, 1)
    grey_levels = float(((pixels_BCHW - expected_BCHW) * std_C11 * 255).abs().mean())
    if not grey_levels <= GREY_LEVELS:
        raise ParityError(
            f"{PREPROCESSOR_FILE}: pixels differ by {grey_levels:.2f} grey levels on average; allowed: {GREY_LEVELS:g}"
        )
    own_BCHW = processor(images=list(probe.images), return_tensors="pt").pixel_values
    image_BD = image_features(tower, own_BCHW)
    top_B = (image_BD @ reference.bank_CD.T).argmax(dim=1)
    expected_B = (reference.image_BD @ reference.bank_CD.T).argmax(dim=1)
    return ProcessorParity(grey_levels=grey_levels, agreement=float((top_B == expected_B).double().mean()))
