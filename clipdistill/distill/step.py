"""Gradients of one optimizer step. Data flows in one direction:

    batches ─ Teachers.run ─> Targets ─ Objective.denominators ─┐
            └ perturb ─> student ─> Similarities ───────────────┴─ Objective.losses ─> backward

Terms that need clean images beside attacked ones get both from one forward pass. A weight attack repeats the part after
``perturb``: for its direction, and at the moved weights.

Shapes: K micro-batches, B samples per micro-batch, D features.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clipdistill.data import Batch
from clipdistill.distill.gradient_cache import GradientCache
from clipdistill.distill.objective import Denominators, Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.stopwatch import NoStopwatch
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.targets import Labels, Targets, make_targets
from clipdistill.distill.teachers import Teachers
from clipdistill.distill.transfer import Transfer
from clipdistill.distill.weight_attack import WeightAttack
from clipdistill.losses import LossParts
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.towers import Student

Perturb = Callable[[Batch, Targets, Denominators, int], Tensor]
"""Changes the student's images before its forward pass: (micro-batch, its targets, the step's denominators, step) ->
images in the input format of ``PixelTransform``. The teachers see the unchanged images."""


@dataclass(kw_only=True)
class StepLosses:
    """Losses of a step: this rank's share, 0-d.

    Attributes:
        sums: ``loss``, the weighted total, and every unweighted part as ``loss/TERM/PART``.
        gradient_shares: each part's share of the gradient norms, if measured.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    gradient_shares: dict[str, float] = field(default_factory=dict)

    def add(self, losses: Mapping[str, LossParts], total: Tensor) -> None:
        """Add a micro-batch."""
        self.sums["loss"] = self.sums.get("loss", 0.0) + total.detach()
        for term, loss in losses.items():
            for part, value in loss.parts.items():
                name = f"loss/{term}/{part}"
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()


