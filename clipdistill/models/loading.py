"""Load models by name, folder or config, and build the student.

A student's towers may come from two models: the image tower from its own, the text tower from the teacher or from
``student.text_model``.
"""

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import open_clip
import torch
from open_clip.factory import set_model_preprocess_cfg
from pydantic import Field, model_validator

from clipdistill.errors import InputError
from clipdistill.io.images import Size, as_size
from clipdistill.io.paths import expand
from clipdistill.io.resources import resource
from clipdistill.models.adapted import (
    PYTHON,
    AdaptedModel,
    SigLIP,
    load_python_model,
    model_type_of,
    transformers_folder,
)
from clipdistill.models.custom_code import load_tokenizer, refuse_code
from clipdistill.models.embedding_table import EMBEDDINGS, EmbeddingTable
from clipdistill.models.initialisation import TEACHER, AnyInitialisation, OwnWeights
from clipdistill.models.precision import Precision, chosen_precision
from clipdistill.models.timm_towers import find_timm_tower, is_timm, load_timm_weights
from clipdistill.models.towers import MAX_LOGIT_SCALE, FrozenModel, Student, is_text, text_state
from clipdistill.models.transformers_clip import load_transformers_clip
from clipdistill.models.weights import describe_mismatch, plain_weights
from clipdistill.settings import Positive, Settings, check

log = logging.getLogger(__name__)


class TeacherSettings(Settings):
    """One frozen teacher."""

    model: str
    """An open_clip model name, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER`` (of open_clip, or a CLIP or SigLIP folder of
    transformers), a model config (.json), ``python:MODULE:FACTORY`` (``models/adapted.py``), or ``embeddings:FOLDER``:
    features that were computed elsewhere (``models/embedding_table.py``)."""
    pretrained: str = ""
    """Tag or weights file for an open_clip model name; empty for ``hf-hub:`` and ``local-dir:``."""
    weight: Positive = 1.0
    """Share of this teacher in every term; the weights of all teachers are normalised to sum to 1."""
    logit_scale: Positive | None = None
    """Multiplier of the cosine similarities; empty: the teacher's own."""
    precision: Precision = "auto"
    """fp32 (matrix products in TF32 on a GPU), bf16 (autocast; features and logits stay float32), auto (bf16 on a GPU
    that computes in it, else fp32), or bf16-if-native (so also on a CPU)."""
    shard: bool = False
    """Shard the teacher's weights over the ranks (FSDP2), for a teacher too large for one device."""
    compile: bool = False
    """Compile the blocks of the image tower with torch.compile."""

    def load(self) -> FrozenModel:
        """Load the teacher, unsharded and on the CPU."""
        settings: dict[str, Any] = {"logit_scale": self.logit_scale, "precision": chosen_precision(self.precision)}
        folder = transformers_folder(self.model)
        if folder is not None or self.model.startswith((EMBEDDINGS, PYTHON)):
            check(not self.pretrained, "teachers.pretrained", self.pretrained, f"empty for {self.model}")
        if self.model.startswith(EMBEDDINGS):
            return EmbeddingTable(self.model, logit_scale=self.logit_scale)
        if self.model.startswith(PYTHON):
            return AdaptedModel(self.model, load_python_model(self.model), **settings)
        if folder is None:
            return load_frozen_model(self.model, pretrained=self.pretrained, **settings)
        if model_type_of(folder) == "siglip":
            return AdaptedModel(self.model, SigLIP(folder), **settings)
        return load_transformers_clip(folder, **settings)


