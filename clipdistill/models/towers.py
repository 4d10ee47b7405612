"""Towers: open_clip models with their tokenizer, pixel transform and logit scale; frozen models and the student.

Shapes: B images, N texts, C classes, L tokens, D features, H and W pixels.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import set_model_preprocess_cfg
from open_clip.transform import center_crop_or_pad
from torch import Tensor, nn
from torch.func import functional_call

from clipdistill.distributed.collectives import gather_rows, rank, world_size
from clipdistill.errors import InputError
from clipdistill.io.images import Size, as_size
from clipdistill.models.last_block import pooled_at, shorten_image_tower, shorten_text_tower
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.projections import Projections
from clipdistill.models.tokens import TextTokenizer, TokenGroups, find_pooling, pooled_positions

if TYPE_CHECKING:
    from clipdistill.models.prompts import PromptSet

MAX_LOGIT_SCALE = 100.0
"""CLIP's cap on the multiplier of the cosine similarities (Radford et al. 2021, section 2.5)."""


class PixelTransform(nn.Module):
    """Resize and normalise a batch on its device, as open_clip's evaluation transform does.

    Bicubic results are clamped to the range of pixels, as Pillow does. ``resize`` returns pixels in [0, 1] at the
    tower's input size, which can be perturbed; ``forward`` also accepts these.

    Args:
        size: height and width of the tower's input, or its side.
        mean: of the channels.
        std: of the channels.
        interpolation: bicubic or bilinear.
        resize_mode: of a source of another aspect ratio: ``shortest`` is cropped, ``longest`` padded, ``squash``
            distorted.
        fill: padding, from 0 to 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        size: int | Size,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        resize_mode: str = "shortest",
        fill: int = 0,
    ) -> None:
        super().__init__()
        self.size = as_size(size)
        self.resize_mode = resize_mode
        self.fill = fill
        height, width = self.size
        always_bicubic = resize_mode == "shortest" and height != width  # open_clip's transform
        self.interpolation = "bilinear" if interpolation == "bilinear" and not always_bicubic else "bicubic"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def resize(self, image_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, any height, any width) -> float32 (B, 3, H, W) in [0, 1]."""
        pixels = image_BCHW.float()
        if pixels.shape[-2:] != self.size:
            inner = self._size_of_content(*pixels.shape[-2:])
            pixels = F.interpolate(pixels, inner, mode=self.interpolation, antialias=True)
            pixels = center_crop_or_pad(pixels.clamp(0, 255), self.size, fill=self.fill)
        return pixels / 255

    def _size_of_content(self, height: int, width: int) -> Size:
        """Size to which a source is resized, before it is cropped or padded."""
        ratios = height / self.size[0], width / self.size[1]
        if self.resize_mode == "squash" or ratios[0] == ratios[1]:
            return self.size
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """uint8 (B, 3, any height, any width), or the result of ``resize``, -> float32 (B, 3, H, W), normalised."""
        pixels = image_BCHW if image_BCHW.is_floating_point() else self.resize(image_BCHW)
        return (pixels - self.mean) / self.std


class Tower(nn.Module):
    """An open_clip model with its tokenizer and pixel transform; the base of ``FrozenModel`` and ``Student``.

    Attributes:
        name: as in the config.
        clip: the open_clip model.
        model_config: its open_clip config (``embed_dim``, ``vision_cfg``, ``text_cfg``).
        tokenizer: texts -> (N, L) token ids.
        image_size: height and width of its input, in pixels.
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
        self.image_size = as_size(preprocess["size"])
        self.pixels = self._make_pixels(preprocess)
        self.embed_dim: int = model_config["embed_dim"]
        shorten_image_tower(clip.visual)

    @property
    def device(self) -> torch.device:
        """Device of the tower."""
        return self.pixels.mean.device

    @property
    def text(self) -> Any:
        """The module that holds the text tower's parameters."""
        return getattr(self.clip, "text", self.clip)

    def _make_pixels(self, preprocess: Mapping[str, Any]) -> PixelTransform:
        return PixelTransform(
            size=self.image_size,
            mean=preprocess["mean"],
            std=preprocess["std"],
            interpolation=preprocess["interpolation"],
            resize_mode=preprocess["resize_mode"],
            fill=preprocess["fill_color"],
        )

    def set_preprocessing(self, preprocess: Mapping[str, Any]) -> None:
        """Take over the pixel settings of another model, except for its size.

        Args:
            preprocess: open_clip's ``preprocess_cfg``.
        """
        set_model_preprocess_cfg(self.clip, {**preprocess, "size": self.image_size})
        self.pixels = self._make_pixels(preprocess).to(self.device)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (N, L), without the columns beyond the longest text if the tower ignores them.

        In a causal tower that pools at the end-of-text token, later columns cannot change the result.
        """
        return self.text_tokenizer(texts)

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The tower's tokenizer, usable without the tower."""
        return TextTokenizer(self.tokenizer, find_pooling(self.text))

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
        pooling = find_pooling(text)
        pooled_N = None if pooling is None else pooled_positions(tokens_NL, pooling)
        with pooled_at(shorten_text_tower(text), pooled_N):
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
        """Additive bias of a sigmoid-trained model, else None."""
        return getattr(self.clip, "logit_bias", None)

    def text_fingerprint(self) -> str:
        """sha256 of the text tower's weights, architecture and precision: everything that determines its outputs."""
        config = {key: value for key, value in self.model_config.items() if key != "vision_cfg"}
        config["text_cfg"] = {key: value for key, value in config["text_cfg"].items() if key != "hf_tokenizer_name"}
        return fingerprint_of([config, self.precision], text_state(self.clip))

    def image_fingerprint(self) -> str:
        """sha256 of the image tower's weights, architecture, pixel transform and precision."""
        config = {key: value for key, value in self.model_config.items() if key != "text_cfg"}
        preprocess = open_clip.get_model_preprocess_cfg(self.clip)
        return fingerprint_of([config, preprocess, self.precision], self.clip.visual.state_dict())


