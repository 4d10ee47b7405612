"""The weighted sum of terms that a config asks for, normalised over the whole global batch, and the class prior.

Every rank adds its share: numerators over the rows it owns, divided by denominators summed over all ranks and
micro-batches. The ranks' losses therefore add up to the loss of one process with the whole batch.

Shapes: N ranks, B rows of this rank, C classes, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.distributed.collectives import gather_rows, rank, sum_over_ranks, widest_float, world_size
from clipdistill.losses import (
    FeatureKind,
    GKLDenominators,
    Implementation,
    contrastive_sums,
    dist_loss,
    dkd_sums,
    feature_sums,
    fused_wins,
    gkl_denominator,
    gkl_denominators_from_features,
    gkl_loss_from_features,
    gkl_sums,
    kd_sums,
    kd_sums_from_features,
    positive_targets,
)
from clipdistill.models.class_embeddings import similarity_logits

Loss = TypeVar("Loss")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One weighted loss over one kind of logits or features; see ``config.TermConfig`` for the settings."""

    name: str
    loss: str
    over: str
    weight: float = 1.0
    warmup_steps: int = 0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    temperature: float = 1.0
    weight_temperature: float = 1.0
    class_prior: bool = False
    kind: FeatureKind = "cosine"

    @property
    def separable(self) -> bool:
        """Whether the rows of a batch may be computed apart and added up."""
        return self.loss == "feature" or (self.over == "prompts" and self.loss != "dist")

    def weight_at(self, step: int) -> float:
        """The weight during optimizer step ``step`` (from 0): linear from 0 over the warm-up, then constant."""
        return self.weight if step >= self.warmup_steps else self.weight * step / self.warmup_steps


@dataclass(frozen=True, kw_only=True)
class Features:
    """What one model says of a batch; unit-norm float32 features.

    Attributes:
        image_BD: image features.
        prompts_CD: class text features.
        captions_BD: caption text features.
        scale: multiplier of the cosines.
        bias: additive bias of a sigmoid-trained model.
    """

    image_BD: Tensor
    scale: Tensor | float
    prompts_CD: Tensor | None = None
    captions_BD: Tensor | None = None
    bias: Tensor | float | None = None

    @cached_property
    def prompt_logits(self) -> Tensor:
        """Logits over the class prompts."""
        assert self.prompts_CD is not None
        return similarity_logits(self.image_BD, self.prompts_CD, self.scale, self.bias)

    @cached_property
    def caption_logits(self) -> tuple[Tensor, Tensor]:
        """This rank's rows of the in-batch matrix, (B, N * B): image over texts, and text over images."""
        image_over_text, text_over_image = self.caption_sides
        return (
            similarity_logits(*image_over_text, self.scale, self.bias),
            similarity_logits(*text_over_image, self.scale, self.bias),
        )

    @cached_property
    def caption_sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows (B, D) and columns (N * B, D) of the two ``caption_logits``."""
        assert self.captions_BD is not None
        return (self.image_BD, gather_rows(self.captions_BD)), (self.captions_BD, gather_rows(self.image_BD))

    def sides(self, over: str) -> list[tuple[Tensor, Tensor]]:
        """Rows and columns of the matrices that a term compares: one over prompts, one each way over captions."""
        if over == "captions":
            return list(self.caption_sides)
        assert self.prompts_CD is not None
        return [(self.image_BD, self.prompts_CD)]

    def logits(self, over: str) -> list[Tensor]:
        """The matrices themselves."""
        return [self.prompt_logits] if over == "prompts" else list(self.caption_logits)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What the student learns from in one micro-batch: the teachers' features, labels, identity of the captions."""

    teachers: Sequence[Features] = ()
    labels_B: Tensor | None = None
    caption_ids_B: Tensor | None = None


@dataclass(frozen=True)
class TermLoss:
    """This rank's share of a term, unweighted.

    Attributes:
        parts: 0-d, by name.
        value: their sum, 0-d; to differentiate it costs less than to differentiate the parts.
    """

    parts: Mapping[str, Tensor]
    value: Tensor


