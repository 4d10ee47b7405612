"""Class priors: those cut to their largest entries, and the one that a run keeps over its epochs.

Shapes: B rows, C classes, K kept entries.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipdistill.distributed.collectives import sum_over_ranks
from clipdistill.losses import ClassPrior, TopKPrior, gkl_denominator, gkl_loss
from tests.losses import oracles
from tests.losses.inputs import random_logits, random_prior

C = 17
LABELS = torch.arange(12)
STUDENT, TEACHER = random_logits(12, C, seed=1), random_logits(12, C, seed=2)


def dense(prior: Tensor | TopKPrior) -> Tensor:
    return (
        prior if isinstance(prior, Tensor) else oracles.dense_of_top_k(prior.values_CK, prior.indices_CK, prior.rest_C)
    )


def gkl_and_gradients(prior: Tensor | TopKPrior, gamma: float) -> list[Tensor]:
    """loss, soft_ce and wMSE, and the gradients of the first and the last."""
    student = STUDENT.clone().requires_grad_()
    out = gkl_loss(student, TEACHER, gamma=gamma, temperature=2.0, class_prior=prior, labels=LABELS)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (out.loss, out.wmse)]
    return [out.loss, out.soft_ce, out.wmse, *gradients]


# --- the largest entries of a prior


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_all_entries_of_a_prior_are_that_prior_in_the_loss_of_logits(gamma: float) -> None:
    prior = random_prior(C)
    top = TopKPrior.from_dense(prior, C)
    for ours, theirs in zip(gkl_and_gradients(top, gamma), gkl_and_gradients(prior, gamma), strict=True):
        assert torch.equal(ours, theirs)
    of_top, of_dense = (gkl_denominator(TEACHER, gamma=gamma, class_prior=p, labels=LABELS) for p in (top, prior))
    assert torch.equal(of_top, of_dense)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_some_entries_of_a_prior_are_within_the_bound_in_the_loss_of_logits(gamma: float, k: int) -> None:
    prior = random_prior(C)
    top = TopKPrior.from_dense(prior, k)
    found, exact = gkl_and_gradients(top, gamma), gkl_and_gradients(prior, gamma)
    assert torch.equal(found[1], exact[1])

    ours, theirs = (oracles.weights(TEACHER, gamma=gamma, class_prior=p, labels=LABELS) for p in (dense(top), prior))
    rho_B = 1 - prior.topk(k).values.sum(1)[LABELS].clamp(max=1)
    error_B = 2 * (C - k) ** (1 - gamma) * rho_B**gamma
    assert ((ours - theirs).abs().sum(1) <= error_B + 1e-12).all()
    assert (ours.sum(1) >= theirs.sum(1) - 1e-12).all()

    delta_BC = TEACHER - STUDENT
    largest_range = (delta_BC.amax(1) - delta_BC.amin(1)).max()
    off = (found[2] - exact[2]).abs()
    assert off <= 0.75 * largest_range**2 * (error_B / ours.sum(1)).max() + 1e-12
    if gamma == 1:
        assert off <= 1.5 * largest_range**2 * rho_B.max() + 1e-12
    if gamma > 0 and k < C - 1:  # a single entry left is its own mean
        assert off > 1e-6


@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_the_loss_of_logits_spreads_what_is_not_kept(gamma: float, k: int) -> None:
    top = TopKPrior.from_dense(random_prior(C), k)
    student = STUDENT.clone().requires_grad_()
    weight = oracles.weights(TEACHER, gamma=gamma, class_prior=dense(top), labels=LABELS)
    soft_ce, wmse = oracles.soft_ce(student, TEACHER, temperature=2.0), oracles.wmse(student, TEACHER, weight)
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (soft_ce + wmse, wmse)]
    expected = [soft_ce + wmse, soft_ce, wmse, *gradients]
    for ours, theirs in zip(gkl_and_gradients(top, gamma), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


PRIOR, SOME_LABELS = torch.full((6, 6), 1 / 6), torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopKPrior.from_dense(PRIOR[:5], 2), r"prior_CC must be square, got shape \(5, 6\)"),
        (lambda: TopKPrior.from_dense(PRIOR, 7), r"k must be in \[1, 6\], got 7"),
        (lambda: TopKPrior(PRIOR[:2], SOME_LABELS, PRIOR[0]), r"values_CK must have shape \(C, K\) with 0 < K <= C"),
        (
            lambda: TopKPrior(PRIOR, SOME_LABELS, PRIOR[0]),
            r"indices_CK must have values_CK's shape \(6, 6\), got \(4,\)",
        ),
        (lambda: TopKPrior(PRIOR, PRIOR.long(), PRIOR), r"rest_C must have shape \(6,\), got \(6, 6\)"),
        (lambda: TopKPrior(PRIOR, PRIOR, PRIOR[0]), "indices_CK must be integers, got torch.float32"),
        (lambda: TopKPrior(PRIOR, PRIOR.long(), SOME_LABELS.new_zeros(6)), "rest_C must be floating point"),
    ],
)
def test_a_wrong_top_k_prior_is_refused(make: Callable[[], TopKPrior], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- the prior of a run

CLASSES = 5
DENSE = {}
CUT = {"dense_classes": 0, "kept_entries": 3}
each_form = pytest.mark.parametrize("form", [DENSE, CUT], ids=["dense", "cut"])

Batches = list[tuple[Tensor, Tensor]]


def predictions(*labels: list[int], seed: int = 0) -> Batches:
    """Batches of a teacher's predictions (B, C), and labels (B,)."""
    return [
        (
            random_logits(len(of_batch), CLASSES, seed=seed + number, dtype=torch.float32).softmax(1),
            torch.tensor(of_batch),
        )
        for number, of_batch in enumerate(labels)
    ]