def fingerprint_of(settings: Any, state: Mapping[str, Tensor]) -> str:
    """sha256 of settings, as JSON, and of tensors by name."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FrozenModel(Tower):
    """A tower for inference only: a teacher, or a model to evaluate. No gradients, always in eval mode."""

    is_open_clip = True
    """Whether it has an open_clip model, from which a student can take over towers."""

    def stored_class_embeddings(self, prompts: "PromptSet") -> Tensor | None:  # noqa: ARG002
        """Class embeddings (C, D) that were computed elsewhere; None: it has none."""
        return None

    def __init__(
        self,
        name: str,
        clip: Any,
        model_config: dict[str, Any],
        tokenizer: Any,
        *,
        logit_scale: float | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__(name, clip, model_config, tokenizer)
        self.requires_grad_(False)
        self.eval()
        self.logit_scale = logit_scale if logit_scale is not None else clip.logit_scale.exp().item()
        bias = self.logit_bias()
        self.bias = None if bias is None else float(bias)
        self.precision = precision

    def train(self, mode: bool = True) -> "FrozenModel":  # noqa: ARG002
        """Stay in eval mode."""
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

    def store_as_used(self) -> None:
        """With bf16, store in bfloat16 the image tower's weights that autocast would convert in every step: half the
        memory, the same outputs. The weights are then no longer those of the file."""
        if self.precision != "bf16":
            return
        for module in self.clip.visual.modules():
            names = {nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias")}.get(type(module), ())
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                names = ("weight", "bias")
            for name in names:
                parameter = getattr(module, name)
                if parameter is not None:
                    parameter.data = parameter.data.to(torch.bfloat16)

    def shard(self, device: torch.device) -> None:
        """Shard the image tower's weights over the ranks (FSDP2): each block is gathered when it runs, the next one
        meanwhile; with bf16 in bfloat16.

        Call it while the teacher is on the CPU. Block by block passes through the ``device`` whole, and a rank's share
        of it stays there. The text tower, which runs once per prompt set, is replicated on every rank.

        Raises:
            InputError: an image tower without a list of transformer blocks.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        visual = self.clip.visual
        blocks = _blocks(visual)
        if not blocks:
            raise InputError(f"teachers.shard: True for {self.name}; allowed: an image tower with transformer blocks")
        mesh = init_device_mesh(device.type, (world_size(),))
        visual.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if self.precision == "bf16" else None)
        for module in (*blocks, visual):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)

    def compile_blocks(self) -> None:
        """Compile the image tower with torch.compile: block by block, all with the same code, or else as a whole."""
        visual = self.clip.visual
        for module in _blocks(visual) or [visual]:
            module.compile()

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")