class StudentSettings(Settings):
    """The model that is trained."""

    model: str
    """An open_clip name, ``hf-hub:``/``local-dir:``, a model config (.json), the stem of one in configs/models, or an
    image tower of timm: ``timm/NAME`` or ``timm/NAME.TAG``, whose pixel settings are kept."""
    pretrained: str = ""
    """Tag or weights file to start from; for timm also a folder of ``timm.models.save_for_hf``. Empty: random weights
    (``hf-hub:``/``local-dir:`` include weights)."""
    text_model: str | None = None
    """Beside an image tower of timm, unless ``text: teacher``: the model whose text tower the student has, as for
    ``model``; with its weights for ``hf-hub:``/``local-dir:``, else with random ones."""
    init: AnyInitialisation = Field(default_factory=OwnWeights)
    """Initialisation of a new student's weights. ``own``: random, or those of ``pretrained``; ``{from: teacher}``, or
    from a run, a folder or a file: a shallower and narrower copy of its transformer towers."""
    text: Literal["train", "freeze", "teacher"] = "train"
    """train: own text tower, trained. freeze: own text tower, frozen. teacher: the teacher's text tower, frozen."""
    logit_scale: Annotated[float, Field(gt=0, le=MAX_LOGIT_SCALE)] | None = None
    """Initial multiplier of the cosine similarities; empty: the model's own (the teacher's, for ``text: teacher``)."""
    train_logit_scale: bool = True
    """Whether the multiplier is trained (it is capped at 100, as in CLIP)."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the image tower, and the blocks of a trained text tower, with torch.compile."""

    @model_validator(mode="after")
    def _has_a_text_tower(self) -> Self:
        borrows = is_timm(self.model) and self.text != "teacher"
        allowed = "a model with a text tower" if borrows else "empty, but beside an image tower of timm"
        allowed += ", or text: teacher" if borrows else ""
        check(borrows == bool(self.text_model), "text_model", self.text_model, allowed)
        check(not is_timm(self.text_model or ""), "text_model", self.text_model, allowed)
        return self

    @property
    def has_weights(self) -> bool:
        """Whether it starts from weights that were loaded."""
        named = self.pretrained or _schema(self.model) or _schema(self.text_model or "")
        return bool(named) or self.init.loads_weights

    def load(self, teachers: Sequence[FrozenModel] = ()) -> Student:
        """Build the student on the CPU; random weights are drawn from torch's global generator."""
        student = self.build(teachers)
        if is_timm(self.model) and not self.pretrained:
            log.info("student.model %s: random weights; student.pretrained names a tag or a file", self.model)
        if self.grad_checkpointing:
            student.clip.set_grad_checkpointing(True)
        name = self.init.source_name
        self.init.apply(student, teachers if name is None else [self._open_source(name)])
        if self.logit_scale is not None:
            student.set_logit_scale(self.logit_scale)
        return student

    def _open_source(self, name: str) -> FrozenModel:
        """The model that the initialisation copies from."""
        path = expand(name)
        if path.is_file():
            return load_frozen_model(self.model, pretrained=str(path))
        for folder in (path, path / "student"):
            if (folder / "open_clip_config.json").is_file():
                return load_frozen_model(f"local-dir:{folder}")
        raise InputError(
            f"student.init.from: {name}: no open_clip_config.json in it or in student/; allowed: {TEACHER}, a finished "
            "run, a folder of open_clip, or a file of weights"
        )

    def build(self, teachers: Sequence[FrozenModel] = ()) -> Student:
        """The student before its initialisation."""
        return load_student(
            self.model,
            pretrained=self.pretrained,
            text_model=self.text_model or "",
            text_mode=self.text,
            teacher=teachers[0] if self.text == "teacher" else None,
            logit_scale=self.logit_scale,
            train_logit_scale=self.train_logit_scale,
        )


def load_frozen_model(
    model: str,
    *,
    pretrained: str = "",
    logit_scale: float | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
) -> FrozenModel:
    """Load a model with its weights, for inference.

    Args:
        model: an open_clip name, ``hf-hub:OWNER/NAME``, ``local-dir:FOLDER``, or a model config (.json).
        pretrained: tag or weights file, for an open_clip name or a config.
        logit_scale: overrides the model's own.
        precision: fp32 or bf16 (autocast).
        device: device of the model.

    Raises:
        InputError: unknown model or tag, no weights, weights that do not match the architecture.
    """
    clip, config, tokenizer = create_clip(model, pretrained, need_weights=True)
    return FrozenModel(model, clip, config, tokenizer, logit_scale=logit_scale, precision=precision).to(device)


