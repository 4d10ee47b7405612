"""The interface of a loss to the objective: settings, needs, denominators, and the value on one matrix.

To add a loss: a file with a subclass of ``Loss``, and its name in ``LOSSES`` of ``clipdistill.losses``.

Shape suffixes: B rows of this rank, C columns (class prompts, or captions or images of all ranks), D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, field_validator
from torch import Tensor

from clipdistill.losses.fused_common import FusedImplementation, fused_wins
from clipdistill.losses.prior import TopKPrior
from clipdistill.settings import Count, NonNegative, Settings

Implementation = Literal["auto", "plain", "tiled", "triton"]
"""Implementation of gkl and kl. plain: from the logit matrices; tiled, triton: from the features, without these
matrices; auto: plain or tiled, the faster one for the size."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A publication that defines a loss; model cards cite it."""

    key: str
    title: str
    author: str
    year: int
    arxiv: str


class Similarity(Protocol):
    """Similarities of one model: this rank's rows versus all columns."""

    @property
    def rows_BD(self) -> Tensor:
        """Unit-norm features of the rows, float32."""

    @property
    def columns_CD(self) -> Tensor:
        """Unit-norm features of the columns, gathered over ranks if they are distributed."""

    @property
    def scale(self) -> Tensor | float:
        """Multiplier of the cosines."""

    @property
    def bias(self) -> Tensor | float | None:
        """Additive bias of a sigmoid-trained model."""

    @property
    def logits_BC(self) -> Tensor:
        """``scale * rows @ columns.T + bias``, computed once."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One matrix of the student and the same matrix of a teacher.

    Attributes:
        student: None if only denominators are computed.
        teacher: None for a loss without a teacher. Of a two-sided loss the student's clean images, with a gradient;
            None if only denominators are computed.
        target_B: the column of each row's class or matching pair; None over prompts without labels.
        row_ids_B: for a loss that ``needs_caption_ids``, the id of each row's caption, equal for equal captions.
        column_ids_C: the same for the columns.
        class_prior: a teacher's mean prediction for each class, for a loss with a ``prior_temperature``.
        class_counts_C: training samples of each class, for a loss that ``needs_class_counts``.
        implementation: for losses with several implementations.
    """

    student: Similarity | None = None
    teacher: Similarity | None = None
    target_B: Tensor | None = None
    row_ids_B: Tensor | None = None
    column_ids_C: Tensor | None = None
    class_prior: Tensor | TopKPrior | None = None
    class_counts_C: Tensor | None = None
    implementation: Implementation = "auto"

    @property
    def pair(self) -> tuple[Similarity, Similarity]:
        """Student and teacher; neither may be None."""
        assert self.student is not None
        assert self.teacher is not None
        return self.student, self.teacher

    @property
    def features(self) -> dict[str, Any]:
        """Features, scales and biases of both, as keyword arguments of a loss from features."""
        student, teacher = self.pair
        return {
            "student_image": student.rows_BD,
            "student_text": student.columns_CD,
            "teacher_image": teacher.rows_BD,
            "teacher_text": teacher.columns_CD,
            "student_scale": student.scale,
            "teacher_scale": teacher.scale,
            "student_bias": student.bias,
            "teacher_bias": teacher.bias,
        }

    @property
    def fused_implementation(self) -> FusedImplementation | None:
        """Implementation from the features; None: from the logit matrices, which is faster or configured."""
        if self.implementation == "plain":
            return None
        if self.implementation != "auto":
            return self.implementation
        assert self.teacher is not None
        rows_BD, columns_CD = self.teacher.rows_BD, self.teacher.columns_CD
        return "auto" if fused_wins(len(rows_BD), len(columns_CD), rows_BD.device) else None


@dataclass(frozen=True)
class LossParts:
    """This rank's share of a loss.

    Attributes:
        parts: the parts by name, 0-d.
        value: their sum, 0-d; its backward pass is cheaper than those of the parts.
    """

    parts: Mapping[str, Tensor]
    value: Tensor

    @classmethod
    def single(cls, name: str, value: Tensor) -> LossParts:
        """Make the share of a loss with one part."""
        return cls({name: value}, value)