class Student(Tower):
    """The trained tower. Call it instead of its methods: DDP and autocast wrap ``forward``."""

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
            self.set_logit_scale(logit_scale)
        self.cap_logit_scale()
        clip.logit_scale.requires_grad_(train_logit_scale)
        if text_mode != "train":
            self.freeze_text()
        self.projections: Projections | None = None

    def project_to(self, teacher_widths: Sequence[int], *, captions: bool) -> None:
        """Learn maps of its features into the spaces of teachers of another width; random, from torch's generator.

        Args:
            teacher_widths: of each teacher's features.
            captions: map captions, too.
        """
        self.projections = Projections(self.embed_dim, teacher_widths, captions=captions)

    def compile_towers(self) -> None:
        """Compile the image tower, and the blocks of the text tower if it is trained, with torch.compile."""
        self.clip.visual.compile()
        if self.text_mode == "train":
            for block in _blocks(self.text):
                block.compile()

    @torch.no_grad()
    def set_logit_scale(self, scale: float) -> None:
        """Set the multiplier of the cosine similarities."""
        self.clip.logit_scale.copy_(torch.tensor(scale).log())

    @torch.no_grad()
    def cap_logit_scale(self) -> None:
        """Clamp the multiplier to at most 100 after a step."""
        self.clip.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    @property
    def has_statistics(self) -> bool:
        """Whether a forward pass in training changes buffers, such as those of batch normalisation."""
        return any(isinstance(module, nn.modules.batchnorm._NormBase) for module in self.modules())

    @property
    def text_is_random(self) -> bool:
        """Whether two forward passes of the text tower may differ in training: it has dropout."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.text.modules())

    def frozen_state(self) -> dict[str, Tensor]:
        """The part of the state dict that training does not change: frozen parameters."""
        parameters = self.named_parameters(remove_duplicate=False)
        return {name: parameter.detach() for name, parameter in parameters if not parameter.requires_grad}

    def freeze_text(self) -> None:
        """Exclude the text tower from training."""
        for name, parameter in self.clip.named_parameters():
            if is_text(name):
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
        prompt_tokens: TokenGroups | None = None,
        num_classes: int = 0,
        caption_tokens: TokenGroups | None = None,
    ) -> ModelOutputs:
        """Features of the inputs that are given, each unit-norm float32.

        Args:
            image_BCHW: images, in the input format of ``PixelTransform``.
            prompt_tokens: this rank's share of the class prompts, from ``share_of_classes``, encoded with gradient and
                gathered over ranks.
            num_classes: C, with ``prompt_tokens``; rows beyond it are padding.
            caption_tokens: token ids of the captions.
        """
        scale = self.clip.logit_scale.exp()
        image_BD = prompts_CD = captions_BD = None
        if image_BCHW is not None:
            image_BD = self.encode_image(image_BCHW)
        if prompt_tokens is not None:
            prompts_CD = gather_rows(prompt_tokens.encode(self.encode_prompts))[:num_classes]
        if caption_tokens is not None:
            captions_BD = caption_tokens.encode(self.encode_tokens)
        outputs = ModelOutputs(image_BD, captions_BD, prompts_CD, scale, self.logit_bias())
        return outputs if self.projections is None else self._project(outputs, self.projections)

    def _project(self, outputs: ModelOutputs, projections: Projections) -> ModelOutputs:
        image_BD, captions_BD = outputs.image_BD, outputs.captions_BD
        return outputs._replace(
            image_projected_BE=None if image_BD is None else projections("image", image_BD),
            captions_projected_BE=None if captions_BD is None else projections("captions", captions_BD),
            projected_widths=projections.widths,
        )

    def encode_prompts(self, tokens_NL: Tensor) -> Tensor:
        """Class features (N, D), one row per class: the unit-norm mean over templates if tokens are (N, T, L)."""
        if tokens_NL.ndim == 2:
            return self.encode_tokens(tokens_NL)
        classes, templates, length = tokens_NL.shape
        text_ND = self.encode_tokens(tokens_NL.reshape(classes * templates, length))
        return F.normalize(text_ND.view(classes, templates, -1).mean(1), dim=-1)


def _blocks(tower: Any) -> Sequence[nn.Module]:
    """The transformer blocks of an image or text tower of open_clip; empty for other architectures."""
    holder = getattr(tower, "trunk", None) or getattr(tower, "transformer", None)
    return getattr(holder, "blocks", None) or getattr(holder, "resblocks", None) or ()


def share_of_classes(tokens: Tensor) -> Tensor:
    """This rank's rows of the class prompts: ceil(C / ranks) of them, the last class repeated as padding."""
    each = -(-len(tokens) // world_size())
    rows = torch.arange(rank() * each, (rank() + 1) * each).clamp(max=len(tokens) - 1)
    return tokens[rows]


def text_state(clip: Any) -> dict[str, Tensor]:
    """The text tower's tensors of an open_clip model, by their names in its state dict."""
    return {name: tensor for name, tensor in clip.state_dict().items() if is_text(name)}


def is_text(name: str) -> bool:
    """Whether a name in an open_clip model's state dict belongs to the text tower."""
    return not name.startswith("visual.") and name not in ("logit_scale", "logit_bias")
