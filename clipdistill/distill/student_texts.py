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
    """Text inputs of the student's forward pass, and the text features that it reuses.

    Args:
        student: on its device; its tokenizer trims the prompts.
        class_tokens_CTL: token ids of every class in every template, if the text tower is trained. This rank's share
            of the classes stays on the device.
        class_CD: class embeddings, if they are fixed.
        templates_per_step: number of templates encoded per step; 0: all.
        seed: seed of their selection, with the step.
        caption_tokens: index of the student's tokens in the batch's caption tokens; None: it encodes no captions.
        teacher_captions: use the first teacher's caption features as the student's.
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
        self._class_tokens_CTL: Tensor | None = None
        if class_tokens_CTL is not None:
            tokenizer = student.text_tokenizer
            self._num_classes = len(class_tokens_CTL)
            self._used_lengths = [tokenizer.used_length(tokens_CL) for tokens_CL in class_tokens_CTL.unbind(1)]
            self._class_tokens_CTL = share_of_classes(class_tokens_CTL).to(student.device)
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
            prompts: encode class prompts with this micro-batch.
        """
        texts = self.prompt_inputs(step) if prompts else {}
        if self._caption_tokens is not None:
            texts["caption_tokens_BL"] = batch.caption_tokens[self._caption_tokens]
        return texts

    def prompt_inputs(self, step: int) -> dict[str, Any]:
        """Those of ``inputs`` that encode the class prompts; empty if the class embeddings are fixed."""
        if self._class_tokens_CTL is None:
            return {}
        tokens = self._templates_of_step(self._class_tokens_CTL, step)
        return {"prompt_tokens_NL": tokens, "num_classes": self._num_classes}

    def complete(self, outputs: ModelOutputs, targets: Targets) -> ModelOutputs:
        """The student's outputs, completed with the fixed class embeddings and the teacher's caption features."""
        if outputs.prompts_CD is None:
            outputs = outputs._replace(prompts_CD=self._class_CD)
        if self._teacher_captions:
            outputs = outputs._replace(captions_BD=targets.teachers[0].outputs.captions_BD)
        return outputs

    def _templates_of_step(self, tokens_CTL: Tensor, step: int) -> Tensor:
        """Token ids of this step's templates: (C, L) for one, (C, t, L) for several; drawn from (seed, step)."""
        wanted = self._templates_per_step or tokens_CTL.shape[1]
        if wanted < tokens_CTL.shape[1]:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            chosen = torch.randperm(tokens_CTL.shape[1], generator=generator)[:wanted].tolist()
            length = max(self._used_lengths[template] for template in chosen)
            tokens_CTL = torch.stack([tokens_CTL[:, template, :length] for template in chosen], dim=1)
        return tokens_CTL[:, 0] if tokens_CTL.shape[1] == 1 else tokens_CTL