class Loss(Settings):
    """One weighted term of the objective: the settings that every loss has, and its declarations."""

    loss: str
    """Name of the loss."""
    over: str
    """prompts: class prompts; captions: the in-batch image-text matrix, both directions; images: image features."""
    name: str = Field("", pattern=r"^[\w.-]*$")
    """Name of the term in the metrics; empty: ``LOSS_OVER``. Required if two terms have the same loss and ``over``."""
    weight: NonNegative = 1.0
    """Factor of the term; 0 disables it at no cost."""
    warmup_epochs: NonNegative = 0.0
    """Epochs over which the weight rises linearly from 0."""
    clean: bool | None = None
    """In adversarial training: the term sees the clean images, not the attacked ones. Empty: the attacked ones."""

    dims: list[Count] | None = Field(None, min_length=1)
    """Nested dimensions (Matryoshka): the term is its mean over the student's first d features of each number d in the
    list, with unit norm again. Empty: all features. Logits are compared with the teacher's complete ones, features with
    the same dimensions of the teacher's."""

    @field_validator("dims")
    @classmethod
    def _dims_differ(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("different numbers")
        return value

    papers: ClassVar[tuple[Paper, ...]] = ()
    needs_logits: ClassVar[bool] = True
    """Whether it uses similarities, and so trains the logit scale; otherwise it compares only the rows' features."""
    needs_equal_widths: ClassVar[bool] = False
    """Whether it compares features of the student with a teacher's directly: where the widths differ, the student's are
    projected by a learned map."""
    couples_rows: ClassVar[bool] = False
    """Whether it needs the logits of the entire batch at once; they are then gathered over ranks."""

    @property
    def term_name(self) -> str:
        """The term's name in the metrics."""
        return self.name or f"{self.loss}_{self.over}"

    @property
    def notable_settings(self) -> dict[str, Any]:
        """The settings to report: those that differ from their default, and those that are strings."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in fields if name not in ("loss", "over", "name", "weight")}
        return {
            name: value for name, value in values.items() if isinstance(value, str) or value != fields[name].default
        }

    @property
    def is_two_sided(self) -> bool:
        """Whether it compares the student's attacked images with its clean ones, in place of a teacher's."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with a teacher."""
        return not self.is_two_sided

    @property
    def needs_clean(self) -> bool:
        """Whether it needs the student's clean images, where they are attacked."""
        return bool(self.clean) or self.is_two_sided

    @property
    def needs_labels(self) -> bool:
        """Whether it needs the class of each sample."""
        return False

    @property
    def needs_class_counts(self) -> bool:
        """Whether it needs the number of training samples of each class."""
        return False

    @property
    def needs_caption_ids(self) -> bool:
        """Whether it needs ids of the captions, to find equal ones in the global batch."""
        return False

    @property
    def separable(self) -> bool:
        """Whether the rows of a batch can be computed separately and summed."""
        return not self.couples_rows and (self.over == "prompts" or not self.needs_logits)

    @property
    def prior_temperature(self) -> float | None:
        """Temperature of the teacher's logits in the class prior that the loss uses; None: it uses none."""
        return None

    def denominators(self, comparison: Comparison) -> dict[str, Tensor]:  # noqa: ARG002
        """This rank's share (0-d, by name) of the denominators of ``compute``, except the number of rows.

        They do not depend on the student, and are summed over micro-batches and ranks, for each matrix, before the
        student runs.
        """
        return {}

    def compute(self, comparison: Comparison, rows: Tensor, denominators: Mapping[str, Tensor]) -> LossParts:
        """This rank's share of the loss on one matrix, without the weight: the shares of all micro-batches and ranks
        add up to the loss of the global batch. (For a loss that couples rows, the complete loss.)

        Args:
            comparison: the matrix.
            rows: rows of the global batch, 0-d.
            denominators: sums of ``denominators`` over the global batch.
        """
        raise NotImplementedError
