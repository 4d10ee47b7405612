"""What every loss promises: values, gradients, precision, loud failure."""

import math
from typing import NamedTuple

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from clipdistill.losses import (
    TopKPrior,
    clip_loss,
    contrastive_sums,
    dist_loss,
    dkd_loss,
    dkd_sums,
    feature_loss,
    feature_sums,
    gkl_denominator,
    gkl_loss,
    gkl_sums,
    kd_loss,
    kd_sums,
    positive_targets,
)
from tests.losses.inputs import random_logits

B, C = 5, 6
LABELS = torch.tensor([0, 3, 3, 5, 1])
PRIOR = torch.eye(C) / 2 + 1 / (2 * C)
TOP_PRIOR = TopKPrior.from_dense(PRIOR, 2)


# Each loss as f(student, teacher); for the contrastive loss the two are image and text features.
DISTILLATION = {
    "gkl": lambda s, t: gkl_loss(s, t, gamma=0.6, temperature=2.0, weight_temperature=3.0).loss,
    "gkl-prior": lambda s, t: gkl_loss(s, t, gamma=0.6, class_prior=PRIOR, labels=LABELS).loss,
    "gkl-uniform": lambda s, t: gkl_loss(s, t, gamma=0.0).loss,
    "gkl-top-k": lambda s, t: gkl_loss(s, t, gamma=0.6, class_prior=TOP_PRIOR, labels=LABELS).loss,
    "soft_ce": lambda s, t: gkl_loss(s, t, temperature=2.0).soft_ce,
    "wmse": lambda s, t: gkl_loss(s, t, gamma=0.6).wmse,
    "kd": lambda s, t: kd_loss(s, t, temperature=4.0),
    "dkd": lambda s, t: dkd_loss(s, t, LABELS, alpha=1.0, beta=8.0, temperature=4.0),
    "dist": lambda s, t: dist_loss(s, t, beta=2.0, gamma=0.5),
}
FEATURES = {
    "cosine": lambda s, t: feature_loss(s, t, kind="cosine"),
    "mse": lambda s, t: feature_loss(s, t, kind="mse"),
}
SYMMETRIC = {
    "clip": lambda s, t: clip_loss(s, t, logit_scale=2.0),
    "clip-ids": lambda s, t: clip_loss(s, t, logit_scale=2.0, logit_bias=-1.0, caption_ids=LABELS),
}
LOSSES = DISTILLATION | FEATURES | SYMMETRIC
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_distillation_loss = pytest.mark.parametrize("loss", DISTILLATION.values(), ids=DISTILLATION)


# --- gradients


@each_loss
def test_gradient_is_that_of_the_loss(loss):
    student, teacher = random_logits(B, C, seed=1).requires_grad_(), random_logits(B, C, seed=2)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)


def test_clip_gradient_towards_text_and_logit_scale():
    image, text = random_logits(B, C, seed=1), random_logits(B, C, seed=2).requires_grad_()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, k: clip_loss(image, t, logit_scale=k), (text, scale))


@pytest.mark.parametrize("loss", (DISTILLATION | FEATURES).values(), ids=DISTILLATION | FEATURES)
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = (random_logits(B, C, seed=seed).requires_grad_() for seed in (1, 2))
    loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_priors_and_targets_are_constants():
    student, constant = (random_logits(B, C, seed=seed).requires_grad_() for seed in (1, 2))
    prior = random_logits(C, C, seed=3).requires_grad_()
    gkl_loss(student, constant, gamma=0.5, class_prior=prior.softmax(1), labels=LABELS).loss.backward()
    contrastive_sums(student, constant).value.backward()
    assert student.grad is not None
    assert constant.grad is None
    assert prior.grad is None


@each_distillation_loss
def test_a_constant_added_to_a_row_changes_nothing(loss):
    student, teacher = random_logits(B, C, seed=1).requires_grad_(), random_logits(B, C, seed=2)
    shift = torch.tensor([[-5e3], [-40.0], [0.5], [40.0], [5e3]])
    expected = loss(student, teacher)
    (expected_grad,) = torch.autograd.grad(expected, student)
    for s, t in [(student + shift, teacher), (student, teacher + shift)]:
        value = loss(s, t)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected_grad, rtol=1e-9, atol=1e-11)


# --- precision


