"""Zero-shot accuracy under attack: white-box attacks on the pixels that a model sees, in a ball around each image.

    pixels in [0, 1] at the model's input size ─> its normalisation, image tower, class embeddings ─> logits

``apgd``: APGD on the cross-entropy, then targeted APGD on the difference of logits ratio towards each of the nine
likeliest other classes, 100 steps each (Croce & Hein 2020, arXiv 2003.01690). ``pgd``: 20 steps of eps / 4 on the
cross-entropy from a random start. An image counts as robust if no attack of any smaller or equal radius changes its
class.

Shapes: B images of a batch, b of them, n images in all, C classes, T targets, H and W pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdistill.attacks import Norm, apgd, pgd
from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.classification import Metrics, share_of_teacher
from clipdistill.evaluation.encoding import encode_classes, encode_pixels, evaluation_transform
from clipdistill.evaluation.ranks import on_all_ranks
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, UnreadableImageError
from clipdistill.evaluation.settings import AttackedEvaluation
from clipdistill.io.machine import cores_per_process
from clipdistill.models.class_embeddings import similarity_logits
from clipdistill.models.towers import Tower

if TYPE_CHECKING:
    from clipdistill.evaluation.evaluate import Details, Evaluator

Attack = Literal["apgd", "pgd"]

ROBUST = "/robust_acc1"
"""End of the name, in a run's metrics, of the accuracy under attack."""

DEFAULT_RADII = (Fraction(1, 255), Fraction(2, 255), Fraction(4, 255))

_APGD_STEPS = 100
_TARGETS = 9
_LEAST_CLASSES = 4
"""The targeted difference of logits ratio looks at the four largest logits."""
_PGD_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """How a model is attacked.

    Attributes:
        attack: apgd or pgd.
        norm: of the ball.
        radii: in units of pixels from 0 to 1, rising.
        images: number of images, drawn from the set; all if it has no more.
        seed: of the draw and of random starts.
    """

    attack: Attack
    norm: Norm
    radii: tuple[Fraction, ...]
    images: int
    seed: int

    @classmethod
    def of(cls, settings: AttackedEvaluation) -> "AttackSettings":
        """The attack of a run's evaluation."""
        near = Fraction(settings.eps).limit_denominator(1_000_000)
        radius = near if float(near) == settings.eps else Fraction(settings.eps)
        return cls(
            attack=settings.attack, norm=settings.norm, radii=(radius,), images=settings.images, seed=settings.seed
        )

    def described(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"radii": [shown_radius(radius) for radius in self.radii]}


def shown_radius(radius: Fraction) -> str:
    """A radius as the field writes it: in 255ths where it is a multiple of one."""
    levels = radius * 255
    return f"{levels.numerator}/255" if levels.denominator == 1 else f"{float(radius):g}"


def accuracy_under_attack(
    evaluator: "Evaluator", data: EvaluationSet, settings: AttackSettings, teacher: "Evaluator | None" = None
) -> tuple[Metrics, "Details"]:
    """Accuracy on images drawn from a set, clean and under attack; every rank calls this.

    Args:
        evaluator: of the model.
        data: a classification set.
        settings: of the attack.
        teacher: evaluator of its teacher, which is attacked by itself.

    Returns:
        ``acc1`` of these images, ``robust_acc1@RADIUS`` for each radius, and ``robust_acc1`` at the largest; with a
        teacher also its value and the model's share of it. Details: recall of each class, clean and robust.

    Raises:
        InputError: a set of another kind, or a model that gives no gradient to its pixels.
    """
    if data.kind != "classification":
        raise InputError(f"data {data.name}: a {data.kind} set; allowed for --attack: a classification set")
    hits = _hits(evaluator, data, settings)
    metrics = hits.metrics()
    if teacher is not None:
        of_teacher = _hits(teacher, data, settings).metrics()["robust_acc1"]
        metrics |= share_of_teacher("robust_acc1", metrics["robust_acc1"], of_teacher)
    return metrics, {"samples": len(hits.labels_n), "attack": settings.described(), "classes": hits.classes(data)}


