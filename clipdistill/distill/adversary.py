"""Training on attacked images: the student sees images moved to where its objective is worst, the teachers clean ones.

    batch, targets of the clean images ─ noise of (seed, epoch, key) ─ pgd against a term ─> pixels for the student

The teachers' answers to clean images are the target, so a teacher cache serves. A two-sided term compares with the
student's own clean images instead. Sources: GKL-AT (Cui et al., arXiv 2503.08038); KL as in TRADES (Zhang et al., arXiv
1901.08573) and AGFT; features as in FARE (Schlarmann et al., arXiv 2402.12336).

Shapes: B images, C channels, H height, W width, P = C * H * W values of an image.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from clipdistill.attacks import Norm, pgd
from clipdistill.data import Batch
from clipdistill.distill.objective import Denominators, Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.student_texts import StudentTexts
from clipdistill.distill.targets import Targets
from clipdistill.losses import Loss
from clipdistill.models.towers import Student
from clipdistill.settings import Count, NonNegative, Positive, Radius, Settings, check_radius


class AdversarialSettings(Settings):
    """How the student's images are attacked during training."""

    norm: Norm = "linf"
    """Norm of the ball: linf (each value of the pixels), l2 (the image)."""
    eps: Radius = 4 / 255
    """Radius of the ball, in units of pixels from 0 to 1 at the student's input size; also as a quotient: 4/255."""
    steps: Count = 2
    """Steps of projected gradient ascent; each costs a forward and a backward pass of the student's image tower."""
    step: Radius | None = None
    """Length of a step; empty: 2.5 eps / steps, but at most eps."""
    start: Literal["uniform", "normal", "clean"] = "uniform"
    """First iterate. uniform: noise of the ball's size; normal: noise of 0.001, as in GKL's published code; clean: the
    image."""
    against: str = ""
    """Name of the term that is maximised (``LOSS_OVER``, or its ``name``); empty: all terms over prompts or images."""
    warmup_epochs: NonNegative = 0.0
    """Epochs over which eps, and with it the step, rises linearly."""
    weight_radius: Positive | None = None
    """Adversarial weight perturbation (AWP): how far each weight tensor moves, relative to its norm, for a step's
    gradients (0.005 in GKL-AT); empty: not at all. It doubles the forward and backward passes."""
    weight_from_epoch: NonNegative | None = None
    """Epoch from which the weights move; empty: the first."""

    @field_validator("weight_from_epoch")
    @classmethod
    def _has_weights_to_move(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("weight_radius") is None:
            raise ValueError("empty, or a number with weight_radius")
        return value

    _fits_into_pixels = field_validator("eps")(check_radius)

    @property
    def step_size(self) -> float:
        """Length of a step at the full radius."""
        return min(self.eps, 2.5 * self.eps / self.steps) if self.step is None else self.step


class Adversary:
    """Attacks the images of a micro-batch; the hook ``perturb`` of a distillation step.

    Args:
        settings: of the attack.
        student: attacked in evaluation mode and without the wrapper that synchronises gradients.
        objective: its terms.
        texts: the student's class prompts.
        seed: of the run.
        warmup_steps: optimizer steps over which the radius rises.
        autocast: context of the student's forward passes.
    """

    def __init__(
        self,
        settings: AdversarialSettings,
        *,
        student: Student,
        objective: Objective,
        texts: StudentTexts,
        seed: int,
        warmup_steps: int = 0,
        autocast: Any,
    ) -> None:
        self._settings = settings
        self._student = student
        self._objective = objective
        self._texts = texts
        self._seed = seed
        self._warmup_steps = warmup_steps
        self._autocast = autocast
        self._terms = [term for term in objective.terms if attackable(term, settings.against)]
        self._prompts: tuple[int, Tensor | None] = (-1, None)

    def __call__(self, batch: Batch, targets: Targets, denominators: Denominators, step: int) -> Tensor:
        """Attacked pixels, float32 in [0, 1] at the student's input size.

        Args:
            batch: on the device.
            targets: of its clean images.
            denominators: of the step: with them, an attack is that of the whole batch on one process.
            step: from 0.
        """
        settings = self._settings
        share = min(1.0, (step + 1) / self._warmup_steps) if self._warmup_steps else 1.0
        pixels_BCHW = self._student.pixels.resize(batch.image_BCHW)
        training = self._student.training
        self._student.eval()
        try:
            prompts_CD = self._encode_prompts(step)
            clean = None
            if any(term.is_two_sided for term in self._terms):
                with torch.no_grad(), self._autocast():
                    outputs = self._student(pixels_BCHW)._replace(prompts_CD=prompts_CD)
                clean = Similarities(self._texts.complete(outputs, targets))

            def objective(images_BCHW: Tensor) -> Tensor:
                with self._autocast():
                    outputs = self._student(images_BCHW)
                outputs = outputs._replace(prompts_CD=prompts_CD)
                student = Similarities(self._texts.complete(outputs, targets))
                return self._objective.total_of(self._terms, student, targets, denominators, step, clean)

            return pgd(
                objective,
                pixels_BCHW,
                epsilon=share * settings.eps,
                step_size=share * settings.step_size,
                steps=settings.steps,
                start=self._start(batch, pixels_BCHW, share * settings.eps),
                norm=settings.norm,
            )
        finally:
            self._student.train(training)

    def _start(self, batch: Batch, pixels_BCHW: Tensor, radius: float) -> Tensor:
        kind = self._settings.start
        if kind == "clean":
            return pixels_BCHW
        seeds = [_seed_of(self._seed, batch.epoch, key) for key in batch.keys]
        noise_BP = hashed_uniform(torch.tensor(seeds, device=pixels_BCHW.device), pixels_BCHW[0].numel())
        if kind == "normal":
            return pixels_BCHW + 0.001 * _normal(noise_BP).view_as(pixels_BCHW)
        if self._settings.norm == "l2":
            radius *= math.sqrt(3 / noise_BP.shape[1])  # a length of about the radius
        return pixels_BCHW + radius * (2 * noise_BP - 1).view_as(pixels_BCHW)

    @torch.no_grad()
    def _encode_prompts(self, step: int) -> Tensor | None:
        """Class embeddings of a trained text tower, once a step; None if they are fixed."""
        if self._prompts[0] != step:
            inputs: Mapping[str, Any] = self._texts.prompt_inputs(step)
            with self._autocast():
                self._prompts = (step, self._student(**inputs).prompts_CD if inputs else None)
        return self._prompts[1]


def attackable(term: Loss, against: str) -> bool:
    """Whether an attack can maximise a term: its value belongs to one image each, and it is the one that is named."""
    seen = term.over in ("prompts", "images") and term.separable and not term.clean
    return seen and against in ("", term.term_name)


def hashed_uniform(seeds_B: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, count): a hash of seed and position, the same on every device.

    The finaliser of SplitMix64 (Steele et al. 2014, Fast splittable pseudorandom number generators).

    Args:
        seeds_B: int64.
        count: numbers for each seed.
    """
    position_P = torch.arange(1, count + 1, device=seeds_B.device)
    z_BP = seeds_B[:, None] + position_P * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z_BP = (z_BP ^ _right(z_BP, shift)) * _signed(factor)
    z_BP = z_BP ^ _right(z_BP, 31)
    return _right(z_BP, 64 - _MANTISSA).float() / 2**_MANTISSA


_MANTISSA = 24
"""Bits of a float32 in [0, 1)."""


def _signed(number: int) -> int:
    """A 64-bit pattern as the signed number that torch takes."""
    return number - 2**64 if number >= 2**63 else number


def _right(bits: Tensor, shift: int) -> Tensor:
    """Shift 64-bit patterns to the right, and fill with zeros."""
    return (bits >> shift) & (2 ** (64 - shift) - 1)


def _normal(uniform: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones in [0, 1)."""
    return math.sqrt(2) * torch.erfinv(2 * (uniform + 2.0 ** -(_MANTISSA + 1)) - 1)


def _seed_of(seed: int, epoch: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
