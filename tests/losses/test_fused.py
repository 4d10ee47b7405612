"""The losses from features: those of the logits, in value and gradient, without a matrix of logits.

With TRITON_INTERPRET=1, or on a machine with a GPU, the tests of implementations run Triton's kernels too.
"""

import doctest
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import clipdistill.losses.fused
from clipdistill.losses import (
    FUSED_FROM,
    GKLDenominators,
    TopKPrior,
    gkl_denominators_from_features,
    gkl_loss,
    gkl_loss_from_features,
    gkl_sums,
    kd_loss,
    kd_loss_from_features,
)
from tests.losses import inputs, oracles
from tests.losses.inputs import DEVICE, LargestTensor, assert_near, features

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = ["triton"] if INTERPRETED or DEVICE == "cuda" else []
each_implementation = pytest.mark.parametrize("implementation", ["tiled", *KERNELS])


def trainable(embeddings, scale=15.0):
    """Student image, text and scale with gradient, beside the teacher's embeddings."""
    image, text, *teacher = embeddings
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    scale = torch.tensor(scale, dtype=dtype, device=image.device)
    return image.clone().requires_grad_(), text.clone().requires_grad_(), scale.requires_grad_(), *teacher


def fused(loss, student, teacher, **keywords):
    image, text, scale = student
    return loss(image, text, *teacher, student_scale=scale, teacher_scale=20.0, **keywords)


def logits_of(student, teacher):
    image, text, scale = student
    return scale * (image @ text.T), 20.0 * (teacher[0] @ teacher[1].T)


def random_prior(classes, *, seed=0):
    return inputs.random_prior(classes, seed=seed).to(DEVICE)


def grads(value, student):
    return torch.autograd.grad(value, student, retain_graph=True)


# --- values and gradients, against the losses of logits


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(1, 17),
    gamma=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    temperature=st.sampled_from([1.0]) | st.floats(0.5, 8),
    weight_temperature=st.sampled_from([1.0]) | st.floats(0.5, 8),
    with_prior=st.booleans(),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 1000),
)
def test_gkl_is_that_of_the_logits(rows, classes, gamma, temperature, weight_temperature, with_prior, scale, seed):
    *student, image, text = trainable(features(rows, classes, seed=seed), scale)
    keywords = {"alpha": 1.5, "beta": 0.7, "gamma": gamma, "temperature": temperature}
    keywords["weight_temperature"] = weight_temperature
    if with_prior:
        labels = (torch.arange(rows) * 7 % classes).to(DEVICE)
        keywords |= {"class_prior": random_prior(classes, seed=seed), "labels": labels}
    ours = fused(gkl_loss_from_features, student, (image, text), implementation="tiled", **keywords)
    theirs = gkl_loss(*logits_of(student, (image, text)), **keywords)
    for part in ("loss", "soft_ce", "wmse"):
        assert_near([getattr(ours, part)], [getattr(theirs, part)], 1e-10)
        assert_near(grads(getattr(ours, part), student), grads(getattr(theirs, part), student), 1e-10)


@pytest.mark.parametrize("shape", [(1500, 900), (130, 20_000)])
def test_many_blocks_of_rows_make_the_whole(shape):
    *student, image, text = trainable(features(*shape, width=6, teacher_width=5))
    ours = fused(gkl_loss_from_features, student, (image, text), gamma=0.5, implementation="tiled").loss
    theirs = gkl_loss(*logits_of(student, (image, text)), gamma=0.5).loss
    assert_near([ours, *grads(ours, student)], [theirs, *grads(theirs, student)], 1e-10)


SETTINGS = {
    "default": {},
    "smooth": {"gamma": 0.6, "temperature": 2.0, "weight_temperature": 3.0, "beta": 0.5},
    "same-temperature": {"gamma": 0.4, "temperature": 2.0, "weight_temperature": 2.0},
    "uniform": {"gamma": 0.0},
    "prior": {"gamma": 0.6, "prior": True},
    "plain-prior": {"gamma": 1.0, "prior": True},
}
# of the loss, and of its gradients, as a share of the largest entry
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 2**-7), torch.float16: (1e-5, 2**-10)}


