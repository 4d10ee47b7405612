"""Similarity matrices of one model's outputs: over class prompts, and over the captions or images of all ranks.

Shapes: N ranks, B rows of this rank, C columns (classes, or N * B captions or images), D features.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipdistill.distributed.collectives import gather_rows
from clipdistill.losses.base import Similarity
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.models.nested import narrowed
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

    def __init__(self, local: Similarity) -> None:
        self._local = local

    @property
    def scale(self) -> Tensor | float:
        """Multiplier of the cosines."""
        return self._local.scale

    @property
    def bias(self) -> Tensor | float | None:
        """Additive bias."""
        return self._local.bias

    @property
    def rows_BD(self) -> Tensor:
        """Features of this rank's rows."""
        return self._local.rows_BD

    @property
    def columns_CD(self) -> Tensor:
        """Features of the columns."""
        return self._local.columns_CD

    @cached_property
    def logits_BC(self) -> Tensor:
        """Logits of N * B rows."""
        return gather_rows(self._local.logits_BC)


class MixedMatrix:
    """Several teachers as one, whose softmax is the weighted mean of theirs (implements ``losses.base.Similarity``).

    It has logits, log probabilities, but no features: losses are computed from the logits.

    Args:
        matrices: the same matrix of each teacher, each with its own scale.
        shares: weights of the teachers; their sum is 1.
    """

    scale = 1.0
    bias = None

    def __init__(self, matrices: Sequence[SimilarityMatrix], shares: Sequence[float]) -> None:
        self._matrices, self._shares = matrices, shares

    @property
    def rows_BD(self) -> Tensor:
        """None: raises."""
        raise NotImplementedError("a mixture of teachers has no features")

    columns_CD = rows_BD

    @cached_property
    def logits_BC(self) -> Tensor:
        """``log sum_k share_k softmax(logits_k)``, float32."""
        logs = [
            matrix.logits_BC.log_softmax(1) + math.log(share)
            for matrix, share in zip(self._matrices, self._shares, strict=True)
        ]
        return torch.stack(logs).logsumexp(0)


class Similarities:
    """All matrices of one model for a micro-batch, each computed once."""

    def __init__(self, outputs: ModelOutputs) -> None:
        self.outputs = outputs
        self._towards: dict[int, Similarities] = {}
        self._narrowed: dict[int, Similarities] = {}

    def towards(self, teacher: int) -> "Similarities":
        """The matrices of the student's features in the space of a teacher, by its number."""
        if teacher not in self._towards:
            outputs = self.outputs.towards(teacher)
            self._towards[teacher] = self if outputs is self.outputs else Similarities(outputs)
        return self._towards[teacher]

    def narrowed(self, dimensions: int | None) -> "Similarities":
        """The matrices of the first dimensions of all features, with unit norm; None: of all dimensions."""
        if dimensions is None:
            return self
        if dimensions not in self._narrowed:
            names = ("image_BD", "captions_BD", "prompts_CD")
            parts: dict[str, Any] = {
                name: narrowed(value, dimensions) for name, value in self.outputs.tensors() if name in names
            }
            self._narrowed[dimensions] = Similarities(self.outputs._replace(**parts))
        return self._narrowed[dimensions]

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
