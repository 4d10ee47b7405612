"""The student's text inputs: class prompts and captions, according to its text mode.

Shapes: B samples, C classes, T templates, N prompts, L tokens, D features.
"""

from typing import Any

import torch
from torch import Tensor

from clipdistill.data import Batch
from clipdistill.distill.targets import Targets
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.towers import Student, share_of_classes


class StudentTexts:
    """Text inputs of the student's forward pass, and the text features that it takes over.

    Args:
        student: trims its prompts.
        class_tokens_CTL: token ids of every class in every template, where the text tower is trained.
        class_CD: class embeddings, where they are fixed.
        templates_per_step: templates that are encoded in a step; 0: all.
        seed: draws them, with the step.
        caption_tokens: number of the batch's caption tokens that are the student's; None: it encodes no captions.
        teacher_captions: whether the first teacher's caption features are the student's own.
    """

    def __init__(
        self,
        student: Student,
        *,
        class_tokens_CTL: Tensor | None = None,
        class_CD: Tensor | None = None,
        templates_per_step: int = 0,
        seed: int = 0,
        caption_tokens: int | None = None,
        teacher_captions: bool = False,
    ) -> None:
        self._tokenizer = student.text_tokenizer
        self._device = student.device
        self._class_tokens_CTL = class_tokens_CTL
        self._class_CD = class_CD
        self._templates_per_step = templates_per_step
        self._seed = seed
        self._caption_tokens = caption_tokens
        self._teacher_captions = teacher_captions

    def inputs(self, batch: Batch, step: int, *, prompts: bool) -> dict[str, Any]:
        """Keyword arguments of the student's forward pass for a micro-batch.

        Args:
            batch: on the device.
            step: the optimizer step, from 0.
            prompts: whether class prompts are encoded along with this micro-batch.
        """
        texts: dict[str, Any] = {}
        if prompts and self._class_tokens_CTL is not None:
            tokens = self._templates_of_step(self._class_tokens_CTL, step)
            texts["prompt_tokens_NL"] = share_of_classes(tokens).to(self._device)
            texts["num_classes"] = len(tokens)
        if self._caption_tokens is not None:
            texts["caption_tokens_BL"] = batch.caption_tokens[self._caption_tokens]
        return texts

    def complete(self, outputs: ModelOutputs, targets: Targets) -> ModelOutputs:
        """The student's outputs with the text features that it takes over."""
        if outputs.prompts_CD is None:
            outputs = outputs._replace(prompts_CD=self._class_CD)
        if self._teacher_captions:
            outputs = outputs._replace(captions_BD=targets.teachers[0].outputs.captions_BD)
        return outputs

    def _templates_of_step(self, tokens_CTL: Tensor, step: int) -> Tensor:
        """This step's templates: (C, L) for one, (C, t, L) for several; drawn from (seed, step)."""
        wanted = self._templates_per_step or tokens_CTL.shape[1]
        if wanted < tokens_CTL.shape[1]:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            tokens_CTL = tokens_CTL[:, torch.randperm(tokens_CTL.shape[1], generator=generator)[:wanted]]
            tokens_CTL = self._tokenizer.trim(tokens_CTL)
        return tokens_CTL[:, 0] if tokens_CTL.shape[1] == 1 else tokens_CTL