def keywords_of(name, rows, classes):
    keywords = dict(SETTINGS[name])
    if keywords.pop("prior", False):
        labels = (torch.arange(rows) * 3 % classes).to(DEVICE)
        keywords |= {"class_prior": random_prior(classes).float(), "labels": labels}
    return keywords


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_precision_of_each_type(implementation, dtype, name):
    """Half-precision embeddings are exact in float64: their loss is to be that of float64, to float32's rounding."""
    rows, classes = (20, 37) if implementation == "triton" else (70, 300)
    embeddings = features(rows, classes, dtype=dtype)
    *student, image, text = trainable(embeddings)
    *exact_student, exact_image, exact_text = trainable([x.double() for x in embeddings])
    keywords = keywords_of(name, rows, classes)
    ours = fused(gkl_loss_from_features, student, (image, text), implementation=implementation, **keywords)
    exact = gkl_loss(*logits_of(exact_student, (exact_image, exact_text)), **keywords)
    of_loss, of_gradient = TOLERANCE[dtype]
    for part in ("loss", "soft_ce", "wmse"):
        value, exact_value = getattr(ours, part), getattr(exact, part)
        assert value.dtype == torch.float32
        assert_near([value], [exact_value], of_loss)
        of_image, of_text, of_scale = grads(value, student)
        assert of_image.dtype == of_text.dtype == dtype
        assert_near((of_image, of_text, of_scale), grads(exact_value, exact_student), of_gradient)


@each_implementation
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_and_soft_cross_entropy_are_those_of_the_logits(implementation, temperature):
    dtype = torch.float64 if implementation == "tiled" else torch.float32
    *student, image, text = trainable(features(20, 37, dtype=dtype))
    *exact, exact_image, exact_text = trainable([x.double() for x in features(20, 37, dtype=dtype)])
    logits = logits_of(exact, (exact_image, exact_text))
    choice = {"temperature": temperature, "implementation": implementation}
    for ours, theirs in (
        (fused(kd_loss_from_features, student, (image, text), **choice), kd_loss(*logits, temperature=temperature)),
        (
            fused(gkl_loss_from_features, student, (image, text), **choice).soft_ce,
            oracles.soft_ce(*logits, temperature=temperature),
        ),
    ):
        tolerance = 1e-10 if implementation == "tiled" else 1e-5
        assert_near([ours, *grads(ours, student)], [theirs, *grads(theirs, exact)], tolerance)


@each_implementation
def test_half_precision_gradients_of_kl_survive_a_small_weight(implementation):
    """As in the mean over many rows: the gradients' factors alone are below float16's smallest normal number."""
    *student, image, text = trainable(features(8, 64, dtype=torch.float16))
    *exact, exact_image, exact_text = trainable([x.double() for x in features(8, 64, dtype=torch.float16)])
    choice = {"temperature": 1.0, "implementation": implementation}
    ours = fused(kd_loss_from_features, student, (image, text), **choice)
    theirs = kd_loss(*logits_of(exact, (exact_image, exact_text)), temperature=1.0)
    of_image, of_text, of_scale = grads(1e-7 * ours, student)
    exact_of_image, exact_of_text, exact_of_scale = grads(1e-7 * theirs, exact)
    assert_near([of_scale], [exact_of_scale], 2**-10)
    for found, expected in ((of_image, exact_of_image), (of_text, exact_of_text)):
        assert (found.double() - expected).abs().max() <= torch.finfo(torch.float16).smallest_normal * 2**-10


GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TENSORS = np.load(GOLDEN / "losses.npz")
GOLDEN_CASES = [case for case in json.loads((GOLDEN / "losses.json").read_text()) if case["loss"] in ("gkl", "kd")]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: f"{case['name']}-{case['loss']}")
@each_implementation
def test_matches_the_authors_code(implementation, case, dtype, tolerance):
    """Features whose logits are the golden ones: the logits themselves, over the unit vectors as classes."""
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernels compute in float32")
    name = case["name"]
    student, teacher = (
        torch.from_numpy(GOLDEN_TENSORS[f"{name}.{side}_logits"]).to(DEVICE, dtype) for side in ("student", "teacher")
    )
    student.requires_grad_()
    text = torch.eye(student.shape[1], dtype=dtype, device=DEVICE)
    keywords = {k: case[k] for k in ("alpha", "beta", "gamma", "temperature", "weight_temperature") if k in case}
    keywords |= {"student_scale": 1.0, "teacher_scale": 1.0, "implementation": implementation}
    if case["loss"] == "gkl":
        if case["class_prior"]:
            keywords["class_prior"] = torch.from_numpy(GOLDEN_TENSORS[f"{name}.class_prior"]).to(DEVICE, dtype)
            keywords["labels"] = torch.from_numpy(GOLDEN_TENSORS[f"{name}.labels"]).to(DEVICE)
        out = gkl_loss_from_features(student, text, teacher, text, **keywords)
        assert out.soft_ce.item() == pytest.approx(case["expected_soft_ce"], rel=tolerance)
        assert out.wmse.item() == pytest.approx(case["expected_wmse"], rel=tolerance)
        loss = out.loss
    else:
        loss = kd_loss_from_features(student, text, teacher, text, **keywords)
    assert loss.item() == pytest.approx(case["expected_loss"], rel=tolerance)
    expected = torch.from_numpy(GOLDEN_TENSORS[f"{name}.expected_grad_student"]).to(DEVICE)
    assert_near(grads(loss, [student]), [expected], tolerance)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others so")
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-k", "triton", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout


# --- gradients


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_the_losses(name):
    *student, image, text = trainable(features(5, 7, width=3, teacher_width=4), 3.0)
    keywords = keywords_of(name, 5, 7) | {"implementation": "tiled"}

    def parts(*student):
        out = fused(gkl_loss_from_features, student, (image, text), **keywords)
        return out.loss, out.soft_ce, out.wmse

    assert torch.autograd.gradcheck(parts, student)


def test_kl_gradients_are_those_of_the_loss():
    *student, image, text = trainable(features(5, 7, width=3, teacher_width=4), 3.0)
    choice = {"temperature": 2.0, "implementation": "tiled"}
    for rows in (None, torch.tensor(9.0)):
        assert torch.autograd.gradcheck(
            lambda *s, n=rows: fused(kd_loss_from_features, s, (image, text), rows=n, **choice), student
        )


@each_implementation
def test_any_mixture_of_the_parts_has_its_gradient(implementation):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))
    fused_out = fused(gkl_loss_from_features, student, (image, text), gamma=0.5, implementation=implementation)
    gradients = [
        [
            gradient
            for value in (out.loss, 2 * out.soft_ce + 3 * out.loss, out.wmse - out.soft_ce, out.loss * out.wmse)
            for gradient in grads(value, student)
        ]
        for out in (fused_out, gkl_loss(*logits_of(student, (image, text)), gamma=0.5))
    ]
    again = grads(fused_out.loss, student)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients[0][:3], strict=True))
    assert_near(*gradients, 1e-5)


@each_implementation
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), ()], ids=str)
def test_only_what_requires_a_gradient_gets_one(implementation, trained):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))
    every = grads(fused(gkl_loss_from_features, student, (image, text), implementation=implementation).loss, student)
    for number, tensor in enumerate(student):
        tensor.requires_grad_(number in trained)
    out = fused(gkl_loss_from_features, student, (image, text), implementation=implementation)
    assert out.loss.requires_grad == bool(trained)
    if trained:
        out.loss.backward()
    for number, tensor in enumerate(student):
        if number in trained:
            assert_near([tensor.grad], [every[number]], 1e-6)
        else:
            assert tensor.grad is None


@each_implementation
def test_the_teacher_gets_no_gradient(implementation):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))
    constants = image, text, scale = (
        image.requires_grad_(),
        text.requires_grad_(),
        torch.tensor(9.0, requires_grad=True),
    )
    out = gkl_loss_from_features(
        *student[:2], image, text, student_scale=5.0, teacher_scale=scale, implementation=implementation
    )
    out.loss.backward()
    assert student[0].grad is not None
    assert all(constant.grad is None for constant in constants)


@each_implementation
def test_a_bias_changes_nothing_and_its_gradient_is_zero(implementation):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))
    bias = torch.tensor([-10.0], device=DEVICE, requires_grad=True)
    biases = {"student_bias": bias, "teacher_bias": -16.0}
    for loss, keywords in (
        (lambda *a, **k: gkl_loss_from_features(*a, **k).loss, {}),
        (kd_loss_from_features, {"temperature": 2.0}),
    ):
        keywords = keywords | {"implementation": implementation}
        value = fused(loss, student, (image, text), **keywords, **biases)
        assert torch.equal(value, fused(loss, student, (image, text), **keywords))
        assert grads(value, [bias])[0].tolist() == [0.0]


