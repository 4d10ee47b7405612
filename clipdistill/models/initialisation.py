"""Initialisation of a new student's weights: its own, or inherited from a larger model.

To add one: a subclass of ``Initialisation`` with a ``name`` of its own in a file of its own, and its entry in
``INITIALISATIONS``.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import open_clip
import torch
from pydantic import BeforeValidator, ConfigDict, Field

from clipdistill.errors import InputError
from clipdistill.models.inheritance import LayerRule, WidthRule, inherit
from clipdistill.models.towers import MAX_LOGIT_SCALE, FrozenModel, Student
from clipdistill.settings import Settings, union_of

TEACHER = "teacher"


class Initialisation(Settings):
    """Changes the student's weights after it was built, before the first step of a new run."""

    loads_weights: ClassVar[bool] = False
    """Whether the weights are no longer those that the student was built with."""

    @property
    def source_name(self) -> str | None:
        """The model that it copies from, in place of the teachers: a folder or a file; None: it needs none."""
        return None

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change the student's weights in place; everything is on the CPU.

        Args:
            student: as it was built.
            teachers: of the run; or the model of ``source_name`` alone.

        Raises:
            InputError: the student is not supported.
        """
        raise NotImplementedError


class OwnWeights(Initialisation):
    """Keep the model's weights: those of ``student.pretrained``, or random ones."""

    name: Literal["own"] = "own"
    """Selects this initialisation."""

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Change nothing."""


class InheritedWeights(Initialisation):
    """Start as a shallower and narrower copy of a larger model, tower by tower; see ``models/inheritance.py``.

    The pixel settings, and the scale and bias of the logits, are inherited, too.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    name: Literal["inherited"] = "inherited"
    """Selects this initialisation; not needed beside ``from``."""
    source: Annotated[str, Field(alias="from", min_length=1)]
    """teacher (the first one), a run or a folder of open_clip, or a file of weights of the student's architecture."""
    layers: LayerRule = "every"
    """Which of the source's L blocks the student's l are: every (L // l)-th, the first or the last ones."""
    width: WidthRule = "leading"
    """Which channels, heads and hidden units a narrower student keeps: the leading ones, or the largest by the squared
    norm of their weights."""
    towers: Literal["both", "image", "text"] = "both"
    """Towers that inherit; with ``text: teacher``, only the image tower does."""

    loads_weights: ClassVar = True

    @property
    def source_name(self) -> str | None:
        """``source``, unless it is the teacher."""
        return None if self.source == TEACHER else self.source

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        """Copy the weights that the student keeps.

        Raises:
            InputError: no teacher; a weight that does not map is named; the texts have other tokens.
        """
        if self.towers == "text" and student.text_mode == "teacher":
            raise InputError(
                "student.init.towers: 'text' with student.text: teacher; allowed: image, or another student.text"
            )
        if not teachers:
            raise InputError(f"student.init.from: {self.source} without a teacher; allowed: a run, a folder or a file")
        source = teachers[0]
        if not source.is_open_clip:
            raise InputError(
                f"student.init.from: {source.name}, which is no open_clip model; allowed: one of open_clip"
            )
        if student.embed_dim > source.embed_dim:
            raise InputError(
                f"student.init.from: embeddings of {source.embed_dim} dimensions, the student's have "
                f"{student.embed_dim}; allowed: at most as many"
            )
        inherit_by = partial(inherit, layers=self.layers, width=self.width)
        if self.towers != "text":
            _check_computation(student, source, "vision_cfg")
            inherit_by(student.clip.visual, source.clip.visual, what="image tower")
            student.set_preprocessing(open_clip.get_model_preprocess_cfg(source.clip))
        if self.towers != "image" and student.text_mode != "teacher":
            _check_tokens(student, source)
            _check_computation(student, source, "text_cfg")
            inherit_by(student.text, source.text, what="text tower")
            student.set_logit_scale(min(source.logit_scale, MAX_LOGIT_SCALE))
            bias = student.logit_bias()
            if bias is not None and source.bias is not None:
                bias.data.fill_(source.bias)


_SIZES = frozenset(
    ("layers", "width", "heads", "head_width", "patch_size", "image_size", "context_length", "vocab_size")
)
_OF_TRAINING = frozenset(("patch_dropout", "ls_init_value", "hf_tokenizer_name", "tokenizer_kwargs", "mlp_ratio"))


def _check_computation(student: Student, source: FrozenModel, part: str) -> None:
    """Refuse towers that compute something else with the same weights, such as another activation or pooling.

    Args:
        student: inherits.
        source: lends its weights.
        part: ``vision_cfg`` or ``text_cfg``.
    """
    make = open_clip.CLIPVisionCfg if part == "vision_cfg" else open_clip.CLIPTextCfg
    found = []
    for tower in (student, source):
        settings = asdict(make(**tower.model_config[part]))
        of_timm = part == "vision_cfg" and settings["timm_model_name"]
        settings["quick_gelu"] = not of_timm and bool(tower.model_config.get("quick_gelu", False))
        left_out = ("timm_", "hf_model_pretrained")
        kept = {key: value for key, value in settings.items() if key not in _SIZES | _OF_TRAINING}
        found.append({key: value for key, value in kept.items() if not key.startswith(left_out)})
    ours, theirs = found
    other = next((key for key in ours if ours[key] != theirs[key]), None)
    if other is not None:
        raise InputError(
            f"student.init.from: {part}.{other} is {theirs[other]!r} in the source and {ours[other]!r} in the student; "
            "allowed: towers that compute the same"
        )


_PROBE = ("a photo of a dog", "naïve café 42")


def _check_tokens(student: Student, source: FrozenModel) -> None:
    ours, theirs = student.tokenizer(list(_PROBE)), source.tokenizer(list(_PROBE))
    shared = min(ours.shape[1], theirs.shape[1])
    if not torch.equal(ours[:, :shared], theirs[:, :shared]):
        raise InputError(
            f"student.init.from: another tokenizer than that of {student.name}; allowed: the same, or towers: image"
        )


def _with_name(value: Any) -> Any:
    """Settings with a source are those of an inheritance."""
    return {"name": "inherited", **value} if isinstance(value, dict) and "from" in value else value


INITIALISATIONS: tuple[type[Initialisation], ...] = (OwnWeights, InheritedWeights)
"""All initialisations that a config may name."""

if TYPE_CHECKING:
    AnyInitialisation = Initialisation
else:
    AnyInitialisation = Annotated[union_of(INITIALISATIONS, "name", default="own"), BeforeValidator(_with_name)]
