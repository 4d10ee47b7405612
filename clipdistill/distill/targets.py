"""The targets of a micro-batch: the teachers' outputs, labels and caption ids.

Shapes: B samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from clipdistill.data import Batch
from clipdistill.distill.similarities import Similarities
from clipdistill.distributed.collectives import gather_rows
from clipdistill.models.outputs import ModelOutputs

Labels = Literal["none", "dataset", "teacher"]
"""Source of a training sample's class: none, the sample, or the first teacher's argmax."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets of one micro-batch.

    Attributes:
        teachers: their similarities.
        labels_B: the class of each sample; None without labels.
        caption_ids_B: id of each caption, equal for equal captions on every rank.
    """

    teachers: Sequence[Similarities] = ()
    labels_B: Tensor | None = None
    caption_ids_B: Tensor | None = None

    @cached_property
    def all_caption_ids(self) -> Tensor:
        """Caption ids of all ranks."""
        assert self.caption_ids_B is not None
        return gather_rows(self.caption_ids_B)

    @classmethod
    def cat(cls, targets: Sequence["Targets"]) -> "Targets":
        """Concatenate the targets of several micro-batches."""

        def join(parts: Sequence[Tensor | None]) -> Tensor | None:
            present = [part for part in parts if part is not None]
            return torch.cat(present) if present else None

        return cls(
            teachers=[
                Similarities(ModelOutputs.cat([each.outputs for each in of_teacher]))
                for of_teacher in zip(*(target.teachers for target in targets), strict=True)
            ],
            labels_B=join([target.labels_B for target in targets]),
            caption_ids_B=join([target.caption_ids_B for target in targets]),
        )


def make_targets(batch: Batch, outputs: Sequence[ModelOutputs], labels: Labels) -> Targets:
    """The targets of a micro-batch.

    Args:
        batch: on the device.
        outputs: each teacher's outputs.
        labels: source of the labels.
    """
    teachers = [Similarities(each) for each in outputs]
    labels_B = batch.labels_B if labels == "dataset" else None
    if labels == "teacher":
        labels_B = teachers[0].prompt_logits.argmax(dim=1)
    return Targets(teachers=teachers, labels_B=labels_B, caption_ids_B=batch.caption_ids_B)
