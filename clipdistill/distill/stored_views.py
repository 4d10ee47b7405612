"""Class priors from a teacher cache: means over all stored views, computed before the first step.

Shapes: B views of samples.
"""

import torch

from clipdistill.data.embeddings import EmbeddingReader
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Labels, Targets
from clipdistill.distill.teachers import Teachers
from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.models.outputs import ModelOutputs

_ROWS_AT_ONCE = 4096


def observe_stored_views(
    objective: Objective,
    teachers: Teachers,
    embeddings: EmbeddingReader,
    *,
    shards: int,
    labels: Labels,
    num_classes: int,
    device: torch.device,
) -> None:
    """Set the class priors to the means over all stored views; each rank reads its part of the shards once.

    Raises:
        InputError: a label outside the class list, or a damaged file.
    """
    for shard in range(rank(), shards, world_size()):
        images, stored_B = embeddings.everything(shard)
        if labels == "dataset":
            images, stored_B = [image[stored_B >= 0] for image in images], stored_B[stored_B >= 0]
            if len(stored_B) and int(stored_B.max()) >= num_classes:
                raise InputError(
                    f"data.shards: label {int(stored_B.max())} in shard number {shard}; allowed: 0 to "
                    f"{num_classes - 1} (the class list has {num_classes} names)"
                )
        for start in range(0, len(stored_B), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            outputs = [
                Similarities(teachers.with_class_embeddings(number, ModelOutputs(image_BD=image[rows].to(device))))
                for number, image in enumerate(images)
            ]
            labels_B = stored_B[rows].to(device)
            if labels == "teacher":
                labels_B = outputs[0].prompt_logits.argmax(dim=1)
            objective.observe(Targets(teachers=outputs, labels_B=labels_B))
    objective.priors.end_epoch()
    objective.priors.complete = True