def robust_hits(evaluator: "Evaluator", data: EvaluationSet, settings: AttackSettings) -> Tensor:
    """Which of the drawn images stay classified correctly at the largest radius (n,); every rank calls this.

    Raises:
        InputError: as `accuracy_under_attack`.
    """
    return next(reversed(_hits(evaluator, data, settings).robust.values()))


@dataclass(frozen=True, kw_only=True)
class _Hits:
    """Which images are classified correctly: clean, and at each radius under attack."""

    labels_n: Tensor
    clean_n: Tensor
    robust: dict[str, Tensor]
    unreadable: int

    def metrics(self) -> Metrics:
        found: Metrics = {"acc1": _share(self.clean_n)}
        found |= {f"robust_acc1@{radius}": _share(robust_n) for radius, robust_n in self.robust.items()}
        found["robust_acc1"] = _share(next(reversed(self.robust.values())))
        found["unreadable"] = self.unreadable
        return found

    def classes(self, data: EvaluationSet) -> list[dict[str, Any]]:
        rows = []
        for label in self.labels_n.unique().tolist():
            of_class_n = self.labels_n == label
            row = {"name": data.prompts.classnames[label], "samples": int(of_class_n.sum())}
            row["recall"] = _share(self.clean_n[of_class_n])
            row["robust_recall"] = {radius: _share(hits_n[of_class_n]) for radius, hits_n in self.robust.items()}
            rows.append(row)
        return rows


def _share(hits_n: Tensor) -> float:
    return float(hits_n.double().mean())


