"""Frozen teachers and the trainable student: open_clip models with their tokenizer, pixel transform and logit scale.

Shapes: B images, N texts, C classes, L tokens, D features, H and W pixels.
"""

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import set_model_preprocess_cfg
from torch import Tensor, nn
from torch.func import functional_call

from clipdistill.distributed.collectives import gather_rows, rank, world_size
from clipdistill.errors import InputError
from clipdistill.io.resources import resource

MAX_LOGIT_SCALE = 100.0
"""CLIP's cap on the multiplier of the cosine similarities (Radford et al. 2021, section 2.5)."""


class PixelTransform(nn.Module):
    """Resize and normalise a uint8 batch on its device, the way a tower was trained.

    The source is square (the stream's crop), so open_clip's resize modes agree. Bicubic results are clamped to the
    range of pixels, as Pillow does.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, size: int, mean: Sequence[float], std: Sequence[float], interpolation: str) -> None:
        super().__init__()
        self.size = size
        self.interpolation = interpolation if interpolation in ("bicubic", "bilinear") else "bicubic"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, size, size), normalised."""
        pixels = image_BCHW.float()
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode=self.interpolation, antialias=True)
            pixels = pixels.clamp(0, 255)
        return (pixels / 255 - self.mean) / self.std


class Tower(nn.Module):
    """An open_clip model with its tokenizer and pixel transform; the base of ``Teacher`` and ``Student``.

    Attributes:
        name: what the user called it.
        clip: the open_clip model.
        model_config: its open_clip config (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        tokenizer: texts -> (N, L) token ids.
    """

    clip: Any
    channels_last = False
    precision = "fp32"

    def __init__(self, name: str, clip: Any, model_config: dict[str, Any], tokenizer: Any) -> None:
        super().__init__()
        self.name = name
        self.clip = clip
        self.model_config = model_config
        self.tokenizer = tokenizer
        preprocess = open_clip.get_model_preprocess_cfg(clip)
        size = preprocess["size"]
        self.image_size: int = size if isinstance(size, int) else size[0]
        self.pixels = PixelTransform(
            size=self.image_size,
            mean=preprocess["mean"],
            std=preprocess["std"],
            interpolation=preprocess.get("interpolation", "bicubic"),
        )
        self.embed_dim: int = model_config["embed_dim"]

    @property
    def device(self) -> torch.device:
        """Where the tower is."""
        return self.pixels.mean.device

    @property
    def text(self) -> Any:
        """The module that holds the text tower's parameters."""
        return getattr(self.clip, "text", self.clip)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (N, L), without the columns beyond the longest text where the tower ignores them.

        In a causal tower that pools at the end-of-text token, later columns cannot change the result.
        """
        return self.trim(self.tokenizer(list(texts)))

    def trim(self, tokens: Tensor) -> Tensor:
        """Token ids (..., L), without the columns beyond the longest text where the tower ignores them."""
        end = _pooled_position(self.text, tokens)
        return tokens if end is None else tokens[..., : int(end.max()) + 1].contiguous()

    def encode_tokens(self, tokens_NL: Tensor) -> Tensor:
        """Unit-norm text features (N, D), float32, of full-length or trimmed tokens."""
        text = self.text
        length = tokens_NL.shape[1]
        replaced = {}
        if length < getattr(text, "context_length", length):
            prefix = "text." if text is not self.clip else ""
            replaced = {
                f"{prefix}positional_embedding": text.positional_embedding[:length],
                f"{prefix}attn_mask": text.attn_mask[:length, :length],
            }
        features = functional_call(self.clip, replaced, kwargs={"text": tokens_NL})
        text_ND = features["text_features"] if isinstance(features, dict) else features[1]
        return F.normalize(text_ND.float(), dim=-1)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Unit-norm image features (B, D), float32, of a uint8 batch."""
        pixels = self.pixels(image_BCHW)
        if self.channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return F.normalize(self.clip.encode_image(pixels).float(), dim=-1)

    def use_channels_last(self) -> None:
        """Lay out the image tower's convolutions as NHWC."""
        self.channels_last = True
        self.clip.visual.to(memory_format=torch.channels_last)

    def logit_bias(self) -> Tensor | None:
        """The additive bias of a sigmoid-trained model, or None."""
        return getattr(self.clip, "logit_bias", None)

    def text_fingerprint(self) -> str:
        """sha256 of the text tower's weights, architecture and precision: the identity of what it computes."""
        config = {key: value for key, value in self.model_config.items() if key != "vision_cfg"}
        config["text_cfg"] = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
        return _fingerprint([config, self.precision], text_state(self.clip))

    def image_fingerprint(self) -> str:
        """sha256 of the image tower's weights, architecture, pixel transform and precision."""
        config = {key: value for key, value in self.model_config.items() if key != "text_cfg"}
        preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        return _fingerprint([config, preprocess, self.precision], self.clip.visual.state_dict())


