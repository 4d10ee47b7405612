"""Teachers of any make: models that are not open_clip's, behind the interface of a frozen model.

``python:MODULE:FACTORY`` names a function of a module on ``sys.path`` that returns the model (``ImageTextModel``). Only
a config or a command line names it, never a file of a model: no code of a downloaded folder is run. SigLIP folders of
transformers are loaded with its own classes.

Shapes: B images, N texts, L tokens, D features, H and W pixels.
"""

import importlib
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import set_model_preprocess_cfg
from safetensors import SafetensorError
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.io.images import Size, as_size
from clipdistill.io.urls import one_line
from clipdistill.models.tokens import TextTokenizer
from clipdistill.models.towers import FrozenModel, fingerprint_of
from clipdistill.models.transformers_clip import load_checked_tokenizer, preprocess_config

PYTHON = "python:"

_PROBE = ("a photo of a dog", "two cats")


class ImageTextModel(Protocol):
    """What a factory returns. A ``torch.nn.Module`` is moved to the device, put into evaluation mode and identified by
    its weights; anything else needs a ``fingerprint``.

    Optional attributes, with their defaults: ``mean`` (0, 0, 0) and ``std`` (1, 1, 1) of the pixels; ``interpolation``
    "bicubic"; ``resize_mode`` "shortest"; ``logit_bias`` None; ``fingerprint`` (a text that changes with the weights).
    """

    image_size: int | Size
    """Height and width of the input."""
    logit_scale: float
    """Multiplier of the cosine similarities."""
    tokenizer: Callable[[Sequence[str]], Tensor]
    """Texts -> token ids (N, L), int64; it is pickled for data workers if captions are used."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """float32 (B, 3, H, W), ``(pixels - mean) / std`` with pixels in [0, 1] -> features (B, D)."""

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """Token ids (N, L) -> features (N, D)."""


class AdaptedModel(FrozenModel):
    """An ``ImageTextModel`` as a teacher. It has no open_clip model, so a student cannot take over its towers.

    Args:
        name: as in the config.
        model: the model.
        logit_scale: overrides the model's own.
        precision: fp32, or bf16 (autocast).

    Raises:
        InputError: the model lacks an attribute, or returns something else than features.
    """

    is_open_clip = False

    def __init__(self, name: str, model: Any, *, logit_scale: float | None = None, precision: str = "fp32") -> None:
        for attribute in ("image_size", "logit_scale", "tokenizer", "encode_image", "encode_text"):
            if not hasattr(model, attribute):
                raise InputError(f"model {name}: has no {attribute}; allowed: a model with {attribute}")
        if not isinstance(model, nn.Module) and not isinstance(getattr(model, "fingerprint", None), str):
            raise InputError(
                f"model {name}: has no fingerprint; allowed: a torch module, or a text that names its weights"
            )
        _check_attributes(name, model)
        self.image_size = as_size(model.image_size)
        preprocess = {
            "size": self.image_size,
            "mode": "RGB",
            "mean": tuple(getattr(model, "mean", (0.0, 0.0, 0.0))),
            "std": tuple(getattr(model, "std", (1.0, 1.0, 1.0))),
            "interpolation": getattr(model, "interpolation", "bicubic"),
            "resize_mode": getattr(model, "resize_mode", "shortest"),
            "fill_color": 0,
        }
        clip = _ClipLike(model, preprocess)
        config = {"embed_dim": 0, "vision_cfg": {}, "text_cfg": {}}
        super().__init__(name, clip, config, model.tokenizer, logit_scale=logit_scale, precision=precision)
        self.embed_dim = self._probe()

    def _probe(self) -> int:
        """Width of the features, of an image and two texts."""
        try:
            image_1D = self.encode_image(torch.zeros(1, 3, *self.image_size, dtype=torch.uint8))
            text_ND = self.encode_tokens(self.tokenizer(list(_PROBE)))
        except Exception as error:
            raise InputError(f"model {self.name}: fails for an image or a text: {one_line(error)[:300]}") from error
        shapes = tuple(image_1D.shape), tuple(text_ND.shape)
        if image_1D.ndim != 2 or shapes != ((1, image_1D.shape[1]), (2, image_1D.shape[1])):
            raise InputError(
                f"model {self.name}: features of shape {shapes[0]} of 1 image and {shapes[1]} of 2 texts; allowed: "
                "(images, D) and (texts, D)"
            )
        if not (image_1D.isfinite().all() and text_ND.isfinite().all()):
            raise InputError(f"model {self.name}: features that are not finite; allowed: finite ones")
        return image_1D.shape[1]

    @torch.no_grad()
    def encode_tokens(self, tokens_NL: Tensor) -> Tensor:
        """Unit-norm text features (N, D), float32."""
        with self._autocast(tokens_NL.device):
            return F.normalize(self.clip.visual.model.encode_text(tokens_NL).float(), dim=-1)

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """The model's tokenizer; no columns are cut."""
        return TextTokenizer(self.tokenizer, None)

    def text_fingerprint(self) -> str:
        """sha256 of the model's weights, or of the name that it states for them, and of the precision."""
        return self._fingerprint("text")

    def image_fingerprint(self) -> str:
        """The same, and of the pixel settings."""
        return self._fingerprint(open_clip.get_model_preprocess_cfg(self.clip))

    def _fingerprint(self, settings: Any) -> str:
        model = self.clip.visual.model
        own = getattr(model, "fingerprint", None)
        state = model.state_dict() if isinstance(model, nn.Module) and own is None else {}
        config = getattr(model, "architecture", None)
        return fingerprint_of([settings, own, type(model).__qualname__, config, self.precision], state)

    def store_as_used(self) -> None:
        """Nothing is stored otherwise: the make of its modules is not known."""

    def shard(self, device: torch.device) -> NoReturn:  # noqa: ARG002
        """Refuse: its blocks are not known."""
        raise InputError(f"teachers.shard: True for {self.name}; allowed: a model of open_clip")