class DistillationStep:
    """Computes the gradients of a step; the caller runs the optimizer.

    Args:
        accelerator: scales and synchronises the backward passes.
        model: the student as ``accelerator.prepare`` returned it.
        student: the student itself.
        teachers: the frozen models.
        objective: the terms.
        texts: the student's class prompts and captions.
        labels: source of a sample's class.
        perturb: changes the student's images; None: no change.
        weight_attack: moves the student's weights for the gradients of a step; None: no move.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        student: Student,
        teachers: Teachers,
        objective: Objective,
        texts: StudentTexts,
        labels: Labels,
        perturb: Perturb | None = None,
        weight_attack: WeightAttack | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.student = student
        self.teachers = teachers
        self.objective = objective
        self.texts = texts
        self.labels = labels
        self.perturb = perturb
        self.weight_attack = weight_attack
        self.stopwatch = NoStopwatch()
        self._transfer = Transfer(accelerator.device)

    def __call__(self, batches: Sequence[Batch], step: int, *, measure_shares: bool) -> StepLosses:
        """Accumulate the gradients of an optimizer step's micro-batches in the student.

        Args:
            batches: K micro-batches of this rank.
            step: from 0.
            measure_shares: measure each part's share of the gradient norms.
        """
        batches = [self._transfer(batch) for batch in batches]
        with self.stopwatch.section("teacher"):
            targets = self._make_targets(batches)
        rows = sum(len(batch) for batch in batches)
        together = len(batches) > 1 and not self.objective.separable
        counted = [Targets.cat(targets)] if together else targets
        with self.stopwatch.section("loss"):
            denominators = self.objective.denominators(counted, rows)
        if self.weight_attack is None or not self.weight_attack.is_active(step):
            seen = (self._perturbed(*each, denominators, step) for each in zip(batches, targets, strict=True))
            return self._backward(batches, seen, counted, denominators, step, measure_shares=measure_shares)
        images = [self._perturbed(*each, denominators, step) for each in zip(batches, targets, strict=True)]
        with self.weight_attack.moved(
            lambda: self._backward(batches, images, counted, denominators, step, observe=False)
        ):
            return self._backward(batches, images, counted, denominators, step, measure_shares=measure_shares)

    def _backward(
        self,
        batches: Sequence[Batch],
        images: Iterable[Tensor],
        targets: Sequence[Targets],
        denominators: Denominators,
        step: int,
        *,
        measure_shares: bool = False,
        observe: bool = True,
    ) -> StepLosses:
        """Accumulate the gradients of the images that the student sees.

        Args:
            batches: the micro-batches.
            images: what the student sees of each, attacked or not.
            targets: of each, or of all together if terms couple their rows.
            denominators: of the step.
            step: from 0.
            measure_shares: as for the step.
            observe: add the student's predictions to the class priors.
        """
        if len(targets) < len(batches):
            return self._backward_together(batches, list(images), targets[0], denominators, step, measure_shares)
        return self._backward_apart(batches, images, targets, denominators, step, measure_shares, observe)

    def _make_targets(self, batches: Sequence[Batch]) -> list[Targets]:
        """Run the teachers if needed, and add their predictions to the class priors."""
        objective = self.objective
        lends_captions = self.student.text_mode == "teacher" and objective.needs_captions
        if objective.needs_teachers or self.labels == "teacher" or lends_captions:
            outputs = self.teachers.run(batches, captions=objective.needs_teacher_captions or lends_captions)
        else:
            outputs = [[] for _ in batches]
        targets = [make_targets(batch, of_batch, self.labels) for batch, of_batch in zip(batches, outputs, strict=True)]
        if not self.teachers.cached:
            for each in targets:
                objective.observe(each)
        return targets

    def _backward_apart(
        self,
        batches: Sequence[Batch],
        images: Iterable[Tensor],
        targets: Sequence[Targets],
        denominators: Denominators,
        step: int,
        measure_shares: bool,
        observe: bool,
    ) -> StepLosses:
        """Gradients of terms with independent rows: forward and backward, one micro-batch after another.

        Class prompts with gradient are encoded for the first micro-batch, and for the last one, which passes on the
        gradients of all.
        """
        found = StepLosses()
        with self.stopwatch.section("student forward"):
            prompts_CD = self._encode_prompts(step) if len(batches) > 1 else None
        for number, (batch, image_BCHW, target) in enumerate(zip(batches, images, targets, strict=True)):
            last = number == len(batches) - 1
            with self._synchronised(last):
                clean = self._clean(batch)
                with self.stopwatch.section("student forward"):
                    texts = self.texts.inputs(batch, step, prompts=last or prompts_CD is None)
                    outputs = self.model(image_BCHW if clean is None else torch.cat([image_BCHW, clean]), **texts)
                with self.stopwatch.section("loss"):
                    shared = outputs if last or prompts_CD is None else outputs._replace(prompts_CD=prompts_CD)
                    shared = self.texts.complete(shared, target)
                    student, own_clean = Similarities(shared), None
                    if clean is not None:
                        student, own_clean = map(Similarities, shared.split([len(batch), len(batch)]))
                        if observe:
                            self.objective.observe_clean(own_clean, target)
                    losses = self.objective.losses(student, target, denominators, own_clean)
                    if measure_shares and last:
                        found.gradient_shares = self._gradient_shares(losses, shared, step)
                    total = self.objective.total(losses, step)
                with self.stopwatch.section("backward"):
                    scaled = total * self.accelerator.num_processes
                    if last and prompts_CD is not None and prompts_CD.grad is not None:
                        scaled = scaled + (outputs.prompts_CD * prompts_CD.grad).sum()
                    self.accelerator.backward(scaled)
            found.add(losses, total)
        return found

    @torch.no_grad()
    def _encode_prompts(self, step: int) -> Tensor | None:
        """The class embeddings of a step, a leaf that collects gradients; None if they are fixed, or random."""
        texts = self.texts.prompt_inputs(step)
        if not texts or self.student.text_is_random:
            return None
        outputs: ModelOutputs = self.model(**texts)
        assert outputs.prompts_CD is not None
        return outputs.prompts_CD.requires_grad_()

    def _backward_together(
        self,
        batches: Sequence[Batch],
        images: Sequence[Tensor],
        whole: Targets,
        denominators: Denominators,
        step: int,
        measure_shares: bool,
    ) -> StepLosses:
        """Gradients of terms that couple rows across micro-batches (in-batch terms)."""

        def forward(number: int) -> ModelOutputs:
            prompts = number == len(batches) - 1
            outputs: ModelOutputs = self.model(
                images[number], **self.texts.inputs(batches[number], step, prompts=prompts)
            )
            return outputs

        with self.stopwatch.section("student forward"):
            cache = GradientCache(self.student, forward, [len(batch) for batch in batches], self.accelerator.device)
        found = StepLosses()
        with self.stopwatch.section("loss"):
            student = Similarities(self.texts.complete(cache.outputs, whole))
            losses = self.objective.losses(student, whole, denominators)
            if measure_shares:
                found.gradient_shares = self._gradient_shares(losses, student.outputs, step)
            total = self.objective.total(losses, step)
            (total * self.accelerator.num_processes).backward()
        for number in range(len(batches)):
            with self._synchronised(number == len(batches) - 1):
                with self.stopwatch.section("student forward"):
                    surrogate = cache.surrogate(number)
                with self.stopwatch.section("backward"):
                    self.accelerator.backward(surrogate)
        found.add(losses, total)
        return found

    def _perturbed(self, batch: Batch, target: Targets, denominators: Denominators, step: int) -> Tensor:
        if self.perturb is None:
            return batch.image_BCHW
        with self.stopwatch.section("attack"):
            return self.perturb(batch, target, denominators, step)

    def _clean(self, batch: Batch) -> Tensor | None:
        """The clean images in the format of attacked ones; None if no term needs them."""
        if self.perturb is None or not self.objective.needs_clean:
            return None
        return self.student.pixels.resize(batch.image_BCHW)

    def _synchronised(self, last: bool) -> Any:
        """Synchronise gradients only in the backward pass of the last micro-batch."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def _gradient_shares(self, losses: Mapping[str, LossParts], outputs: ModelOutputs, step: int) -> dict[str, float]:
        """Each weighted part's share of the gradient norms with respect to this rank's student image features."""
        image_BD, projected_BE = outputs.image_BD, outputs.image_projected_BE
        assert image_BD is not None
        cached = projected_BE is not None and projected_BE.is_leaf  # its gradient does not reach the features by itself
        inputs = [image_BD, *([projected_BE] if projected_BE is not None and cached else [])]
        norms = {}
        for term in self.objective.terms:
            for part, value in losses[term.term_name].parts.items():
                weighted = self.objective.weight_at(term, step) * value
                grad, *of_projected = torch.autograd.grad(weighted, inputs, retain_graph=True, allow_unused=True)
                if of_projected and of_projected[0] is not None:
                    assert self.student.projections is not None
                    again_BE = self.student.projections("image", image_BD)
                    (carried,) = torch.autograd.grad(again_BE, image_BD, of_projected[0])
                    grad = carried if grad is None else grad + carried
                norm = image_BD.new_zeros(()) if grad is None else grad.norm()
                norms[f"gradient_share/{term.term_name}/{part}"] = norm
        values = torch.stack(list(norms.values())).tolist()
        total = sum(values)
        return {name: norm / total if total > 0 else 0.0 for name, norm in zip(norms, values, strict=True)}