def _fingerprint(settings: Any, state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Teacher(Tower):
    """A frozen tower: no gradients, always in eval mode, never handed to Accelerate, never in a checkpoint."""

    def __init__(
        self,
        name: str,
        clip: Any,
        model_config: dict[str, Any],
        tokenizer: Any,
        *,
        weight: float = 1.0,
        logit_scale: float | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(name, clip, model_config, tokenizer)
        self.weight = weight
        self.requires_grad_(False)
        self.eval()
        self.logit_scale = logit_scale if logit_scale is not None else clip.logit_scale.exp().item()
        bias = self.logit_bias()
        self.bias = None if bias is None else float(bias)
        self.precision = precision

    def train(self, mode: bool = True) -> "Teacher":  # noqa: ARG002
        """Stay in eval mode, whatever the trainer asks of its children."""
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Unit-norm image features (B, D), float32, of a uint8 batch."""
        with self._autocast(image_BCHW.device):
            return super().encode_image(image_BCHW)

    @torch.no_grad()
    def encode_tokens(self, tokens_NL: Tensor) -> Tensor:
        """Unit-norm text features (N, D), float32."""
        with self._autocast(tokens_NL.device):
            return super().encode_tokens(tokens_NL)

    def shard(self, device: torch.device) -> None:
        """Spread the weights of the image tower's blocks over the ranks (FSDP2); each block is gathered when it runs.

        Call it while the teacher is on the CPU: only a rank's share of the blocks ever reaches its ``device``. The rest
        of the image tower and the text tower, which runs once a prompt set, stay whole on every rank.

        Raises:
            InputError: an image tower without a list of transformer blocks.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        visual = self.clip.visual
        holder = getattr(visual, "trunk", None) or getattr(visual, "transformer", None)
        blocks = getattr(holder, "blocks", None) or getattr(holder, "resblocks", None)
        if not blocks:
            raise InputError(f"teachers.shard: True for {self.name}; allowed: an image tower of transformer blocks")
        mesh = init_device_mesh(device.type, (world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


class Student(Tower):
    """The tower that is trained. Call it: its ``forward`` is what DDP synchronises and autocast covers."""

    def __init__(
        self,
        name: str,
        clip: Any,
        model_config: dict[str, Any],
        tokenizer: Any,
        *,
        text_mode: str = "train",
        logit_scale: float | None = None,
        train_logit_scale: bool = True,
    ) -> None:
        super().__init__(name, clip, model_config, tokenizer)
        self.text_mode = text_mode
        if logit_scale is not None:
            with torch.no_grad():
                clip.logit_scale.copy_(torch.tensor(logit_scale).log())
        self.cap_logit_scale()
        clip.logit_scale.requires_grad_(train_logit_scale)
        if text_mode != "train":
            self.freeze_text()

    @torch.no_grad()
    def cap_logit_scale(self) -> None:
        """Put the multiplier back to at most 100 where a step has carried it beyond."""
        self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def freeze_text(self) -> None:
        """Exclude the text tower from training."""
        for name, parameter in self.clip.named_parameters():
            if _is_text(name):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Student":
        """Switch mode; a frozen text tower stays in eval mode."""
        super().train(mode)
        if self.text_mode != "train" and self.text is not self.clip:
            self.text.eval()
        return self

    def forward(
        self,
        image_BCHW: Tensor | None = None,
        *,
        prompt_tokens_NL: Tensor | None = None,
        num_classes: int = 0,
        caption_tokens_BL: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Features of what is given, each unit-norm float32.

        Args:
            image_BCHW: uint8 images.
            prompt_tokens_NL: this rank's share of the class prompts, from ``share_of_classes``, encoded with gradient
                and gathered over ranks.
            num_classes: C, with ``prompt_tokens_NL``: rows beyond it are padding.
            caption_tokens_BL: token ids of the captions.

        Returns:
            ``image`` (B, D), ``prompts`` (C, D), ``captions`` (B, D), as asked, and always ``scale`` (0-d), and
            ``bias`` (0-d) where the model has one.
        """
        out = {"scale": self.clip.logit_scale.exp()}
        bias = self.logit_bias()
        if bias is not None:
            out["bias"] = bias
        if image_BCHW is not None:
            out["image"] = self.encode_image(image_BCHW)
        if prompt_tokens_NL is not None:
            out["prompts"] = gather_rows(self.encode_prompts(prompt_tokens_NL))[:num_classes]
        if caption_tokens_BL is not None:
            out["captions"] = self.encode_tokens(caption_tokens_BL)
        return out

    def encode_prompts(self, tokens_NL: Tensor) -> Tensor:
        """Class features (N, D): one row a class, the unit-norm mean over templates where tokens are (N, T, L)."""
        if tokens_NL.ndim == 2:
            return self.encode_tokens(tokens_NL)
        classes, templates, length = tokens_NL.shape
        text_ND = self.encode_tokens(tokens_NL.reshape(classes * templates, length))
        return F.normalize(text_ND.view(classes, templates, -1).mean(1), dim=-1)


def share_of_classes(tokens: Tensor) -> Tensor:
    """This rank's rows of the class prompts: ceil(C / ranks) of them, the last class repeated as padding."""
    each = -(-len(tokens) // world_size())
    rows = torch.arange(rank() * each, (rank() + 1) * each).clamp(max=len(tokens) - 1)
    return tokens[rows]


def text_state(clip: Any) -> dict[str, Tensor]:
    """The text tower's tensors of an open_clip model, with their names in its state dict."""
    return {name: tensor for name, tensor in clip.state_dict().items() if _is_text(name)}


def _is_text(name: str) -> bool:
    return not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")


def _pooled_position(text: Any, tokens: Tensor) -> Tensor | None:
    """Column at which each text of (..., L) is pooled; None where columns beyond it may matter."""
    causal = getattr(text, "attn_mask", None) is not None
    if not causal or getattr(text, "cls_emb", None) is not None:
        return None
    pool = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    if pool == "argmax":
        return tokens.argmax(dim=-1)
    if pool == "eos":
        eos_id = getattr(text, "eos_id", getattr(text, "text_eos_id", None))
        return torch.eq(tokens, torch.tensor(eos_id)).int().argmax(dim=-1)
    return None


def load_teacher(
    model: str,
    *,
    pretrained: str = "",
    weight: float = 1.0,
    logit_scale: float | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> Teacher:
    """Load a frozen teacher with its weights.

    Args:
        model: an open_clip name, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, or a model config (.json).
        pretrained: tag or weights file, for an open_clip name or a config.
        weight: its share among several teachers.
        logit_scale: overrides the model's own.
        precision: fp32 or bf16 (autocast).
        device: where it runs.

    Raises:
        InputError: unknown model or tag, no weights, weights that do not match the architecture.
    """
    clip, config, tokenizer = create_clip(model, pretrained, need_weights=True)
    return Teacher(model, clip, config, tokenizer, weight=weight, logit_scale=logit_scale, precision=precision).to(
        device
    )


def load_student(
    model: str,
    *,
    pretrained: str = "",
    text_mode: str = "train",
    teacher: Teacher | None = None,
    logit_scale: float | None = None,
    train_logit_scale: bool = True,
) -> Student:
    """Build the student, from random weights or pretrained ones.

    With ``text_mode="teacher"`` the student is its own image tower, projected into the teacher's space, and a copy of
    the teacher's text tower: one open_clip model like any other. Pretrained image weights are kept up to the
    projection, which starts anew where the width differs.

    Raises:
        InputError: as ``load_teacher``; ``text_mode="teacher"`` without a teacher.
    """
    if text_mode != "teacher":
        clip, config, tokenizer = create_clip(model, pretrained, need_weights=False)
    else:
        if teacher is None:
            raise InputError("student.text: 'teacher' without a teacher; allowed: with exactly one teacher")
        clip, config, tokenizer = _with_text_of(teacher, model, pretrained)
        logit_scale = logit_scale if logit_scale is not None else min(teacher.logit_scale, MAX_LOGIT_SCALE)
    return Student(
        model,
        clip,
        config,
        tokenizer,
        text_mode=text_mode,
        logit_scale=logit_scale,
        train_logit_scale=train_logit_scale,
    )


def _with_text_of(teacher: Teacher, model: str, pretrained: str) -> tuple[Any, dict[str, Any], Any]:
    teacher_config = dict(teacher.model_config)
    custom_text = bool(teacher_config.pop("custom_text", False))
    teacher_config.pop("vision_cfg")
    clip, config, _ = create_clip(model, "", need_weights=False, overrides=teacher_config, custom_text=custom_text)
    own_quick_gelu = config.get("quick_gelu", False)
    if own_quick_gelu != teacher_config.get("quick_gelu", False):
        raise InputError(
            f"student.model: {model!r} with quick_gelu={own_quick_gelu} beside a teacher with "
            f"quick_gelu={not own_quick_gelu}; allowed: the same activation for student.text: teacher"
        )
    prefix = "text." if isinstance(clip, open_clip.CustomTextCLIP) else ""
    state = {f"{prefix}{name.removeprefix('text.')}": tensor for name, tensor in text_state(teacher.clip).items()}
    if pretrained or _schema(model):
        own = create_clip(model, pretrained, need_weights=True)[0]
        set_model_preprocess_cfg(clip, open_clip.get_model_preprocess_cfg(own))
        fitting = clip.visual.state_dict()
        own_state = own.visual.state_dict().items()
        state |= {f"visual.{k}": v for k, v in own_state if k in fitting and v.shape == fitting[k].shape}
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if _is_text(name)], missing
    if teacher.bias is not None:
        clip.logit_bias.data.fill_(teacher.bias)
    config = {**config, **teacher_config}
    if custom_text:
        config["custom_text"] = True
    return clip, config, teacher.tokenizer


def create_clip(
    model: str,
    pretrained: str = "",
    *,
    need_weights: bool,
    overrides: dict[str, Any] | None = None,
    custom_text: bool = False,
) -> tuple[Any, dict[str, Any], Any]:
    """An open_clip model, its config and its tokenizer.

    Args:
        model: an open_clip name; ``hf-hub:OWNER/NAME``; ``local-dir:FOLDER``; a model config (.json), or the stem of
            one in configs/models.
        pretrained: tag or weights file (safetensors, or a state dict loaded with ``weights_only``).
        need_weights: refuse random weights.
        overrides: parts of the model config to replace; the weights are then random.
        custom_text: build a separate text module (open_clip's CustomTextCLIP) even where the config does not ask.

    Raises:
        InputError: in one line, whatever open_clip makes of it.
    """
    schema = _schema(model)
    name = model
    with _input_errors(model, pretrained):
        if schema == "local-dir" and not Path(model.partition(":")[2], "open_clip_config.json").is_file():
            raise InputError(f"model {model}: no open_clip_config.json there; allowed: a folder that holds one")
        if not schema:
            name = _register_config(model)
            if name not in open_clip.list_models():
                near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.0)
                raise InputError(
                    f"model {model}: unknown; nearest: {near[0]}; allowed: an open_clip name, hf-hub:OWNER/NAME, "
                    "local-dir:FOLDER, a .json config, or the stem of one in configs/models"
                )
        if need_weights and not schema and not pretrained:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "a weights file"
            raise InputError(f"model {model}: pretrained is empty; allowed: {tags}")
        config = dict(open_clip.get_model_config(name))
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        if tag and tag.get("quick_gelu", False) != config.get("quick_gelu", False):
            other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
            raise InputError(
                f"model {model}, pretrained {pretrained}: the weights were trained with another activation; "
                f"allowed: {other}"
            )
        if "multimodal_cfg" in config:
            raise InputError(f"model {model}: a captioning model (CoCa); allowed: a model of two towers")
        load_weights = overrides is None and bool(pretrained or schema)
        clip = open_clip.create_model(
            name,
            pretrained=pretrained or None,
            load_weights=load_weights,
            require_pretrained=load_weights,
            force_custom_text=custom_text,
            output_dict=True,
            **(overrides or {}),
        )
        tokenizer = open_clip.get_tokenizer(name)
    return clip, config, tokenizer


def _schema(model: str) -> str:
    return model.partition(":")[0] if model.startswith(("hf-hub:", "local-dir:")) else ""


def _register_config(model: str) -> str:
    """Make a model config file known to open_clip; the name under which it is known."""
    path = Path(model)
    if path.suffix != ".json":
        shipped = resource("configs", "models", f"{model}.json")
        if model in open_clip.list_models() or not shipped.is_file():
            return model
        path = shipped
    if not path.is_file():
        raise InputError(f"model {model}: no such file; allowed: an open_clip model config (.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"model {model}: not JSON: {error}") from error
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise InputError(
            f"model {model}: no {missing[0]}; allowed: an open_clip config with embed_dim, vision_cfg, text_cfg"
        )
    open_clip.add_model_config(path)
    registered = open_clip.factory._MODEL_CONFIGS[path.stem]
    tokenizer = config["text_cfg"].get("hf_tokenizer_name", "")
    if tokenizer and (path.parent / tokenizer).is_dir():
        registered["text_cfg"]["hf_tokenizer_name"] = str((path.parent / tokenizer).resolve())
    return path.stem


@contextmanager
def _input_errors(model: str, pretrained: str) -> Iterator[None]:
    """Turn open_clip's and torch's complaints about names, files and weights into one line."""
    source = f"model {model}" + (f", pretrained {pretrained}" if pretrained else "")
    logging.disable(logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())
        mismatch = ("size mismatch", "Missing key", "Unexpected key", "width changed")
        if any(symptom in detail for symptom in mismatch):
            raise InputError(f"{source}: weights do not match the architecture: {detail[:300]}") from error
        raise InputError(f"{source}: cannot be loaded: {type(error).__name__}: {detail[:300]}") from error
    finally:
        logging.disable(logging.NOTSET)