EPOCHS = [predictions([0, 3, 3, 1], [1, 3]), predictions([3, 0], [0, 2, 0], seed=10)]
"""Class 1 has no samples in the second epoch, class 2 none in the first, class 4 none at all."""


def run(prior: ClassPrior, epochs: list[Batches]) -> ClassPrior:
    for batches in epochs:
        for probability_BC, labels_B in batches:
            prior.add(probability_BC, labels_B)
        prior.end_epoch(sum_over_ranks)
    return prior


def naive(epochs: list[Batches]) -> Tensor:
    """The prior, sample by sample."""
    rows = [[1 / CLASSES] * CLASSES for _ in range(CLASSES)]
    for batches in epochs:
        of_class: dict[int, list[list[float]]] = {}
        for probability_BC, labels_B in batches:
            for probability, label in zip(probability_BC.tolist(), labels_B.tolist(), strict=True):
                of_class.setdefault(label, []).append(probability)
        for label, samples in of_class.items():
            rows[label] = [sum(column) / len(samples) for column in zip(*samples, strict=True)]
    return torch.tensor(rows)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_class_prior_holds_the_means_of_the_last_epoch_with_samples(epochs: int) -> None:
    prior = run(ClassPrior(CLASSES, "cpu"), EPOCHS[:epochs]).prior
    assert isinstance(prior, Tensor)
    torch.testing.assert_close(prior, naive(EPOCHS[:epochs]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prior.sum(1), torch.ones(CLASSES))


@each_form
def test_a_class_without_samples_keeps_its_row(form: dict[str, int]) -> None:
    after = [dense(run(ClassPrior(CLASSES, "cpu", **form), EPOCHS[:epochs]).prior) for epochs in (0, 1, 2)]
    assert torch.equal(after[2][1], after[1][1])
    assert not torch.equal(after[1][1], after[0][1])
    assert torch.equal(after[1][2], torch.full((CLASSES,), 1 / CLASSES))
    assert not torch.equal(after[2][2], after[1][2])
    assert torch.equal(after[2][4], torch.full((CLASSES,), 1 / CLASSES))
    assert not torch.equal(after[2][3], after[1][3])


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_cut_class_prior_that_keeps_every_entry_is_the_dense_one(epochs: int) -> None:
    cut = run(ClassPrior(CLASSES, "cpu", dense_classes=0, kept_entries=CLASSES), EPOCHS[:epochs])
    whole = run(ClassPrior(CLASSES, "cpu"), EPOCHS[:epochs])
    assert isinstance(cut.prior, TopKPrior)
    assert torch.equal(dense(cut.prior), dense(whole.prior))
    more = ClassPrior(CLASSES, "cpu", dense_classes=0, kept_entries=CLASSES + 1)
    assert torch.equal(dense(run(more, EPOCHS[:epochs]).prior), dense(whole.prior))


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_a_cut_class_prior_keeps_the_largest_means(epochs: int) -> None:
    """Of the whole epoch: the sums behind it are exact."""
    top = run(ClassPrior(CLASSES, "cpu", **CUT), EPOCHS[:epochs]).prior
    assert isinstance(top, TopKPrior)
    assert top.values_CK.shape == (CLASSES, 3)
    expected = naive(EPOCHS[:epochs])
    torch.testing.assert_close(top.values_CK, expected.topk(3).values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(top.values_CK, expected.gather(1, top.indices_CK.long()), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dense(top).sum(1), torch.ones(CLASSES))


def test_a_cut_class_prior_of_many_classes_is_cut_row_by_row() -> None:
    """More rows than are looked at together, and a stretch of classes without samples as long as that."""
    classes, kept = 700, 4
    cut, whole = ClassPrior(classes, "cpu", dense_classes=0, kept_entries=kept), ClassPrior(classes, "cpu")
    for epoch, labels in enumerate((torch.arange(0, 690, 2), torch.arange(512, 700).repeat(2))):
        probability = random_logits(len(labels), classes, seed=epoch, dtype=torch.float32).softmax(1)
        for prior in (cut, whole):
            prior.add(probability, labels)
            prior.end_epoch(sum_over_ranks)
    assert isinstance(whole.prior, Tensor)
    assert isinstance(cut.prior, TopKPrior)
    assert torch.equal(whole.prior[1], torch.full((classes,), 1 / classes))
    expected = TopKPrior.from_dense(whole.prior, kept)
    changed = (whole.prior != 1 / classes).any(1)
    assert torch.equal(cut.prior.values_CK, expected.values_CK)
    assert torch.equal(cut.prior.indices_CK[changed], expected.indices_CK[changed])
    torch.testing.assert_close(cut.prior.rest_C, expected.rest_C, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("classes", "is_dense"), [(4, True), (5, False)])
def test_the_number_of_classes_chooses_the_form(classes: int, is_dense: bool) -> None:
    prior = ClassPrior(classes, "cpu", dense_classes=4, kept_entries=2).prior
    assert isinstance(prior, Tensor) == is_dense
    assert tuple(prior.shape) == (classes, classes)


@each_form
def test_the_sums_of_ranks_make_the_prior_of_one(form: dict[str, int]) -> None:
    ranks = [ClassPrior(CLASSES, "cpu", **form) for _ in range(2)]
    for prior, (probability_BC, labels_B) in zip(ranks, EPOCHS[0], strict=True):
        prior.add(probability_BC, labels_B)
    totals = {2: ranks[0].sum_CC + ranks[1].sum_CC, 1: ranks[0].count_C + ranks[1].count_C}
    for prior in ranks:
        prior.end_epoch(lambda tensor: totals[tensor.ndim])
        found, expected = dense(prior.prior), dense(run(ClassPrior(CLASSES, "cpu", **form), EPOCHS[:1]).prior)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert not prior.sum_CC.any()
        assert not prior.count_C.any()


@each_form
def test_a_class_prior_is_restored_from_its_tensors(form: dict[str, int]) -> None:
    source = run(ClassPrior(CLASSES, "cpu", **form), EPOCHS[:1])
    tensors = source.tensors()
    assert len(tensors) == (1 if form == DENSE else 3)
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    restored = ClassPrior(CLASSES, "cpu", **form)
    restored.load_tensors(saved)
    before = dense(restored.prior).clone()
    assert torch.equal(before, dense(source.prior))
    for tensor in saved.values():
        tensor.zero_()
    assert torch.equal(dense(restored.prior), before)
    assert restored.tensors().keys() == tensors.keys()

    for prior in (source, restored):
        run(prior, EPOCHS[1:])
    assert torch.equal(dense(restored.prior), dense(source.prior))
    assert torch.equal(dense(source.prior)[1], before[1])


@each_form
def test_a_class_prior_weighs_the_loss(form: dict[str, int]) -> None:
    prior = run(ClassPrior(CLASSES, "cpu", **form), EPOCHS).prior
    labels = torch.tensor([0, 1, 2, 3, 4, 3])
    student, teacher = (random_logits(6, CLASSES, seed=seed) for seed in (1, 2))
    weight = oracles.weights(teacher, gamma=0.5, class_prior=dense(prior).double(), labels=labels)
    out = gkl_loss(student, teacher, gamma=0.5, class_prior=prior, labels=labels)
    torch.testing.assert_close(out.wmse, oracles.wmse(student, teacher, weight), rtol=1e-12, atol=0)