def load_student(
    model: str,
    *,
    pretrained: str = "",
    text_model: str = "",
    text_mode: str = "train",
    teacher: FrozenModel | None = None,
    logit_scale: float | None = None,
    train_logit_scale: bool = True,
) -> Student:
    """Build the student, from random weights or pretrained ones.

    With ``text_mode="teacher"`` the student consists of its own image tower, projected into the teacher's space, and a
    copy of the teacher's text tower, as one ordinary open_clip model; with a ``text_model``, of that model's text
    tower. Pretrained image weights are kept, except for the projection if its width differs: it is initialised at
    random.

    Raises:
        InputError: as ``load_frozen_model``; ``text_mode="teacher"`` without a teacher.
    """
    if text_mode == "teacher":
        if teacher is None:
            raise InputError("student.text: 'teacher' without a teacher; allowed: exactly one teacher")
        if not teacher.is_open_clip:
            raise InputError(
                f"student.text: 'teacher' with {teacher.name}, which is no open_clip model; allowed: train"
            )
        owner = (teacher.clip, teacher.model_config, teacher.tokenizer)
        clip, config, tokenizer = _with_text_of(owner, model, pretrained)
        logit_scale = logit_scale if logit_scale is not None else min(teacher.logit_scale, MAX_LOGIT_SCALE)
    elif text_model:
        clip, config, tokenizer = _with_text_of(create_clip(text_model, need_weights=False), model, pretrained)
    else:
        clip, config, tokenizer = create_clip(model, pretrained, need_weights=False)
    return Student(
        model,
        clip,
        config,
        tokenizer,
        text_mode=text_mode,
        logit_scale=logit_scale,
        train_logit_scale=train_logit_scale,
    )


def read_image_size(model: str, pretrained: str = "") -> Size:
    """Height and width of a student's input in pixels, from its config alone: nothing is allocated, nothing loaded.

    Raises:
        InputError: as ``load_frozen_model``.
    """
    if is_timm(model):
        return as_size(find_timm_tower(model, pretrained).preprocess["size"])
    with torch.device("meta"):
        clip = create_clip(model, need_weights=False, device="meta")[0]
    return as_size(open_clip.get_model_preprocess_cfg(clip)["size"])


_Clip = tuple[Any, dict[str, Any], Any]
"""An open_clip model, its config and its tokenizer."""


def _with_text_of(owner: _Clip, model: str, pretrained: str) -> _Clip:
    """The image tower of a model, in the space and with the text tower of another one, their owner."""
    owner_clip, owner_config, tokenizer = owner
    text_config = dict(owner_config)
    text_config.pop("vision_cfg")
    custom_text = bool(text_config.pop("custom_text", False)) or "hf_model_name" in text_config["text_cfg"]
    if "hf_model_name" in text_config["text_cfg"]:
        text_config["text_cfg"] = {**text_config["text_cfg"], "hf_model_pretrained": False}  # its weights are copied
    from_timm = is_timm(model)
    clip, config, _ = create_clip(
        model,
        pretrained if from_timm else "",
        need_weights=False,
        overrides=text_config,
        custom_text=custom_text,
    )
    own_quick_gelu = config.get("quick_gelu", False)
    has_activation = "timm_model_name" not in config["vision_cfg"]  # towers of timm have their own
    if has_activation and own_quick_gelu != text_config.get("quick_gelu", False):
        raise InputError(
            f"student.model: {model!r} with quick_gelu={own_quick_gelu} and a teacher with "
            f"quick_gelu={not own_quick_gelu}; allowed: the same activation for student.text: teacher"
        )
    prefix = "text." if isinstance(clip, open_clip.CustomTextCLIP) else ""
    state = {f"{prefix}{name.removeprefix('text.')}": tensor for name, tensor in text_state(owner_clip).items()}
    if not from_timm and (pretrained or _schema(model)):
        own = create_clip(model, pretrained, need_weights=True)[0]
        set_model_preprocess_cfg(clip, open_clip.get_model_preprocess_cfg(own))
        fitting = clip.visual.state_dict()
        own_state = own.visual.state_dict().items()
        state |= {f"visual.{k}": v for k, v in own_state if k in fitting and v.shape == fitting[k].shape}
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if is_text(name)], missing
    for name in ("logit_scale", "logit_bias"):
        if getattr(owner_clip, name, None) is not None:
            getattr(clip, name).data.copy_(getattr(owner_clip, name).detach())
    config = {**config, **text_config}
    if custom_text:
        config["custom_text"] = True
    return clip, config, tokenizer


