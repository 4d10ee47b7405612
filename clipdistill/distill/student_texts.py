"""The student's text inputs: class prompts and captions, according to its text mode.

Shapes: C classes, n of a rank or a group, T templates, L tokens, D features.
"""

from typing import Any

import torch
from torch import Tensor

from clipdistill.data import Batch
from clipdistill.distill.targets import Targets
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.tokens import TokenGroups
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
        self._class_tokens: TokenGroups | None = None
        if class_tokens_CTL is not None:
            tokenizer = student.text_tokenizer.for_device(student.device)
            self._num_classes = len(class_tokens_CTL)
            share_nTL = share_of_classes(class_tokens_CTL)
            groups = tokenizer.group(share_nTL, templates=templates_per_step or share_nTL.shape[1])
            self._used_lengths = [[tokenizer.used_length(part) for part in each.unbind(1)] for each in groups.tokens]
            self._class_tokens = groups.map(lambda tokens: tokens.to(student.device))
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
            texts["caption_tokens"] = batch.caption_tokens[self._caption_tokens]
        return texts

    def prompt_inputs(self, step: int) -> dict[str, Any]:
        """Those of ``inputs`` that encode the class prompts; empty if the class embeddings are fixed."""
        if self._class_tokens is None:
            return {}
        return {"prompt_tokens": self._templates_of_step(self._class_tokens, step), "num_classes": self._num_classes}

    def complete(self, outputs: ModelOutputs, targets: Targets) -> ModelOutputs:
        """The student's outputs, completed with the fixed class embeddings and the teacher's caption features."""
        if outputs.prompts_CD is None:
            outputs = outputs._replace(prompts_CD=self._class_CD)
        if self._teacher_captions:
            outputs = outputs._replace(captions_BD=targets.teachers[0].outputs.captions_BD)
        return outputs

    def _templates_of_step(self, groups: TokenGroups, step: int) -> TokenGroups:
        """Token ids of this step's templates: (n, L) for one, (n, t, L) for several; drawn from (seed, step)."""
        templates = groups.tokens[0].shape[1]
        wanted = self._templates_per_step or templates
        parts = list(groups.tokens)
        if wanted < templates:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
            chosen = torch.randperm(templates, generator=generator)[:wanted].tolist()
            for number, lengths in enumerate(self._used_lengths):
                length = max(lengths[template] for template in chosen)
                parts[number] = torch.stack([parts[number][:, template, :length] for template in chosen], dim=1)
        return groups._replace(tokens=tuple(each[:, 0] if each.shape[1] == 1 else each for each in parts))