def test_no_gradient_without_grad_mode():
    *student, image, text = trainable(features(5, 7))
    with torch.no_grad():
        out = fused(gkl_loss_from_features, student, (image, text), gamma=0.5, implementation="tiled")
    assert not out.loss.requires_grad
    assert_near([out.loss], [gkl_loss(*logits_of(student, (image, text)), gamma=0.5).loss], 1e-12)


@each_implementation
def test_a_second_derivative_is_refused_rather_than_wrong(implementation):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))
    loss = fused(gkl_loss_from_features, student, (image, text), implementation=implementation).loss
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


# --- parts of a batch


each_split = pytest.mark.parametrize("splits", [[4, 4, 4], [1, 7, 4]])


@each_implementation
@each_split
@pytest.mark.parametrize("name", ["smooth", "prior", "same-temperature", "uniform"])
def test_shares_of_micro_batches_make_the_batch(implementation, splits, name):
    embeddings = features(12, 17, dtype=torch.float32)
    *student, image, text = trainable(embeddings)
    keywords = keywords_of(name, 12, 17)
    whole = gkl_loss(*logits_of(student, (image, text)), **keywords)
    of_sums = {k: v for k, v in keywords.items() if k not in ("alpha", "beta")}
    sums = gkl_sums(*logits_of(student, (image, text)), **of_sums)

    keywords["implementation"] = implementation
    labels = keywords.pop("labels").split(splits) if "labels" in keywords else None
    each = [{} if labels is None else {"labels": labels[number]} for number in range(len(splits))]
    of_teacher = {k: v for k, v in keywords.items() if k not in ("alpha", "beta", "temperature")}
    denominators = [
        gkl_denominators_from_features(part, text, teacher_scale=20.0, **rows, **of_teacher)
        for part, rows in zip(image.split(splits), each, strict=True)
    ]
    total = GKLDenominators(*(sum(parts) for parts in zip(*denominators, strict=True)))
    for added, part in zip(total, sums, strict=True):
        assert_near([added], [part.denominator], 1e-6)
        assert not added.requires_grad

    shares = [
        fused(gkl_loss_from_features, (part, *student[1:]), (teacher, text), denominators=total, **rows, **keywords)
        for part, teacher, rows in zip(student[0].split(splits), image.split(splits), each, strict=True)
    ]
    for name in ("loss", "soft_ce", "wmse"):
        added, value = sum(getattr(share, name) for share in shares), getattr(whole, name)
        assert_near([added, *grads(added, student)], [value, *grads(value, student)], 1e-5)


@each_implementation
@each_split
def test_shares_of_kl_make_the_batch(implementation, splits):
    *student, image, text = trainable(features(12, 17, dtype=torch.float32))
    whole = kd_loss(*logits_of(student, (image, text)), temperature=2.0)
    choice = {"temperature": 2.0, "rows": torch.tensor(12.0, device=DEVICE), "implementation": implementation}
    added = sum(
        fused(kd_loss_from_features, (part, *student[1:]), (teacher, text), **choice)
        for part, teacher in zip(student[0].split(splits), image.split(splits), strict=True)
    )
    assert_near([added, *grads(added, student)], [whole, *grads(whole, student)], 1e-5)


def test_accumulated_gradients_are_those_of_the_batch():
    *student, image, text = trainable(features(8, 17))
    whole = grads(fused(gkl_loss_from_features, student, (image, text), implementation="tiled").loss, student)
    total = GKLDenominators(torch.tensor(8.0), torch.tensor(8.0))
    for rows in (slice(0, 3), slice(3, 8)):
        part = (student[0][rows], *student[1:]), (image[rows], text)
        fused(gkl_loss_from_features, *part, denominators=total, implementation="tiled").loss.backward()
    assert_near([x.grad for x in student], whole, 1e-12)


class Towers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (torch.nn.Linear(12, 12, bias=False).double() for _ in range(2))

    def forward(self, image, text):
        return self.image(image), self.text(text)