def _hits(evaluator: "Evaluator", data: EvaluationSet, settings: AttackSettings) -> _Hits:
    bank_CD = encode_classes(evaluator.tower, data.prompts, cache=evaluator.cache, device=evaluator.device)
    positions = torch.randperm(len(data), generator=torch.Generator().manual_seed(settings.seed))
    chosen = positions[: settings.images].sort().values.tolist()
    batches = [chosen[at : at + evaluator.batch_size] for at in range(0, len(chosen), evaluator.batch_size)]
    model = PixelClassifier(evaluator.tower, bank_CD).to(evaluator.device)
    training = evaluator.tower.training

    def attack_share() -> list[tuple[int, Tensor]]:
        found, done = [], 0
        for number in range(rank(), len(batches), world_size()):
            pixels_BCHW, readable_B, labels_B = _load(evaluator, data, batches[number])
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed * 1_000_003 + number)  # the same attack with any number of ranks
                hits = attack_batch(model, pixels_BCHW, labels_B, settings)
            hits = hits & readable_B.to(hits.device)
            found.append((number, torch.cat([labels_B[None].cpu(), readable_B[None].long(), hits.long().cpu()])))
            done += len(batches[number])
            if evaluator.progress is not None:
                evaluator.progress(f"{data.name} (attack)", -(-len(chosen) // world_size()), done)
        return found

    evaluator.tower.eval()
    try:
        parts = sorted((part for share in on_all_ranks(attack_share) for part in share), key=lambda part: part[0])
    finally:
        evaluator.tower.train(training)
    labels_n, readable_n, clean_n, *robust = torch.cat([part for _, part in parts], dim=1)
    names = [shown_radius(radius) for radius in settings.radii]
    return _Hits(
        labels_n=labels_n,
        clean_n=clean_n.bool(),
        robust={name: hits_n.bool() for name, hits_n in zip(names, robust, strict=True)},
        unreadable=int((readable_n == 0).sum()),
    )


class PixelClassifier(nn.Module):
    """A model's zero-shot logits from pixels in [0, 1] at its input size, with their gradient.

    Args:
        tower: the model.
        bank_CD: its class embeddings.
    """

    def __init__(self, tower: Tower, bank_CD: Tensor) -> None:
        super().__init__()
        self._tower = tower
        self.register_buffer("_bank_CD", bank_CD, persistent=False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits (B, C), float32."""
        tower = self._tower
        image_BD = encode_pixels(tower, tower.pixels(pixels_BCHW))
        bank_CD: Tensor = self._bank_CD  # type: ignore[assignment]
        return similarity_logits(image_BD, bank_CD, tower.clip.logit_scale.detach().exp(), tower.logit_bias())


def attack_batch(model: nn.Module, pixels_BCHW: Tensor, labels_B: Tensor, settings: AttackSettings) -> Tensor:
    """Which images are classified correctly, clean and at each radius under attack: (1 + radii, B), bool.

    Args:
        model: from pixels in [0, 1] to logits.
        pixels_BCHW: the images.
        labels_B: their classes.
        settings: of the attack.

    Raises:
        InputError: the model gives no gradient to its pixels.
    """
    _check_gradient(model, pixels_BCHW, labels_B)
    with torch.no_grad():
        robust_B = model(pixels_BCHW).argmax(1) == labels_B
    rows = [robust_B]
    for radius in settings.radii:
        robust_B = robust_B.clone()
        for attacked_bCHW in _attacks(model, pixels_BCHW, labels_B, robust_B, float(radius), settings):
            left = robust_B.nonzero().squeeze(1)
            with torch.no_grad():
                robust_B[left] = model(attacked_bCHW).argmax(1) == labels_B[left]
        rows.append(robust_B)
    return torch.stack(rows)


def _attacks(
    model: nn.Module,
    pixels_BCHW: Tensor,
    labels_B: Tensor,
    robust_B: Tensor,
    radius: float,
    settings: AttackSettings,
) -> Iterator[Tensor]:
    """Attacked versions of the images that are still robust, by attack after attack; the caller updates which are."""
    norm = settings.norm
    if settings.attack == "pgd":
        images, labels = pixels_BCHW[robust_B], labels_B[robust_B]
        if len(images):
            yield pgd(
                lambda attacked: F.cross_entropy(model(attacked), labels, reduction="sum"),
                images,
                epsilon=radius,
                step_size=radius / 4,
                steps=_PGD_STEPS,
                start=images + radius * (2 * torch.rand_like(images) - 1),
                norm=norm,
            )
        return
    if robust_B.any():
        yield apgd(model, pixels_BCHW[robust_B], labels_B[robust_B], epsilon=radius, steps=_APGD_STEPS, norm=norm)
    with torch.no_grad():
        logits_BC = model(pixels_BCHW).scatter(1, labels_B[:, None], -torch.inf)
    classes = logits_BC.shape[1]
    targets_BT = logits_BC.topk(min(_TARGETS, classes - 1), dim=1).indices
    for targets_B in targets_BT.unbind(1) if classes >= _LEAST_CLASSES else ():
        if robust_B.any():
            yield apgd(
                model,
                pixels_BCHW[robust_B],
                labels_B[robust_B],
                targets=targets_B[robust_B],
                epsilon=radius,
                steps=_APGD_STEPS,
                loss="dlr",
                norm=norm,
            )


def _check_gradient(model: nn.Module, pixels_BCHW: Tensor, labels_B: Tensor) -> None:
    watched = pixels_BCHW.detach().requires_grad_()
    with torch.enable_grad():
        own = model(watched).gather(1, labels_B[:, None]).sum()  # a cross-entropy's may be 0 where the model is certain
    gradient = torch.autograd.grad(own, watched, allow_unused=True)[0] if own.requires_grad else None
    if gradient is None or not gradient.any():
        raise InputError("--attack: the model gives no gradient to its pixels; allowed: a model of torch modules")


def _load(evaluator: "Evaluator", data: EvaluationSet, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in [0, 1] at the model's input size, whether each image could be read (else it is black), and labels."""
    tower, device = evaluator.tower, evaluator.device
    transform = evaluation_transform(tower)
    samples = [next(data.samples(range(at, at + 1))) for at in positions]

    def decode(sample: EncodedSample) -> Tensor | None:
        try:
            return transform(sample.decode()[0])
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(max_workers=evaluator.workers or cores_per_process()) as pool:
        decoded = list(pool.map(decode, samples))
    readable_B = torch.tensor([each is not None for each in decoded])
    black = torch.zeros(3, *tower.image_size)
    normalised_BCHW = torch.stack([black if each is None else each for each in decoded]).to(device)
    pixels_BCHW = (normalised_BCHW * tower.pixels.std + tower.pixels.mean).clamp(0, 1)
    return pixels_BCHW, readable_B, torch.tensor([sample.label for sample in samples], device=device)
