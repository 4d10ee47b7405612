"""The weighted sum of a config's terms, normalised over the global batch.

Every rank computes its share: numerators over its own rows, divided by denominators summed over all ranks and
micro-batches. The ranks' losses therefore add up to the loss of one process with the entire batch.

Shapes: B rows of this rank, C columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clipdistill.distill.class_priors import ClassPriors
from clipdistill.distill.similarities import MixedMatrix, Similarities, WholeBatch
from clipdistill.distill.targets import Targets
from clipdistill.distributed.collectives import rank, sum_over_ranks, widest_float, world_size
from clipdistill.losses import Comparison, Implementation, Loss, LossParts

Denominators = Mapping[str, Tensor]
"""``rows``, and each loss's denominators by ``TERM/TEACHER/MATRIX/NAME``; sums over the global batch, 0-d."""


class Objective:
    """The terms, the teachers' weights, and the class priors.

    Args:
        terms: those with weight above 0; others are excluded, so they cost nothing.
        warmup_steps: optimizer steps over which a term's weight rises, by the term's name; other terms have no warm-up.
        teacher_weights: share of each teacher; normalised to sum to 1.
        mix_teachers: compare logits with one mixture of the teachers, in place of the mean loss over teachers.
        num_classes: C, for the class priors.
        class_counts: training samples of each class in an epoch, for terms that need them.
        device: device of the priors.
        implementation: for losses with several implementations.
    """

    def __init__(
        self,
        terms: Sequence[Loss],
        *,
        warmup_steps: Mapping[str, int] | None = None,
        teacher_weights: Sequence[float] = (),
        mix_teachers: bool = False,
        num_classes: int = 0,
        class_counts: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        implementation: Implementation = "auto",
    ) -> None:
        self.terms = terms
        self.device = torch.device(device)
        self.implementation: Implementation = implementation
        self.teacher_shares = [weight / sum(teacher_weights) for weight in teacher_weights]
        self._mix_teachers = mix_teachers and len(teacher_weights) > 1
        self.priors = ClassPriors(terms, teachers=len(teacher_weights), num_classes=num_classes, device=device)
        self._warmup_steps = warmup_steps or {}
        self._class_counts_C = None if class_counts is None else torch.tensor(class_counts, device=device)

    @property
    def needs_prompts(self) -> bool:
        """Whether a term is over class prompts."""
        return any(term.over == "prompts" for term in self.terms)

    @property
    def needs_captions(self) -> bool:
        """Whether a term is over captions."""
        return any(term.over == "captions" for term in self.terms)

    @property
    def needs_logits(self) -> bool:
        """Whether a term reads the student's logit scale."""
        return any(term.needs_logits for term in self.terms)

    @property
    def needs_teachers(self) -> bool:
        """Whether a term compares with a teacher."""
        return any(term.needs_teacher for term in self.terms)

    @property
    def needs_teacher_captions(self) -> bool:
        """Whether a term compares captions with a teacher's."""
        return any(term.over == "captions" and term.needs_teacher for term in self.terms)

    @property
    def needs_clean(self) -> bool:
        """Whether a term needs the student's clean images, where they are attacked."""
        return any(term.needs_clean for term in self.terms)

    @property
    def separable(self) -> bool:
        """Whether micro-batches can be computed separately, given the denominators."""
        return all(term.separable for term in self.terms)

    def weight_at(self, term: Loss, step: int) -> float:
        """A term's weight in optimizer step ``step`` (from 0): linear from 0 over its warm-up, then constant."""
        warmup_steps = self._warmup_steps.get(term.term_name, 0)
        return term.weight if step >= warmup_steps else term.weight * step / warmup_steps

    def observe(self, targets: Targets) -> None:
        """Add a micro-batch's teacher predictions to the class priors of the next epoch."""
        for term in self.terms:
            if term.prior_temperature is not None and not term.is_two_sided:
                assert targets.labels_B is not None
                for number, (matrices, _) in enumerate(self._teachers(term, targets)):
                    self.priors.observe(term, number, matrices[0].logits_BC, targets.labels_B)

    @torch.no_grad()
    def observe_clean(self, clean: Similarities, targets: Targets) -> None:
        """Add the student's predictions of a micro-batch's clean images to the priors of two-sided terms."""
        for term in self.terms:
            if term.prior_temperature is not None and term.is_two_sided:
                assert targets.labels_B is not None
                # of their own: those in ``clean`` would then have no gradient
                logits_BC = Similarities(clean.outputs).prompt_logits
                self.priors.observe(term, 0, logits_BC, targets.labels_B)

    @torch.no_grad()
    def denominators(self, batches: Sequence[Targets], rows: int) -> dict[str, Tensor]:
        """All denominators, summed over all ranks and the given micro-batches of this rank.

        Args:
            batches: the targets of the optimizer step's micro-batches, or of their concatenation.
            rows: samples of this rank in all of them.
        """
        local = {"rows": torch.full((), float(rows), device=self.device)}
        for term in self.terms:
            for targets in batches:
                for key, _, comparison in self._comparisons(term, None, targets):
                    for name, part in term.denominators(comparison).items():
                        whole = f"{key}/{name}"
                        local[whole] = local.get(whole, torch.zeros_like(part)) + part
        packed = sum_over_ranks(torch.stack([value.to(widest_float(self.device)) for value in local.values()]))
        return dict(zip(local, packed, strict=True))

    def losses(
        self,
        student: Similarities,
        targets: Targets,
        denominators: Denominators,
        clean: Similarities | None = None,
    ) -> dict[str, LossParts]:
        """This rank's share of every term of one micro-batch, unweighted, by the term's name.

        The shares of all ranks and micro-batches add up to the value of the term on the global batch.

        Args:
            student: of the images that it sees.
            targets: of the images.
            denominators: of the step.
            clean: the student's of the clean images, if it sees attacked ones and a term needs them.
        """
        return {term.term_name: self._compute(term, student, targets, denominators, clean) for term in self.terms}

    def total(self, losses: Mapping[str, LossParts], step: int) -> Tensor:
        """The weighted sum in optimizer step ``step``."""
        return torch.stack([self.weight_at(term, step) * losses[term.term_name].value for term in self.terms]).sum()

    def total_of(
        self,
        terms: Sequence[Loss],
        student: Similarities,
        targets: Targets,
        denominators: Denominators,
        step: int,
        clean: Similarities | None = None,
    ) -> Tensor:
        """This rank's share of the weighted sum of some of the terms, 0-d; arguments as for ``losses``."""
        values = [
            self.weight_at(term, step) * self._compute(term, student, targets, denominators, clean).value
            for term in terms
        ]
        return torch.stack(values).sum()

    def _compute(
        self,
        term: Loss,
        student: Similarities,
        targets: Targets,
        denominators: Denominators,
        clean: Similarities | None,
    ) -> LossParts:
        """A term: its mean over directions, weighted over teachers."""
        rows = denominators["rows"].to(torch.float32)
        parts: dict[str, Tensor] = {}
        value = torch.zeros((), device=rows.device)
        for key, share, comparison in self._comparisons(term, student, targets, clean):
            of_matrix = {
                name.removeprefix(f"{key}/"): each for name, each in denominators.items() if name.startswith(f"{key}/")
            }
            loss = term.compute(comparison, rows, of_matrix)
            ranks = world_size() if term.couples_rows else 1  # each rank has computed the complete loss
            value = value + share * (loss.value / ranks)
            for name, part in loss.parts.items():
                parts[name] = parts.get(name, 0.0) + share * (part / ranks)
        return LossParts(parts, value)

    def _comparisons(
        self, term: Loss, student: Similarities | None, targets: Targets, clean: Similarities | None = None
    ) -> Iterator[tuple[str, float, Comparison]]:
        """The comparisons of a term: key of the denominators, share in the term, and the student's matrix with a
        teacher's, or with that of its own clean images."""
        if term.clean and student is not None:
            student = clean or student
        for dimensions in term.dims or (None,):
            for key, share, comparison in self._of_dimensions(term, dimensions, student, targets, clean):
                yield key if dimensions is None else f"{key}/{dimensions}", share / len(term.dims or "1"), comparison

    def _of_dimensions(
        self,
        term: Loss,
        dimensions: int | None,
        student: Similarities | None,
        targets: Targets,
        clean: Similarities | None,
    ) -> Iterator[tuple[str, float, Comparison]]:
        """The comparisons of the first dimensions of the student's features; None: of all."""
        of_clean = clean.narrowed(dimensions).over(term.over) if clean and term.is_two_sided else []
        teachers = self._teachers(term, targets, dimensions) if term.needs_teacher else [(of_clean, 1.0)]
        mixed = term.needs_teacher and self._mixes(term)
        for number, (matrices, share) in enumerate(teachers):
            whole: Callable[[Any], Any] = WholeBatch if term.couples_rows else lambda matrix: matrix
            own = student.towards(number) if student and term.needs_equal_widths else student
            ours = [whole(matrix) for matrix in own.narrowed(dimensions).over(term.over)] if own else []
            theirs = [whole(matrix) for matrix in matrices]
            directions = max(len(ours), len(theirs), int(term.is_two_sided))
            for direction in range(directions):
                comparison = Comparison(
                    student=ours[direction] if ours else None,
                    teacher=theirs[direction] if theirs else None,
                    target_B=self._target_columns(term, targets),
                    row_ids_B=targets.caption_ids_B if term.needs_caption_ids else None,
                    column_ids_C=targets.all_caption_ids if term.needs_caption_ids else None,
                    class_prior=self.priors.get(term, number),
                    class_counts_C=self._class_counts_C if term.needs_class_counts else None,
                    implementation="plain" if mixed else self.implementation,
                )
                yield f"{term.term_name}/{number}/{direction}", share / directions, comparison

    def _mixes(self, term: Loss) -> bool:
        """Whether a term compares with one mixture of the teachers."""
        return self._mix_teachers and term.needs_logits and not term.needs_equal_widths

    def _teachers(
        self, term: Loss, targets: Targets, dimensions: int | None = None
    ) -> list[tuple[Sequence[Any], float]]:
        """The matrices that a term compares with, and their share in it: of each teacher, or of their mixture; for
        terms on features, of their first dimensions."""
        of_features = dimensions if term.needs_equal_widths else None
        of_each = [teacher.narrowed(of_features).over(term.over) for teacher in targets.teachers]
        if self._mixes(term):
            return [([MixedMatrix(each, self.teacher_shares) for each in zip(*of_each, strict=True)], 1.0)]
        return list(zip(of_each, self.teacher_shares, strict=True))

    def _target_columns(self, term: Loss, targets: Targets) -> Tensor | None:
        """Column of each row's class or, over captions, of its matching pair in the matrix over all ranks."""
        if term.over != "captions":
            return targets.labels_B
        assert targets.caption_ids_B is not None
        rows = len(targets.caption_ids_B)
        return torch.arange(rows, device=targets.caption_ids_B.device) + rank() * rows
