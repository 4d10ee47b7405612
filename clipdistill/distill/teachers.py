"""The frozen teachers of a run: they encode a batch, or their features are read from the teacher cache.

Shapes: B samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipdistill.data import Batch
from clipdistill.models.class_embeddings import class_embeddings
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.prompts import PromptSet
from clipdistill.models.tokens import TokenGroups
from clipdistill.models.towers import FrozenModel


class Teachers:
    """Frozen models and their class embeddings.

    Args:
        models: on the CPU.
        tokenizers: for each, the index of its tokens in the batch's caption tokens.
        micro_batches: number of micro-batches encoded at once.
        cached: whether batches carry the teachers' features, so that no teacher is run.
    """

    def __init__(
        self,
        models: Sequence[FrozenModel],
        *,
        tokenizers: Sequence[int] = (),
        micro_batches: int = 1,
        cached: bool = False,
    ) -> None:
        self.models = models
        self.cached = cached
        self._tokenizers = tokenizers
        self._micro_batches = micro_batches
        self.class_embeddings: list[Tensor | None] = [None for _ in models]
        """Class embeddings (C, D) of each teacher; None without prompts."""

    def embed_classes(self, prompts: PromptSet, **settings: object) -> None:
        """Compute each teacher's class embeddings; settings as for ``class_embeddings``."""
        self.class_embeddings = [class_embeddings(model, prompts, **settings) for model in self.models]  # type: ignore[arg-type]

    def with_class_embeddings(self, number: int, features: ModelOutputs) -> ModelOutputs:
        """A teacher's features of a batch, completed with its class embeddings, logit scale and bias."""
        model = self.models[number]
        return features._replace(prompts_CD=self.class_embeddings[number], scale=model.logit_scale, bias=model.bias)

    def run(self, batches: Sequence[Batch], *, captions: bool) -> list[list[ModelOutputs]]:
        """Each teacher's outputs for each micro-batch, from the cache or computed.

        Args:
            batches: on the device.
            captions: also encode captions.
        """
        if self.cached:
            outputs = [batch.teachers for batch in batches]
        else:
            outputs = []
            for start in range(0, len(batches), self._micro_batches):
                outputs += self._run_together(batches[start : start + self._micro_batches], captions=captions)
        return [
            [self.with_class_embeddings(number, features) for number, features in enumerate(of_batch)]
            for of_batch in outputs
        ]

    def _run_together(self, batches: Sequence[Batch], *, captions: bool) -> list[list[ModelOutputs]]:
        sizes = [len(batch) for batch in batches]
        image_BCHW = torch.cat([batch.image_BCHW for batch in batches]) if len(batches) > 1 else batches[0].image_BCHW
        of_teachers = []
        for number, model in enumerate(self.models):
            captions_BD = None
            if captions:
                tokenizer = self._tokenizers[number]
                tokens = [batch.caption_tokens[tokenizer] for batch in batches]
                captions_BD = TokenGroups.encode_together(tokens, model.encode_tokens)
            features = ModelOutputs(image_BD=model.encode_image(image_BCHW), captions_BD=captions_BD)
            of_teachers.append(features.split(sizes))
        return [list(of_batch) for of_batch in zip(*of_teachers, strict=True)]