@each_loss
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_logits_of_ten_thousand(loss, autocast, dtype):
    signs = random_logits(B, C, seed=1).sign(), random_logits(B, C, seed=2).sign()
    one_hot = F.one_hot(LABELS, C).double()
    for s, t in [signs, (one_hot, one_hot.roll(1, 1)), (-one_hot, one_hot), (torch.ones(B, C), one_hot)]:
        student = (1e4 * s).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(student, (1e4 * t).to(dtype))
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


@each_loss
def test_autocast_changes_nothing(loss):
    student = random_logits(B, C, seed=1, dtype=torch.float32).requires_grad_()
    teacher = random_logits(B, C, seed=2, dtype=torch.float32)
    expected = loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert (student @ teacher.T).dtype == torch.bfloat16
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    torch.testing.assert_close(value.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=0)
    assert torch.equal(torch.autograd.grad(value, student)[0], torch.autograd.grad(expected, student)[0])


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student = random_logits(B, C, seed=1, dtype=torch.float32).to(dtype).requires_grad_()
    teacher = random_logits(B, C, seed=2, dtype=torch.float32).to(dtype)
    value = loss(student, teacher)
    value.backward()
    assert torch.equal(value, loss(student.float(), teacher.float()))
    assert student.grad.dtype == dtype


@each_loss
def test_float64_stays_float64(loss):
    assert loss(random_logits(B, C, seed=1), random_logits(B, C, seed=2)).dtype == torch.float64


# --- a bad logit is never silent


@each_loss
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_a_non_finite_logit_makes_the_loss_non_finite(loss, bad, where):
    for column in range(C):
        for teacher_logit in (0.0, -500.0, 500.0):  # a probability of the usual size, exactly 0, exactly 1
            student = random_logits(B, C, seed=1, dtype=torch.float32)
            teacher = random_logits(B, C, seed=2, dtype=torch.float32)
            teacher[1, column] = teacher_logit
            for tensor, hit in ((student, where != "teacher"), (teacher, where != "student")):
                if hit:
                    tensor[1, column] = bad
            assert not loss(student, teacher).isfinite()


@pytest.mark.parametrize("weights", [{"alpha": 0.0, "beta": 1.0}, {"alpha": 1.0, "beta": 0.0}])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("side", [0, 1])
def test_a_term_of_weight_zero_hides_no_bad_logit(weights, bad, side):
    for column in range(C):
        pair = [random_logits(B, C, seed=seed) for seed in (1, 2)]
        pair[side][1, column] = bad
        assert not gkl_loss(*pair, **weights).loss.isfinite()
        assert not dkd_loss(*pair, LABELS, temperature=1.0, **weights).isfinite()
        assert not dist_loss(*pair, beta=weights["alpha"], gamma=weights["beta"]).isfinite()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_row_of_bad_logits_is_not_silent(bad):
    for loss in LOSSES.values():
        for side in (0, 1):
            pair = [random_logits(B, C, seed=seed) for seed in (1, 2)]
            pair[side][1] = bad
            assert not loss(*pair).isfinite()


def test_a_bad_class_prior_is_not_silent():
    student, teacher = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    for bad in (math.nan, math.inf):
        prior = PRIOR.clone()
        prior[3, 0] = bad
        assert not gkl_loss(student, teacher, class_prior=prior, labels=LABELS).loss.isfinite()
    unseen = PRIOR.clone()
    unseen[3] = 0
    out = gkl_loss(student, teacher, class_prior=unseen, labels=LABELS)
    assert out.loss.isnan()
    assert out.soft_ce == gkl_loss(student, teacher).soft_ce  # which takes no part in it


# --- no waiting for the GPU


def test_the_losses_of_a_training_step_do_not_wait_for_the_gpu():
    with FakeTensorMode():  # stands in for a GPU: reading a value back, the cause of a wait, raises
        student, teacher = torch.randn(B, C, device="cuda"), torch.randn(B, C, device="cuda")
        labels = torch.zeros(B, dtype=torch.int64, device="cuda")
        prior = torch.zeros(C, C, device="cuda")
        gkl_loss(student, teacher)
        top = TopKPrior(prior[:, :2], labels.new_zeros(C, 2), prior[:, 0])
        for of_class in (prior, top):
            gkl_sums(student, teacher, gamma=0.5, class_prior=of_class, labels=labels)
            gkl_denominator(teacher, gamma=0.5, class_prior=of_class, labels=labels)
        kd_sums(student, teacher, temperature=1.0)
        dkd_sums(student, teacher, labels, alpha=1.0, beta=1.0, temperature=1.0)
        dist_loss(student, teacher, beta=1.0, gamma=1.0)
        clip_loss(student, teacher, logit_scale=1.0, caption_ids=labels)
        feature_sums(student, teacher)
        with pytest.raises(DataDependentOutputException):  # the whole-batch form does check the labels' range
            dkd_loss(student, teacher, labels, alpha=1.0, beta=1.0, temperature=1.0)