def create_clip(
    model: str,
    pretrained: str = "",
    *,
    need_weights: bool,
    device: str = "cpu",
    overrides: dict[str, Any] | None = None,
    custom_text: bool = False,
) -> _Clip:
    """An open_clip model, its config and its tokenizer.

    Args:
        model: an open_clip name; ``hf-hub:OWNER/NAME``; ``local-dir:FOLDER``; a model config (.json), or the stem of
            one in configs/models; ``timm/NAME``, with the config of its text tower among the ``overrides``.
        pretrained: tag or weights file (safetensors, or a state dict loaded with ``weights_only``).
        need_weights: refuse random weights.
        device: cpu, or meta: no weights are loaded.
        overrides: parts of the model config to replace; the weights are then random, except for those of a timm tower.
        custom_text: build a separate text module (open_clip's CustomTextCLIP) even if the config does not require it.

    Raises:
        InputError: open_clip cannot build the model or load its weights; the message is one line.
    """
    schema = _schema(model)
    name = model
    with _input_errors(model, pretrained):
        if need_weights and is_timm(model):
            raise InputError(f"model {model}: an image tower alone; allowed: a model with a text tower")
        timm_tower = find_timm_tower(model, pretrained) if is_timm(model) else None
        if schema == "local-dir" and not Path(model.partition(":")[2], "open_clip_config.json").is_file():
            raise InputError(f"model {model}: no open_clip_config.json in it; allowed: a folder that contains one")
        if timm_tower is not None:
            name = timm_tower.register()
        elif not schema:
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
            raise InputError(f"model {model}: a captioning model (CoCa); allowed: a model with two towers")
        refuse_code(model, config)
        load_weights = device != "meta" and overrides is None and not timm_tower and bool(pretrained or schema)
        with plain_weights(pretrained if load_weights else "") as weights:
            clip = open_clip.create_model(
                name,
                pretrained=None if timm_tower else weights or pretrained or None,
                load_weights=load_weights,
                require_pretrained=load_weights,
                force_custom_text=custom_text,
                device=device,
                output_dict=True,
                **(overrides or {}),
            )
        if timm_tower is not None:
            set_model_preprocess_cfg(clip, timm_tower.preprocess)
            if pretrained and device != "meta":
                load_timm_weights(clip.visual, timm_tower, pretrained)
        tokenizer = load_tokenizer(name, config)
    return clip, config, tokenizer


def _schema(model: str) -> str:
    return model.partition(":")[0] if model.startswith(("hf-hub:", "local-dir:")) else ""


def _register_config(model: str) -> str:
    """Register a model config file with open_clip, and return its registered name."""
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
    """Convert open_clip's and torch's errors about names, files and weights to one line."""
    source = f"model {model}" + (f", pretrained {pretrained}" if pretrained else "")
    logging.disable(logging.ERROR)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        detail = " ".join(str(error).split())
        mismatch = ("size mismatch", "Missing key", "Unexpected key", "width changed")
        if isinstance(error, RuntimeError) and any(symptom in detail for symptom in mismatch):
            raise InputError(f"{source}: weights do not match the architecture: {describe_mismatch(error)}") from error
        raise InputError(f"{source}: cannot be loaded: {type(error).__name__}: {detail[:300]}") from error
    finally:
        logging.disable(logging.NOTSET)
