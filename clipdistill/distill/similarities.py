"""Similarity matrices of one model's outputs: over class prompts, and over the captions or images of all ranks.

Shapes: N ranks, B rows of this rank, C columns (classes, or N * B captions or images), D features.
"""

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from clipdistill.distributed.collectives import gather_rows
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.models.outputs import ModelOutputs


class SimilarityMatrix:
    """Rows versus columns; columns and logits are computed on first use (implements ``losses.base.Similarity``)."""

    def __init__(self, outputs: ModelOutputs, rows_BD: Tensor, columns: Callable[[], Tensor]) -> None:
        self.rows_BD = rows_BD
        self.scale = outputs.scale
        self.bias = outputs.bias
        self._columns = columns

    @cached_property
    def columns_CD(self) -> Tensor:
        """Features of the columns."""
        return self._columns()

    @cached_property
    def logits_BC(self) -> Tensor:
        """``scale * rows @ columns.T + bias``, float32."""
        return similarity_logits(self.rows_BD, self.columns_CD, self.scale, self.bias)


class WholeBatch:
    """The logits of all ranks' rows, for a loss that couples rows (implements ``losses.base.Similarity``)."""

    def __init__(self, local: SimilarityMatrix) -> None:
        self.rows_BD, self.scale, self.bias = local.rows_BD, local.scale, local.bias
        self._local = local

    @property
    def columns_CD(self) -> Tensor:
        """Features of the columns."""
        return self._local.columns_CD

    @cached_property
    def logits_BC(self) -> Tensor:
        """Logits of N * B rows."""
        return gather_rows(self._local.logits_BC)


class Similarities:
    """All matrices of one model for a micro-batch, each computed once."""

    def __init__(self, outputs: ModelOutputs) -> None:
        self.outputs = outputs
        self._towards: dict[int, Similarities] = {}

    def towards(self, teacher: int) -> "Similarities":
        """The matrices of the student's features in the space of a teacher, by its number."""
        if teacher not in self._towards:
            outputs = self.outputs.towards(teacher)
            self._towards[teacher] = self if outputs is self.outputs else Similarities(outputs)
        return self._towards[teacher]

    def over(self, what: str) -> list[SimilarityMatrix]:
        """The matrices that a term compares.

        Args:
            what: ``prompts``: images versus class prompts. ``captions``: images versus the captions of all ranks, and
                captions versus images. ``images``: images versus the images of all ranks.
        """
        matrices: list[SimilarityMatrix] = getattr(self, f"over_{what}")
        return matrices

    @cached_property
    def over_prompts(self) -> list[SimilarityMatrix]:
        """Images versus class prompts."""
        image_BD, prompts_CD = self._image_BD, self.outputs.prompts_CD
        assert prompts_CD is not None
        return [SimilarityMatrix(self.outputs, image_BD, lambda: prompts_CD)]

    @cached_property
    def over_captions(self) -> list[SimilarityMatrix]:
        """Images versus captions, and captions versus images."""
        image_BD, captions_BD = self._image_BD, self.outputs.captions_BD
        assert captions_BD is not None
        return [
            SimilarityMatrix(self.outputs, image_BD, lambda: gather_rows(captions_BD)),
            SimilarityMatrix(self.outputs, captions_BD, lambda: gather_rows(image_BD)),
        ]

    @cached_property
    def over_images(self) -> list[SimilarityMatrix]:
        """Images versus images."""
        image_BD = self._image_BD
        return [SimilarityMatrix(self.outputs, image_BD, lambda: gather_rows(image_BD))]

    @property
    def prompt_logits(self) -> Tensor:
        """Logits over the class prompts, (B, C)."""
        return self.over_prompts[0].logits_BC

    @property
    def _image_BD(self) -> Tensor:
        assert self.outputs.image_BD is not None
        return self.outputs.image_BD
