"""Several teachers as one, whose probabilities are the mean of theirs: against the mean written out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.config import load_config
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Targets
from clipdistill.io.jsonl import read_jsonl
from clipdistill.losses import DIST, DKD, GKL, KL, Feature, Loss, dist_loss, dkd_loss, feature_loss, gkl_loss, kd_loss
from clipdistill.models.outputs import ModelOutputs
from clipdistill.training.trainer import train

SCALES, SHARES = (40.0, 15.0, 25.0), (0.5, 0.3, 0.2)
LABELS = torch.tensor([0, 2, 1, 3, 3, 0])


def outputs(scale: float, seed: int) -> ModelOutputs:
    """Of 6 images, their captions and 4 prompts."""
    generator = torch.Generator().manual_seed(seed)
    image, captions, prompts = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (6, 6, 4))
    return ModelOutputs(image, captions, prompts, scale, -2.0 if seed == 1 else None)


TEACHERS = [outputs(scale, seed) for seed, scale in enumerate(SCALES)]
STUDENT = outputs(20.0, 9)


def mixed(rows: str, columns: str) -> Tensor:
    """Log of the mean probabilities."""
    probabilities = [
        share * torch.softmax(teacher.scale * getattr(teacher, rows) @ getattr(teacher, columns).T, 1)
        for teacher, share in zip(TEACHERS, SHARES, strict=True)
    ]
    return torch.stack(probabilities).sum(0).log()


OVER = {
    "prompts": [("image_BD", "prompts_CD")],
    "captions": [("image_BD", "captions_BD"), ("captions_BD", "image_BD")],
    "images": [("image_BD", "image_BD")],
}
TERMS: list[tuple[Loss, Callable[[Tensor, Tensor], Tensor]]] = [
    (KL(temperature=2.0), lambda s, t: kd_loss(s, t, temperature=2.0)),
    (KL(over="captions"), lambda s, t: kd_loss(s, t, temperature=1.0)),
    (GKL(gamma=0.4, beta=0.3), lambda s, t: gkl_loss(s, t, gamma=0.4, beta=0.3).loss),
    (
        DKD(beta=8.0, alpha=1.0, temperature=1.0),
        lambda s, t: dkd_loss(s, t, LABELS, alpha=1.0, beta=8.0, temperature=1.0),
    ),
    (DIST(over="captions"), lambda s, t: dist_loss(s, t, beta=1.0, gamma=1.0)),
]


@pytest.mark.parametrize(("term", "loss"), TERMS, ids=[f"{term.loss}-{term.over}" for term, _ in TERMS])
@pytest.mark.parametrize("implementation", ["auto", "tiled"])
def test_terms_on_logits_compare_with_the_mixture(
    term: Loss, loss: Callable[[Tensor, Tensor], Tensor], implementation: str
) -> None:
    settings = {"teacher_weights": [5, 3, 2], "num_classes": 4, "implementation": implementation}
    objective = Objective([term], mix_teachers=True, **settings)
    targets = Targets(
        teachers=[Similarities(each) for each in TEACHERS], labels_B=LABELS, caption_ids_B=torch.arange(6)
    )
    student = Similarities(STUDENT)
    found = objective.losses(student, targets, objective.denominators([targets], 6))[term.term_name].value
    expected = [
        loss(STUDENT.scale * getattr(STUDENT, rows) @ getattr(STUDENT, columns).T, mixed(rows, columns))
        for rows, columns in OVER[term.over]
    ]
    torch.testing.assert_close(found, sum(expected) / len(expected), rtol=1e-5, atol=1e-6)


def test_features_stay_those_of_each_teacher() -> None:
    objective = Objective([Feature()], teacher_weights=SHARES, mix_teachers=True)
    targets = Targets(teachers=[Similarities(each) for each in TEACHERS])
    losses = objective.losses(Similarities(STUDENT), targets, objective.denominators([targets], 6))
    expected = sum(
        share * feature_loss(STUDENT.image_BD, teacher.image_BD)
        for teacher, share in zip(TEACHERS, SHARES, strict=True)
    )
    torch.testing.assert_close(losses["feature_images"].value, expected, rtol=1e-5, atol=1e-6)


def test_the_class_prior_is_the_mixtures() -> None:
    """After an epoch, the prior of a class is the mean mixture of its samples; the term uses it."""
    term = GKL(class_prior=True, gamma=0.7, beta=0.3)
    objective = Objective([term], teacher_weights=SHARES, mix_teachers=True, num_classes=4)
    targets = Targets(teachers=[Similarities(each) for each in TEACHERS], labels_B=LABELS)
    objective.observe(targets)
    objective.priors.end_epoch()
    mean_BC = mixed("image_BD", "prompts_CD").exp()
    prior_CC = torch.stack([mean_BC[label == LABELS].mean(0) for label in range(4)])
    found = objective.losses(Similarities(STUDENT), targets, objective.denominators([targets], 6))
    logits_BC = STUDENT.scale * STUDENT.image_BD @ STUDENT.prompts_CD.T
    expected = gkl_loss(logits_BC, mean_BC.log(), gamma=0.7, beta=0.3, class_prior=prior_CC, labels=LABELS).loss
    torch.testing.assert_close(found["gkl_prompts"].value, expected, rtol=1e-5, atol=1e-6)


def test_a_run_with_one_teacher_twice_is_a_run_with_it(
    write_config: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    one = {"model": f"local-dir:{teacher_folder}"}
    objective = [{"loss": "gkl", "gamma": 0.5}, {"loss": "kl", "over": "captions"}]
    runs = {"once": {"teachers": [one]}, "twice": {"teachers": [one, one], "teacher_ensemble": "probabilities"}}
    losses = []
    for name, changes in runs.items():
        config = load_config(write_config(objective=objective, **changes), [f"output={tmp_path / name}"])
        train(config)
        losses.append([record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