def _train_on_rank(rank, ranks, folder):
    """Some of the rows, and their share of the loss; compares the averaged gradients with those of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    image, text, teacher_image, teacher_text = features(10, 17, device="cpu")
    towers = Towers()
    rows = slice(0, 10) if ranks == 1 else (slice(0, 4), slice(4, 10))[rank]
    model = torch.nn.parallel.DistributedDataParallel(towers)
    student_image, student_text = model(image[rows], text)
    denominators = gkl_denominators_from_features(teacher_image[rows], teacher_text, teacher_scale=20.0, gamma=0.5)
    dist.all_reduce(packed := torch.stack(denominators))
    gkl_loss_from_features(
        student_image, student_text, teacher_image[rows], teacher_text, student_scale=3.0, teacher_scale=20.0,
        gamma=0.5, denominators=GKLDenominators(*packed), implementation="tiled",
    ).loss.backward()  # fmt: skip
    student_image, student_text = towers(image, text)
    loss = gkl_loss(3.0 * student_image @ student_text.T, 20.0 * teacher_image @ teacher_text.T, gamma=0.5).loss
    averaged = [ranks * parameter.grad for parameter in towers.parameters()]
    assert_near(averaged, torch.autograd.grad(loss, list(towers.parameters())), 1e-10)
    dist.destroy_process_group()


def test_ddp_averages_the_gradients(tmp_path):
    _train_on_rank(0, 1, tmp_path)


@pytest.mark.slow
def test_two_ranks_make_the_batch(tmp_path):
    torch.multiprocessing.spawn(_train_on_rank, (2, str(tmp_path)), nprocs=2)


# --- where it runs


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(implementation, dtype):
    *student, image, text = trainable(features(20, 37, dtype=dtype))
    keywords = {"gamma": 0.5, "implementation": implementation}
    expected = fused(gkl_loss_from_features, student, (image, text), **keywords).loss
    expected_grads = grads(expected, student)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (student[0].float() @ text[:12, :12].float()).dtype == torch.bfloat16
        value = fused(gkl_loss_from_features, student, (image, text), **keywords).loss
        gradients = grads(value, student)
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_grads, strict=True))


@each_implementation
def test_torch_compile_changes_nothing(implementation):
    *student, image, text = trainable(features(20, 37, dtype=torch.float32))

    def step(student_image, student_text, scale):
        student = F.normalize(student_image + 1, dim=1), student_text, scale
        return 2 * fused(gkl_loss_from_features, student, (image, text), gamma=0.5, implementation=implementation).loss

    expected = step(*student)
    value = torch.compile(step, backend="eager")(*student)
    assert_near([value, *grads(value, student)], [expected, *grads(expected, student)], 1e-6)


@pytest.mark.parametrize("name", ["smooth", "prior", "top-k"])
def test_no_tensor_is_as_large_as_the_logits(name):
    rows, classes = 1024, 4096
    *student, image, text = trainable(features(rows, classes, width=4, teacher_width=4, dtype=torch.float32))
    keywords = keywords_of("smooth", rows, classes)
    if name != "smooth":
        prior = torch.full((classes, classes), 1 / classes, dtype=torch.bfloat16, device=DEVICE)
        prior = prior if name == "prior" else TopKPrior.from_dense(prior, 8)
        keywords |= {"class_prior": prior, "labels": torch.arange(rows, device=DEVICE)}
    with LargestTensor() as seen:
        out = fused(gkl_loss_from_features, student, (image, text), implementation="tiled", **keywords)
        out.loss.backward(retain_graph=True)
        out.wmse.backward()
    assert classes <= seen.numel <= rows * classes / 4


def test_auto_makes_no_matrix_of_logits():
    classes = FUSED_FROM[DEVICE] // 512
    *student, image, text = trainable(features(512, classes, width=2, teacher_width=2, dtype=torch.float32))
    for loss in (
        lambda: fused(kd_loss_from_features, student, (image, text), temperature=1.0),
        lambda: fused(gkl_loss_from_features, student, (image, text), gamma=0.5).loss,
    ):
        with LargestTensor() as seen:
            loss().backward()
        assert seen.numel < 512 * classes


# --- class priors that fit


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5, 16, 17])
def test_a_top_k_prior_is_within_its_bound(gamma, k):
    classes = 17
    prior, labels = random_prior(classes), torch.arange(12, device=DEVICE)
    embeddings = features(12, classes)
    *student, image, text = trainable(embeddings)
    top = TopKPrior.from_dense(prior, k)
    keywords = {"gamma": gamma, "labels": labels, "implementation": "tiled"}
    exact = fused(gkl_loss_from_features, student, (image, text), class_prior=prior, **keywords)
    cut = fused(gkl_loss_from_features, student, (image, text), class_prior=top, **keywords)
    by_logits = gkl_loss(*logits_of(student, (image, text)), class_prior=top, gamma=gamma, labels=labels)
    assert_near([cut.loss, *grads(cut.loss, student)], [by_logits.loss, *grads(by_logits.loss, student)], 1e-10)
    assert torch.equal(cut.soft_ce, exact.soft_ce)
    if k == classes or gamma == 0:
        assert_near([cut.wmse, *grads(cut.wmse, student)], [exact.wmse, *grads(exact.wmse, student)], 1e-12)
    rho = 1 - prior.topk(k).values.sum(1)[labels].clamp(max=1)
    error = 2 * (classes - k) ** (1 - gamma) * rho**gamma
    mass = top.values_CK[labels].pow(gamma).sum(1) + (classes - k) * top.rest_C[labels].pow(gamma)
    assert (mass >= prior[labels].pow(gamma).sum(1) - 1e-12).all()
    student_logits, teacher_logits = logits_of(student, (image, text))
    delta = teacher_logits - student_logits
    spread = (delta.amax(1) - delta.amin(1)).max()
    assert (cut.wmse - exact.wmse).abs() <= 0.75 * spread**2 * (error / mass).max() + 1e-12


def test_a_prior_of_two_bytes_is_that_prior_rounded():
    prior, labels = random_prior(17).bfloat16(), torch.arange(12, device=DEVICE)
    *student, image, text = trainable(features(12, 17))
    half, rounded = (
        fused(
            gkl_loss_from_features,
            student,
            (image, text),
            gamma=0.5,
            class_prior=p,
            labels=labels,
            implementation="tiled",
        )
        for p in (prior, prior.double())
    )
    assert torch.equal(half.loss, rounded.loss)


# --- a bad logit is never silent


@each_implementation
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", range(4), ids=("student-image", "student-text", "teacher-image", "teacher-text"))
def test_a_non_finite_embedding_makes_the_loss_non_finite(implementation, bad, place):
    for hidden in (False, True):
        embeddings = [x.abs() for x in features(9, 20, dtype=torch.float32)]  # positive: -inf stays -inf
        embeddings[place][3, 0 if hidden else slice(None)] = bad
        scales = {"student_scale": 10.0, "teacher_scale": 10.0}
        out = gkl_loss_from_features(*embeddings, **scales, gamma=0.5, implementation=implementation)
        for part in (out.loss, out.soft_ce, out.wmse):
            assert not part.isfinite()
        kl = kd_loss_from_features(*embeddings, **scales, temperature=1.0, implementation=implementation)
        assert not kl.isfinite()


@each_implementation
@pytest.mark.parametrize("name", ["student_scale", "teacher_scale", "student_bias", "teacher_bias"])
def test_a_non_finite_setting_makes_the_loss_non_finite(implementation, name):
    keywords = {"student_scale": 10.0, "teacher_scale": 10.0, "implementation": implementation, name: math.nan}
    for weights in ({"alpha": 0.0}, {"beta": 0.0}):
        assert not gkl_loss_from_features(*features(4, 6, dtype=torch.float32), **keywords, **weights).loss.isfinite()
    kl = kd_loss_from_features(*features(4, 6, dtype=torch.float32), **keywords, temperature=1.0)
    assert not kl.isfinite()


@each_implementation
def test_a_class_that_the_prior_never_saw_makes_the_loss_nan(implementation):
    prior = random_prior(6).float()
    prior[1] = 0
    out = gkl_loss_from_features(
        *features(4, 6, dtype=torch.float32), student_scale=1.0, teacher_scale=1.0, gamma=0.5,
        class_prior=prior, labels=torch.tensor([0, 1, 2, 3], device=DEVICE), implementation=implementation,
    )  # fmt: skip
    assert out.loss.isnan()


# --- errors

GOOD = dict(
    zip(("student_image", "student_text", "teacher_image", "teacher_text"), features(4, 6, device="cpu"), strict=True)
)
GOOD |= {"student_scale": 1.0, "teacher_scale": 1.0}
PRIOR, LABELS = torch.full((6, 6), 1 / 6), torch.tensor([0, 1, 2, 5])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"student_image": torch.zeros(4)}, r"student_image must be 2-D, got shape \(4,\)"),
        ({"teacher_text": torch.zeros(6, 2, 2)}, r"teacher_text must be 2-D, got shape \(6, 2, 2\)"),
        ({"student_image": torch.zeros(4, 12).long()}, "student_image must be floating point, got torch.int64"),
        ({"student_text": torch.zeros(6, 11)}, "student_text must have student_image's width 12, got 11"),
        ({"teacher_text": torch.zeros(6, 11)}, "teacher_text must have teacher_image's width 20, got 11"),
        ({"teacher_image": torch.zeros(3, 20)}, "teacher_image must have as many rows as student_image, 4, got 3"),
        ({"teacher_text": torch.zeros(7, 20)}, "teacher_text must have as many rows as student_text, 6, got 7"),
        ({"student_text": torch.zeros(0, 12), "teacher_text": torch.zeros(0, 20)}, "must have at least one row"),
        ({"teacher_text": torch.zeros(6, 20, device="meta")}, "must be on student_image's device cpu, got meta"),
        ({"student_scale": torch.ones(2)}, r"student_scale must be a number .* of one element, got shape \(2,\)"),
        ({"teacher_bias": torch.ones(2)}, "teacher_bias must be a number or a tensor of one element"),
        ({"teacher_scale": torch.tensor(1)}, "teacher_scale must be floating point, got torch.int64"),
        ({"gamma": 1.01}, r"gamma must be in \[0, 1\], got 1.01"),
        ({"gamma": math.nan}, r"gamma must be in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"weight_temperature": math.inf}, "weight_temperature must be a finite number above 0, got inf"),
        ({"class_prior": PRIOR}, "given together or not at all, got labels=None"),
        ({"labels": LABELS}, "given together or not at all, got class_prior=None"),
        ({"class_prior": PRIOR[:5], "labels": LABELS}, r"class_prior must have shape \(6, 6\), got \(5, 6\)"),
        ({"class_prior": PRIOR.long(), "labels": LABELS}, "class_prior must be floating point, got torch.int64"),
        ({"class_prior": PRIOR.to("meta"), "labels": LABELS}, "class_prior must be on the embeddings' device cpu"),
        ({"class_prior": PRIOR, "labels": LABELS + 1}, r"labels must be in \[0, 6\), got 6"),
        ({"class_prior": PRIOR, "labels": LABELS[:2]}, r"labels must have shape \(4,\), one per row, got \(2,\)"),
        ({"class_prior": PRIOR, "labels": LABELS.float()}, "labels must be integers, got torch.float32"),
        ({"implementation": "magic"}, "implementation must be auto, tiled or triton, got 'magic'"),
        ({"implementation": "plain"}, "implementation must be auto, tiled or triton, got 'plain'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        gkl_loss_from_features(**GOOD | wrong)


@pytest.mark.skipif(not KERNELS, reason="no kernels here")
def test_what_the_kernels_lack_is_refused():
    good = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in GOOD.items()}
    with pytest.raises(ValueError, match=r"'triton' needs embeddings of at most 32 bits, got torch.float64"):
        gkl_loss_from_features(**good, implementation="triton")
    single = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in good.items()}
    prior = {"class_prior": TopKPrior.from_dense(PRIOR.to(DEVICE), 2), "labels": LABELS.to(DEVICE)}
    with pytest.raises(ValueError, match="'triton' needs a dense class_prior, got a TopKPrior"):
        gkl_loss_from_features(**single, **prior, implementation="triton")


@pytest.mark.skipif(bool(KERNELS), reason="the kernels run here")
def test_kernels_need_a_gpu():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="'triton' needs embeddings on CUDA, got cpu"):
        gkl_loss_from_features(**GOOD, implementation="triton")


def test_the_docstring_example_runs():
    results = doctest.testmod(clipdistill.losses.fused)
    assert results.attempted > 0
    assert results.failed == 0
