"""Teachers' class priors from a teacher cache: means over all stored views, computed before the first step.

Shapes: B views of samples.
"""

import torch
from torch import Tensor

from clipdistill.data.class_lists import ClassLists
from clipdistill.data.embeddings import NAMED, EmbeddingReader
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Labels, Targets
from clipdistill.distill.teachers import Teachers
from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.io.urls import shown
from clipdistill.models.outputs import ModelOutputs

_ROWS_AT_ONCE = 4096


def observe_stored_views(
    objective: Objective,
    teachers: Teachers,
    embeddings: EmbeddingReader,
    *,
    shards: int,
    labels: Labels,
    class_lists: ClassLists | None,
    device: torch.device,
) -> None:
    """Set the teachers' class priors to the means over all stored views; each rank reads its part of the shards once.

    Args:
        objective: holds the priors.
        teachers: whose class embeddings the stored embeddings are compared with.
        embeddings: the stored views.
        shards: number of shards.
        labels: source of the labels.
        class_lists: classes of the shards' labels; None if they are not the source.
        device: where to compute.

    Raises:
        InputError: a label outside the class list, or a damaged file.
    """
    for shard in range(rank(), shards, world_size()):
        images, stored_B = embeddings.everything(shard)
        if class_lists is not None:
            labels_B = _class_indices(stored_B, class_lists, embeddings.url(shard))
            images, stored_B = [image[labels_B >= 0] for image in images], labels_B[labels_B >= 0]
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
    objective.priors.end_epoch(own=False)
    objective.priors.complete = True


def _class_indices(stored_B: Tensor, class_lists: ClassLists, url: str) -> Tensor:
    """Indices in the prompt set of a shard's labels; -1 for samples without one."""
    if (stored_B == NAMED).any():
        raise InputError(
            f"shard {shown(url)}: labels are class names, which a teacher cache does not store; allowed with a class "
            "prior: class numbers"
        )
    classes = class_lists.of(url)
    count = len(classes.names or ())
    if len(stored_B) and int(stored_B.max()) >= count:
        raise InputError(
            f"shard {shown(url)}: label {int(stored_B.max())}; allowed: 0 to {count - 1} (the class list has {count} "
            "names)"
        )
    return torch.tensor([*classes.indices, -1])[stored_B]  # the last one for -1