# --- rows add up


class Rows(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    target: torch.Tensor


ROW_SUMS = {
    "soft_ce": lambda rows: gkl_sums(rows.student, rows.teacher, temperature=2.0).soft_ce,
    "wmse": lambda rows: gkl_sums(rows.student, rows.teacher, weight_temperature=2.0).wmse,
    "kd": lambda rows: kd_sums(rows.student, rows.teacher, temperature=2.0),
    "dkd": lambda rows: dkd_sums(*rows[:3], alpha=1.0, beta=2.0, temperature=2.0),
    "cosine": lambda rows: feature_sums(rows.student, rows.teacher, kind="cosine"),
    "mse": lambda rows: feature_sums(rows.student, rows.teacher, kind="mse"),
    "contrastive": lambda rows: contrastive_sums(rows.student, rows.target),
}


@pytest.mark.parametrize("splits", [[2, 2, 1], [5, 0]])
@pytest.mark.parametrize("sums", ROW_SUMS.values(), ids=ROW_SUMS)
def test_sums_of_chunks_equal_the_whole(sums, splits):
    student, teacher = random_logits(B, C, seed=1).requires_grad_(), random_logits(B, C, seed=2)
    batch = Rows(student, teacher, LABELS, random_logits(B, C, seed=3).softmax(1))
    whole = sums(batch)
    first, *rest = (sums(Rows(*chunk)) for chunk in zip(*(x.split(splits) for x in batch), strict=True))
    total = sum(rest, start=first)
    assert whole.denominator == B
    assert not whole.denominator.requires_grad
    torch.testing.assert_close(total.value, whole.value, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(x.value, student)[0] for x in (total, whole)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


# --- values, against something else


def test_kd_is_kl_times_the_squared_temperature():
    student, teacher = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    kl = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(kd_loss(student, teacher, temperature=3.0), 9 * kl)


def test_kd_of_many_rows_is_torch_s_kl_div():
    rows, classes = 3001, 401  # many blocks of rows, the last one shorter
    student, teacher = random_logits(rows, classes, seed=1).requires_grad_(), random_logits(rows, classes, seed=2)
    ours = kd_loss(student, teacher, temperature=2.0)
    kl = F.kl_div((student / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(ours, 4 * kl, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, 4 * kl)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("row", range(B))
def test_dkd_with_the_coupled_weight_is_kl(row):
    student, teacher = random_logits(1, C, seed=row), random_logits(1, C, seed=row + 10)
    label = LABELS[row : row + 1]
    rest = 1 - (teacher / 2).softmax(1)[0, label].item()
    dkd = dkd_loss(student, teacher, label, alpha=1.0, beta=rest, temperature=2.0)
    torch.testing.assert_close(dkd, kd_loss(student, teacher, temperature=2.0), rtol=1e-10, atol=0)


def test_dist_is_one_minus_numpys_correlation():
    student, teacher = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    q, p = student.softmax(1).numpy(), teacher.softmax(1).numpy()
    rows = np.mean([np.corrcoef(q[b], p[b])[0, 1] for b in range(B)])
    columns = np.mean([np.corrcoef(q[:, c], p[:, c])[0, 1] for c in range(C)])
    value = dist_loss(student, teacher, beta=2.0, gamma=0.5).item()
    assert value == pytest.approx(2 * (1 - rows) + 0.5 * (1 - columns), abs=1e-6)


@pytest.mark.parametrize("bias", [None, -10.0])
def test_clip_loss_equals_open_clip(bias):
    image, text = (F.normalize(random_logits(8, 16, seed=seed), dim=1).requires_grad_() for seed in (1, 2))
    scale = torch.tensor(math.log(1 / 0.07), dtype=torch.float64, requires_grad=True)
    ours = clip_loss(image, text, logit_scale=scale.exp(), logit_bias=bias)
    theirs = open_clip.loss.ClipLoss()(image, text, scale.exp(), logit_bias=bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    inputs = (image, text, scale)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_clip_loss_counts_equal_captions_as_positives():
    image, text = (F.normalize(random_logits(6, 4, seed=seed), dim=1) for seed in (1, 2))
    ids = torch.tensor([7, 2, 7, 2, 7, 9])
    logits = (20 * image @ text.T).tolist()
    total = 0.0
    for i in range(6):
        positives = [j for j in range(6) if ids[j] == ids[i]]
        for row in (logits[i], [logits[j][i] for j in range(6)]):
            log_total = math.log(sum(math.exp(x) for x in row))
            total += sum(log_total - row[j] for j in positives) / len(positives)
    value = clip_loss(image, text, logit_scale=20.0, caption_ids=ids)
    assert value.item() == pytest.approx(total / 12, rel=1e-12)


def test_clip_loss_without_repeats_does_not_depend_on_ids():
    image, text = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    with_ids = clip_loss(image, text, logit_scale=1.0, caption_ids=torch.tensor([4, 8, 1, 0, 3]))
    torch.testing.assert_close(with_ids, clip_loss(image, text, logit_scale=1.0), rtol=1e-14, atol=0)


def test_contrastive_rows_of_each_rank_against_gathered_columns_make_the_whole():
    image, text = random_logits(6, 4, seed=1), random_logits(6, 4, seed=2)
    ids = torch.tensor([7, 2, 7, 2, 7, 9])
    parts = []
    for rank in (slice(0, 2), slice(2, 6)):
        target = positive_targets(ids[rank], ids, dtype=torch.float64)
        parts += [
            contrastive_sums(3.0 * image[rank] @ text.T, target),
            contrastive_sums(3.0 * text[rank] @ image.T, target),
        ]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    torch.testing.assert_close(total.value, clip_loss(image, text, logit_scale=3.0, caption_ids=ids))


def test_positive_targets_are_uniform_over_the_row_s_positives():
    target = positive_targets(torch.tensor([1, 2]), torch.tensor([1, 2, 1, 1, 5]))
    expected = torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3, 0], [0, 1, 0, 0, 0]])
    torch.testing.assert_close(target, expected)
    assert positive_targets(torch.tensor([8]), torch.tensor([1, 2])).isnan().all()


def test_feature_losses_equal_numpy():
    student, teacher = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    s, t = student.numpy(), teacher.numpy()
    cosine = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    assert feature_loss(student, teacher).item() == pytest.approx(np.mean(1 - cosine), rel=1e-12)
    assert feature_loss(student, teacher, kind="mse").item() == pytest.approx(np.mean((s - t) ** 2), rel=1e-12)


# --- errors

S, T, S_INT = torch.zeros(B, C), torch.zeros(B, C), torch.zeros(B, C, dtype=torch.int64)
PAIR_ERRORS = [
    (torch.zeros(C), torch.zeros(C), r"student_logits must be 2-D .* got shape \(6,\)"),
    (torch.zeros(B, C, 1), torch.zeros(B, C, 1), r"student_logits must be 2-D .* got shape \(5, 6, 1\)"),
    (torch.zeros(B, 0), torch.zeros(B, 0), r"at least one column, got shape \(5, 0\)"),
    (S, torch.zeros(B, C + 1), r"teacher_logits must have student_logits's shape \(5, 6\), got \(5, 7\)"),
    (S, torch.zeros(1, C), r"teacher_logits must have student_logits's shape \(5, 6\), got \(1, 6\)"),
    (S_INT, T, r"student_logits must be floating point, got torch.int64"),
]


@pytest.mark.parametrize(("student", "teacher", "message"), PAIR_ERRORS)
def test_wrong_logits_are_refused(student, teacher, message):
    for loss in (
        lambda: gkl_loss(student, teacher),
        lambda: kd_loss(student, teacher, temperature=1.0),
        lambda: dkd_loss(student, teacher, LABELS, alpha=1.0, beta=1.0, temperature=1.0),
        lambda: dist_loss(student, teacher, beta=1.0, gamma=1.0),
        lambda: gkl_sums(student, teacher),
    ):
        with pytest.raises(ValueError, match=message):
            loss()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_positive(temperature):
    message = f"temperature must be a finite number above 0, got {temperature}"
    for loss in (
        lambda: gkl_loss(S, T, temperature=temperature),
        lambda: kd_loss(S, T, temperature=temperature),
        lambda: dkd_loss(S, T, LABELS, alpha=1.0, beta=1.0, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            loss()
    with pytest.raises(ValueError, match=f"^weight_{message}"):
        gkl_loss(S, T, weight_temperature=temperature)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, math.nan])
def test_gamma_must_be_in_the_unit_interval(gamma):
    with pytest.raises(ValueError, match=rf"gamma must be in \[0, 1\], got {gamma}"):
        gkl_loss(S, T, gamma=gamma)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 6]), r"labels must be in \[0, 6\), got 6"),
        (torch.tensor([0, 1, 2, 3, -1]), r"labels must be in \[0, 6\), got -1"),
        (torch.tensor([0, 1]), r"labels must have shape \(5,\), one per row, got \(2,\)"),
        (torch.zeros(B, 1, dtype=torch.int64), r"labels must have shape \(5,\), one per row, got \(5, 1\)"),
        (torch.zeros(B), r"labels must be integers, got torch.float32"),
        (torch.zeros(B, dtype=torch.bool), r"labels must be integers, got torch.bool"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    dkd = {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}
    for loss in (
        lambda: gkl_loss(S, T, class_prior=PRIOR, labels=labels),
        lambda: gkl_sums(S, T, class_prior=PRIOR, labels=labels),
        lambda: gkl_denominator(T, class_prior=PRIOR, labels=labels),
        lambda: gkl_loss(S, T, class_prior=TOP_PRIOR, labels=labels),
        lambda: dkd_loss(S, T, labels, **dkd),
        lambda: dkd_sums(S, T, labels, **dkd),
    ):
        with pytest.raises(ValueError, match=message):
            loss()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_any_integers(dtype):
    student, teacher = random_logits(B, C, seed=1), random_logits(B, C, seed=2)
    settings = {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}
    assert dkd_loss(student, teacher, LABELS.to(dtype), **settings) == dkd_loss(student, teacher, LABELS, **settings)


def test_a_class_prior_must_be_square_and_come_with_labels():
    with pytest.raises(ValueError, match=r"class_prior must have shape \(6, 6\), got \(5, 6\)"):
        gkl_loss(S, T, class_prior=torch.ones(B, C), labels=LABELS)
    with pytest.raises(ValueError, match=r"class_prior must have shape \(6, 6\), got \(5, 5\)"):
        gkl_loss(S, T, class_prior=TopKPrior.from_dense(torch.eye(5), 2), labels=LABELS)
    with pytest.raises(ValueError, match=r"class_prior must be floating point, got torch\.int64"):
        gkl_loss(S, T, class_prior=PRIOR.long(), labels=LABELS)
    with pytest.raises(ValueError, match="given together or not at all, got labels=None"):
        gkl_loss(S, T, class_prior=PRIOR)
    with pytest.raises(ValueError, match="given together or not at all, got class_prior=None"):
        gkl_loss(S, T, labels=LABELS)


def test_other_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"at least 2 classes, got shape \(5, 1\)"):
        dkd_loss(torch.zeros(B, 1), torch.zeros(B, 1), torch.zeros(B).long(), alpha=1.0, beta=1.0, temperature=1.0)
    with pytest.raises(ValueError, match=r"target_BC must have logits_BC's shape \(5, 6\), got \(6, 5\)"):
        contrastive_sums(S, torch.zeros(C, B))
    with pytest.raises(ValueError, match=r"text_features must have image_features's shape \(5, 6\), got \(4, 6\)"):
        clip_loss(S, torch.zeros(B - 1, C), logit_scale=1.0)
    with pytest.raises(ValueError, match=r"caption_ids must have shape \(5,\), got \(4,\)"):
        clip_loss(S, T, logit_scale=1.0, caption_ids=torch.zeros(B - 1).long())
    with pytest.raises(ValueError, match=r"caption ids must be 1-D integers, got torch\.float32"):
        clip_loss(S, T, logit_scale=1.0, caption_ids=torch.zeros(B))
    with pytest.raises(ValueError, match=r"teacher must have student's shape \(5, 6\), got \(5, 7\)"):
        feature_loss(S, torch.zeros(B, C + 1))
    with pytest.raises(ValueError, match="kind must be 'cosine' or 'mse', got 'l1'"):
        feature_loss(S, T, kind="l1")