def _check_attributes(name: str, model: Any) -> None:
    """Refuse attributes that cannot be used as they are."""
    allowed = {
        "image_size": "a number of pixels, or height and width",
        "logit_scale": "a positive, finite number",
        "mean": "three numbers",
        "std": "three numbers",
        "interpolation": "bicubic or bilinear",
        "resize_mode": "shortest, longest or squash",
    }
    for attribute, what in allowed.items():
        if not hasattr(model, attribute):
            continue
        value = getattr(model, attribute)
        try:
            match attribute:
                case "image_size":
                    fits = min(as_size(value)) >= 1
                case "logit_scale":
                    fits = 0 < float(value) < math.inf
                case "mean" | "std":
                    fits = len(tuple(map(float, value))) == 3
                case _:
                    fits = value in what.replace(" or", ",").split(", ")
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise InputError(f"model {name}: {attribute} is {value!r}; allowed: {what}")


class _ClipLike(nn.Module):
    """The part of open_clip's interface that a frozen model uses."""

    def __init__(self, model: Any, preprocess: Mapping[str, Any]) -> None:
        super().__init__()
        bias = getattr(model, "logit_bias", None)
        self.logit_scale = nn.Parameter(torch.tensor(float(model.logit_scale)).log())
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        self.visual = _Visual(model)
        set_model_preprocess_cfg(self, dict(preprocess))

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Features (B, D)."""
        features_BD: Tensor = self.visual(image_BCHW)
        return features_BD


class _Visual(nn.Module):
    """A model as an image tower."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.model.encode_image(image_BCHW)
        return features_BD


def load_python_model(name: str) -> Any:
    """Call the factory that ``python:MODULE:FACTORY`` names.

    Raises:
        InputError: no such module or function, or it fails.
    """
    module, colon, factory = name.removeprefix(PYTHON).partition(":")
    if not (module and colon and factory):
        raise InputError(
            f"model {name}: incomplete; allowed: python:MODULE:FACTORY, such as python:mypackage.models:teacher"
        )
    try:
        function = getattr(importlib.import_module(module), factory)
    except Exception as error:  # whatever the module does
        raise InputError(
            f"model {name}: {one_line(error)[:300]}; allowed: a function of a module on sys.path"
        ) from error
    try:
        return function()
    except Exception as error:
        raise InputError(f"model {name}: {factory}() failed: {one_line(error)[:300]}") from error


class SigLIP(nn.Module):
    """A SigLIP model of transformers, read from a folder (an ``ImageTextModel``).

    Raises:
        InputError: damaged weights, no tokenizer, or pixels that cannot be resized so.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import SiglipImageProcessor, SiglipModel

        read: Any = SiglipModel.from_pretrained
        try:
            loaded, report = read(folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
        except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise InputError(f"model {folder}: cannot be loaded: {one_line(error)[:300]}") from error
        unfit = sorted([*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])])
        if unfit:  # transformers starts them at random
            raise InputError(
                f"model {folder}: model_type 'siglip'; allowed: an architecture like OpenAI's CLIP, or SigLIP's with "
                f"all of its weights: {len(unfit)} do not fit, such as {unfit[0]}"
            )
        self.siglip = loaded
        places = ("_name_or_path", "transformers_version")
        self.architecture = {key: value for key, value in loaded.config.to_dict().items() if key not in places}
        config = loaded.config
        settings = preprocess_config(folder, config.vision_config.image_size, SiglipImageProcessor)
        self.image_size = settings["size"]
        self.mean, self.std = settings["mean"], settings["std"]
        self.interpolation, self.resize_mode = settings["interpolation"], settings["resize_mode"]
        self.logit_scale = loaded.logit_scale.exp().item()
        self.logit_bias = loaded.logit_bias.item()
        self.tokenizer = _PaddedTokenizer(folder, config.text_config.max_position_embeddings)

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        """Pooled features (B, D)."""
        pooled: Tensor = self.siglip.get_image_features(pixel_values=image_BCHW).pooler_output
        return pooled

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        """Pooled features (N, D)."""
        pooled: Tensor = self.siglip.get_text_features(input_ids=tokens_NL).pooler_output
        return pooled


class _PaddedTokenizer:
    """A tokenizer of transformers, padded to the context length as SigLIP was trained."""

    def __init__(self, folder: Path, length: int) -> None:
        self._tokenizer = load_checked_tokenizer(folder, length).tokenizer
        self.context_length = length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        tokens_NL: Tensor = found["input_ids"]
        return tokens_NL


def transformers_folder(model: str) -> Path | None:
    """The folder of transformers that a model name stands for: a path, or ``local-dir:`` and a path; else None."""
    folder = Path(model.removeprefix("local-dir:"))
    is_one = (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file()
    return folder if is_one else None


def model_type_of(folder: Path) -> str:
    """The ``model_type`` of a folder of transformers; empty if its config states none.

    Raises:
        InputError: its config cannot be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("model_type", ""))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"model {folder}: config.json cannot be read: {one_line(error)[:300]}") from error