@dataclass
class ClassPrior:
    """Mean prediction of a teacher for each class: uniform at first, replaced at the end of each epoch (GKL.md; Cui
    et al., arXiv 2503.08038, class-wise global information).

    Attributes:
        prior_CC: the rows in use, each summing to 1.
        sum_CC: sum of this rank's predictions in the epoch under way.
        count_C: samples behind it.
    """

    prior_CC: Tensor
    sum_CC: Tensor
    count_C: Tensor

    @classmethod
    def uniform(cls, classes: int, device: torch.device | str) -> "ClassPrior":
        """The prior before the first epoch: 1/C everywhere."""
        return cls(
            torch.full((classes, classes), 1 / classes, device=device),
            torch.zeros(classes, classes, device=device),
            torch.zeros(classes, device=device),
        )

    def add(self, probability_BC: Tensor, labels_B: Tensor) -> None:
        """Take in a batch of this rank."""
        self.sum_CC.index_add_(0, labels_B, probability_BC.float())
        self.count_C.index_add_(0, labels_B, torch.ones_like(labels_B, dtype=self.count_C.dtype))

    def end_epoch(self) -> None:
        """Use the epoch's means from now on, summed over ranks; a class without samples keeps its row."""
        total_CC, count_C1 = sum_over_ranks(self.sum_CC), sum_over_ranks(self.count_C)[:, None]
        self.prior_CC = torch.where(count_C1 > 0, total_CC / count_C1.clamp(min=1), self.prior_CC)
        self.sum_CC.zero_()
        self.count_C.zero_()


