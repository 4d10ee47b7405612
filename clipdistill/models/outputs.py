"""The outputs of a model for a batch, or for one sample.

Shapes: B samples, C classes, D features, E features for all teachers of another width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

PER_SAMPLE = ("image_BD", "captions_BD", "image_projected_BE", "captions_projected_BE")
"""Fields with one row per sample; the others are the same for every micro-batch."""


class ModelOutputs(NamedTuple):
    """Unit-norm float32 features of one model, and the scale and bias of its logits; None: not computed."""

    image_BD: Tensor | None = None
    """Image features."""
    captions_BD: Tensor | None = None
    """Text features of the captions."""
    prompts_CD: Tensor | None = None
    """Class embeddings (zero-shot weights)."""
    scale: Tensor | float = 1.0
    """Multiplier of the cosine similarities."""
    bias: Tensor | float | None = None
    """Additive bias of a sigmoid-trained model."""
    image_projected_BE: Tensor | None = None
    """A student's image features, projected into the spaces of teachers."""
    captions_projected_BE: Tensor | None = None
    """The same of its captions."""
    projected_widths: tuple[int, ...] = ()
    """Columns of these for each teacher, in their order; 0 for a teacher of the student's own width."""

    def towards(self, teacher: int) -> ModelOutputs:
        """The student's outputs with its features in the space of a teacher, by its number."""
        width = self.projected_widths[teacher] if self.projected_widths else 0
        if not width:
            return self
        first = sum(self.projected_widths[:teacher])
        image_BD, captions_BD = (
            None if value is None else value[:, first : first + width]
            for value in (self.image_projected_BE, self.captions_projected_BE)
        )
        return self._replace(image_BD=image_BD, captions_BD=captions_BD)

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelOutputs:
        """The outputs with a function applied to each tensor, such as moving it to a device."""
        return self._with({name: change(value) for name, value in self.tensors()})

    def _with(self, changes: dict[str, Any]) -> ModelOutputs:
        return self._replace(**changes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are not None, with their field names."""
        return ((name, value) for name, value in self._asdict().items() if isinstance(value, Tensor))

    def rows(self, rows: slice) -> ModelOutputs:
        """The outputs of a slice of the samples."""
        return self._with({name: value[rows] for name, value in self.tensors() if name in PER_SAMPLE})

    def split(self, sizes: Sequence[int]) -> list[ModelOutputs]:
        """Split the outputs into those of several batches."""
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return [self.rows(slice(start, end)) for start, end in pairwise(ends)]

    @classmethod
    def cat(cls, parts: Sequence[ModelOutputs]) -> ModelOutputs:
        """Concatenate the samples of several micro-batches; the other fields are those of the last."""
        return cls._join(torch.cat, parts)

    @classmethod
    def stack(cls, samples: Sequence[ModelOutputs]) -> ModelOutputs:
        """Stack the outputs of single samples, whose fields have no dimension B, into those of a batch."""
        return cls._join(torch.stack, samples)

    @classmethod
    def _join(cls, join: Callable[[list[Tensor]], Tensor], parts: Sequence[ModelOutputs]) -> ModelOutputs:
        last = parts[-1]
        return last._with(
            {name: join([getattr(part, name) for part in parts]) for name, _ in last.tensors() if name in PER_SAMPLE}
        )