@dataclass
class Objective:
    """The terms, the teachers' shares, and the class priors.

    Args:
        terms: those of weight above 0; others cost nothing because they are not here.
        teacher_weights: share of each teacher, normalised to sum to 1.
        num_classes: C, for the class priors.
        device: where the priors live.
        implementation: of gkl and kl: ``plain`` by way of the matrices of logits; ``tiled`` and ``triton`` straight
            from the features, without them; ``auto`` whichever is faster for each matrix (``fused_wins``).
    """

    terms: Sequence[Term]
    teacher_weights: Sequence[float] = ()
    num_classes: int = 0
    device: torch.device | str = "cpu"
    implementation: Implementation = "auto"
    priors: dict[str, ClassPrior] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(self.teacher_weights)
        self.teacher_weights = [weight / total for weight in self.teacher_weights]
        for term in self.terms:
            if term.class_prior:
                for teacher in range(len(self.teacher_weights)):
                    prior = ClassPrior.uniform(self.num_classes, self.device)
                    self.priors[f"{term.name}/{teacher}"] = prior

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
        return any(term.loss != "feature" for term in self.terms)

    @property
    def needs_teacher_captions(self) -> bool:
        """Whether a term compares captions with a teacher's."""
        return any(term.over == "captions" and term.loss != "clip" for term in self.terms)

    @property
    def needs_teachers(self) -> bool:
        """Whether a term compares with a teacher."""
        return any(term.loss != "clip" for term in self.terms)

    @property
    def separable(self) -> bool:
        """Whether micro-batches may be computed apart, given the denominators."""
        return all(term.separable for term in self.terms)

    def observe(self, targets: Targets) -> None:
        """Take a micro-batch's teacher predictions into the class priors of the next epoch."""
        for term in self.terms:
            if term.class_prior:
                assert targets.labels_B is not None
                for number, teacher in enumerate(targets.teachers):
                    probability_BC = (teacher.prompt_logits / term.weight_temperature).softmax(dim=-1)
                    self.priors[f"{term.name}/{number}"].add(probability_BC, targets.labels_B)

    def end_epoch(self) -> None:
        """Renew the class priors."""
        for prior in self.priors.values():
            prior.end_epoch()

    @torch.no_grad()
    def denominators(self, batches: Sequence[Targets], rows: int) -> dict[str, Tensor]:
        """Denominator of every sum, over all ranks and the given micro-batches of this rank.

        Args:
            batches: the targets of the optimizer step's micro-batches, or of their concatenation.
            rows: samples of this rank in all of them.
        """
        device = torch.device(self.device)
        local = {"rows": torch.tensor(float(rows), device=device)}
        for term in self.terms:
            if term.loss != "gkl":
                continue
            for number in range(len(self.teacher_weights)):
                for targets in batches:
                    for direction, part in enumerate(self._gkl_denominators(term, number, targets)):
                        key = f"{term.name}/{number}/{direction}"
                        local[key] = local.get(key, torch.zeros_like(part)) + part
        packed = sum_over_ranks(torch.stack([value.to(widest_float(device)) for value in local.values()]))
        return dict(zip(local, packed, strict=True))

    def losses(self, student: Features, targets: Targets, denominators: Mapping[str, Tensor]) -> dict[str, TermLoss]:
        """This rank's share of every term of one micro-batch, by the term's name.

        The shares of all ranks and micro-batches add up to the value of the term on the global batch. gkl has two
        parts, ``soft_ce`` and ``wmse``, with alpha and beta applied; every other loss has one.
        """
        return {term.name: self._term(term, student, targets, denominators) for term in self.terms}

    def total(self, losses: Mapping[str, TermLoss], step: int) -> Tensor:
        """The weighted sum at optimizer step ``step``."""
        return torch.stack([term.weight_at(step) * losses[term.name].value for term in self.terms]).sum()

    def _term(self, term: Term, student: Features, targets: Targets, denominators: Mapping[str, Tensor]) -> TermLoss:
        rows = denominators["rows"].to(torch.float32)
        if term.loss == "clip":
            return _single("clip", self._clip(term, student, targets) / rows)
        parts: dict[str, Tensor] = {}
        value = torch.zeros((), device=rows.device)
        for number, teacher in enumerate(targets.teachers):
            losses = [
                self._pair(term, student, teacher, direction, number, targets, denominators, rows)
                for direction in range(2 if term.over == "captions" else 1)
            ]
            share = self.teacher_weights[number] / len(losses)
            for loss in losses:
                value = value + share * loss.value
                for part, of_part in loss.parts.items():
                    parts[part] = parts.get(part, 0.0) + share * of_part
        return TermLoss(parts, value)

    def _pair(
        self,
        term: Term,
        student: Features,
        teacher: Features,
        direction: int,
        number: int,
        targets: Targets,
        denominators: Mapping[str, Tensor],
        rows: Tensor,
    ) -> TermLoss:
        """One student matrix against one teacher's."""
        if term.loss == "feature":
            ours, theirs = ((x.image_BD, x.captions_BD)[direction] for x in (student, teacher))
            assert ours is not None
            assert theirs is not None
            return _single(term.kind, feature_sums(ours, theirs, kind=term.kind).numerator / rows)
        if term.loss == "gkl":
            denominator = denominators[f"{term.name}/{number}/{direction}"]
            return self._gkl(term, student, teacher, direction, number, targets, denominator, rows)
        if term.loss == "kl" and self._fused(term, teacher, direction):
            kl = self._from_features(kd_sums_from_features, term, student, teacher, direction)
            return _single("kl", kl.numerator / rows)
        student_BC, teacher_BC = (features.logits(term.over)[direction] for features in (student, teacher))
        match term.loss:
            case "kl":
                loss = kd_sums(student_BC, teacher_BC, temperature=term.temperature).numerator / rows
            case "dkd":
                labels_B = targets.labels_B if term.over == "prompts" else _own_columns(student_BC)
                assert labels_B is not None
                settings = {"alpha": term.alpha, "beta": term.beta, "temperature": term.temperature}
                loss = dkd_sums(student_BC, teacher_BC, labels_B, **settings).numerator / rows
            case "dist":
                whole = gather_rows(student_BC), gather_rows(teacher_BC)
                loss = dist_loss(*whole, beta=term.beta, gamma=term.gamma) / world_size()
            case _:
                raise AssertionError(term.loss)
        return _single(term.loss, loss)

    def _gkl(
        self,
        term: Term,
        student: Features,
        teacher: Features,
        direction: int,
        number: int,
        targets: Targets,
        denominator: Tensor,
        rows: Tensor,
    ) -> TermLoss:
        weighting = self._weighting(term, number, targets)
        if self._fused(term, teacher, direction):
            out = self._from_features(
                gkl_loss_from_features,
                term,
                student,
                teacher,
                direction,
                alpha=term.alpha,
                beta=term.beta,
                denominators=GKLDenominators(rows, denominator.to(rows.dtype)),
                **weighting,
            )
            return TermLoss({"soft_ce": term.alpha * out.soft_ce, "wmse": term.beta * out.wmse}, out.loss)
        student_BC, teacher_BC = (features.logits(term.over)[direction] for features in (student, teacher))
        sums = gkl_sums(student_BC, teacher_BC, temperature=term.temperature, **weighting)
        soft_ce = term.alpha * sums.soft_ce.numerator / rows
        wmse = term.beta * sums.wmse.numerator / denominator.to(rows.dtype)
        return TermLoss({"soft_ce": soft_ce, "wmse": wmse}, soft_ce + wmse)

    def _gkl_denominators(self, term: Term, number: int, targets: Targets) -> list[Tensor]:
        """Of the wMSE of a micro-batch of this rank, 0-d, for each matrix."""
        teacher, weighting = targets.teachers[number], self._weighting(term, number, targets)
        return [
            gkl_denominators_from_features(
                *sides, teacher_scale=teacher.scale, implementation=self.implementation, **weighting
            ).wmse
            if self._fused(term, teacher, direction)
            else gkl_denominator(teacher.logits(term.over)[direction], **weighting)
            for direction, sides in enumerate(teacher.sides(term.over))
        ]

    def _weighting(self, term: Term, number: int, targets: Targets) -> dict[str, Any]:
        """What the weights of gkl's wMSE come from."""
        weighting: dict[str, Any] = {"gamma": term.gamma, "weight_temperature": term.weight_temperature}
        if term.class_prior:
            weighting |= {"class_prior": self.priors[f"{term.name}/{number}"].prior_CC, "labels": targets.labels_B}
        return weighting

    def _from_features(
        self,
        loss: Callable[..., Loss],
        term: Term,
        student: Features,
        teacher: Features,
        direction: int,
        **settings: Any,
    ) -> Loss:
        """A loss of one student matrix against one teacher's, without these matrices."""
        return loss(
            *student.sides(term.over)[direction],
            *teacher.sides(term.over)[direction],
            student_scale=student.scale,
            teacher_scale=teacher.scale,
            student_bias=student.bias,
            teacher_bias=teacher.bias,
            temperature=term.temperature,
            implementation=self.implementation,
            **settings,
        )

    def _fused(self, term: Term, teacher: Features, direction: int) -> bool:
        """Whether a matrix of logits is not made, but the loss computed from the features."""
        if self.implementation != "auto":
            return self.implementation != "plain"
        rows_BE, columns_CE = teacher.sides(term.over)[direction]
        return fused_wins(len(rows_BE), len(columns_CE), rows_BE.device)

    def _clip(self, term: Term, student: Features, targets: Targets) -> Tensor:
        if term.over == "prompts":
            assert targets.labels_B is not None
            logits_BC = student.prompt_logits
            return contrastive_sums(logits_BC, F.one_hot(targets.labels_B, logits_BC.shape[1]).to(logits_BC)).numerator
        assert targets.caption_ids_B is not None
        target_BN = positive_targets(targets.caption_ids_B, gather_rows(targets.caption_ids_B))
        both = [contrastive_sums(logits_BN, target_BN).numerator for logits_BN in student.caption_logits]
        return (both[0] + both[1]) / 2


def _single(name: str, loss: Tensor) -> TermLoss:
    """Of a term with one part."""
    return TermLoss({name: loss}, loss)


def _own_columns(rows: Tensor) -> Tensor:
    """Column of each local row's own pair in the matrix over all ranks."""
    return torch.arange(len(rows), device=rows.device) + rank() * len(rows)
