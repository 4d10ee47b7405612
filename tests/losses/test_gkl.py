"""GKL: the papers' pairwise definition, Theorem 1, and what a trainer relies on (exact sums, O(B C))."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipdistill.losses.gkl
from clipdistill.losses import LossSum, gkl_denominator, gkl_loss, gkl_sums, kd_loss
from tests.losses import oracles
from tests.losses.inputs import LargestTensor, random_logits, random_prior


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 7),
    classes=st.integers(1, 13),
    gamma=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    weight_temperature=st.floats(0.5, 8),
    use_prior=st.booleans(),
    scale=st.floats(0.1, 30),
    seed=st.integers(0, 1000),
)
def test_equals_the_pairwise_definition(batch, classes, gamma, temperature, weight_temperature, use_prior, scale, seed):
    student = random_logits(batch, classes, seed=seed, scale=scale).requires_grad_()
    teacher = random_logits(batch, classes, seed=seed + 1, scale=scale)
    labels = torch.arange(batch) % classes
    prior = random_prior(classes, seed=seed)
    out = gkl_loss(
        student,
        teacher,
        alpha=1.5,
        beta=0.7,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
        **({"class_prior": prior, "labels": labels} if use_prior else {}),
    )
    weight = oracles.weights(
        teacher,
        gamma=gamma,
        weight_temperature=weight_temperature,
        **({"class_prior": prior, "labels": labels} if use_prior else {}),
    )
    soft_ce = oracles.soft_ce(student, teacher, temperature=temperature)
    wmse = oracles.wmse(student, teacher, weight)
    expected = 1.5 * soft_ce + 0.7 * wmse

    torch.testing.assert_close(out.soft_ce, soft_ce, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.wmse, wmse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    grad, expected_grad = (torch.autograd.grad(loss, student)[0] for loss in (out.loss, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_the_closed_form_is_the_pairwise_definition():
    """Of which the tests use the one or the other as the reference."""
    pair = [random_logits(6, 9, seed=seed).requires_grad_() for seed in (1, 2)]
    weight = random_logits(6, 9, seed=3).softmax(1) ** 0.6
    closed, pairwise = oracles.closed_wmse(*pair, weight), oracles.pairwise_wmse(*pair, weight)
    torch.testing.assert_close(closed, pairwise, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(closed[0], pair), torch.autograd.grad(pairwise[0], pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_theorem_1_kl_has_the_gradients_of_gkl_s_parts_towards_both_arguments():
    """KL trains the student by soft_ce and the teacher by wMSE, whose gradient to the student has the other sign."""
    student, teacher = (random_logits(6, 9, seed=seed).requires_grad_() for seed in (1, 2))
    out = gkl_loss(student, teacher)
    kl_of_student, kl_of_teacher = torch.autograd.grad(oracles.kl(student, teacher), (student, teacher))
    (soft_ce_of_student,) = torch.autograd.grad(out.soft_ce, student, retain_graph=True)
    (wmse_of_student,) = torch.autograd.grad(out.wmse, student)
    for of_gkl, of_kl in ((soft_ce_of_student, kl_of_student), (-wmse_of_student, kl_of_teacher)):
        assert of_kl.abs().max() > 1e-3
        torch.testing.assert_close(of_gkl, of_kl, rtol=1e-12, atol=1e-15)


def test_gamma_zero_ignores_teacher_and_prior_in_the_weights():
    student, teacher = random_logits(4, 6, seed=1), random_logits(4, 6)
    numerator, denominator = oracles.pairwise_wmse(student, teacher, torch.ones(4, 6).double())
    assert denominator == 4 * 6**2
    for prior in ({}, {"class_prior": torch.eye(6), "labels": torch.arange(4)}):
        sums = gkl_sums(student, teacher, gamma=0.0, weight_temperature=2.0, **prior)
        assert sums.wmse.denominator == denominator
        assert gkl_denominator(teacher, gamma=0.0, weight_temperature=2.0, **prior) == denominator
        torch.testing.assert_close(sums.wmse.numerator, numerator, rtol=1e-14, atol=0)


@pytest.mark.parametrize("use_prior", [False, True])
@pytest.mark.parametrize("splits", [[4, 4, 4], [1, 7, 4], [12, 0]])
def test_micro_batches_add_up_to_the_batch(splits, use_prior):
    student, teacher = random_logits(12, 8, seed=1).requires_grad_(), random_logits(12, 8, seed=2)
    labels = torch.arange(12) % 8
    prior = random_prior(8)
    whole = gkl_loss(
        student,
        teacher,
        beta=0.5,
        gamma=0.6,
        temperature=2.0,
        weight_temperature=3.0,
        **({"class_prior": prior, "labels": labels} if use_prior else {}),
    )
    (whole_grad,) = torch.autograd.grad(whole.loss, student)

    parts = list(zip(student.split(splits), teacher.split(splits), labels.split(splits), strict=True))
    settings = [
        {"gamma": 0.6, "weight_temperature": 3.0} | ({"class_prior": prior, "labels": y} if use_prior else {})
        for _, _, y in parts
    ]
    denominator = sum(gkl_denominator(t, **of_part) for (_, t, _), of_part in zip(parts, settings, strict=True))
    loss, grad = 0.0, torch.zeros_like(student)
    for (s, t, _), of_part in zip(parts, settings, strict=True):
        sums = gkl_sums(s, t, temperature=2.0, **of_part)
        part = sums.soft_ce.numerator / 12 + 0.5 * sums.wmse.numerator / denominator
        grad += torch.autograd.grad(part, student, retain_graph=True)[0]
        loss += part.item()

    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=1e-14)


def test_dividing_each_micro_batch_by_its_own_denominator_would_be_another_loss():
    student, teacher = random_logits(8, 5, seed=1), random_logits(8, 5, seed=2)
    parts = [gkl_sums(student[i : i + 4], teacher[i : i + 4], gamma=0.5).wmse for i in (0, 4)]
    whole = gkl_sums(student, teacher, gamma=0.5).wmse.value
    torch.testing.assert_close((parts[0] + parts[1]).value, whole, rtol=1e-12, atol=0)
    assert abs((parts[0].value + parts[1].value) / 2 - whole) > 1e-3 * whole


def test_loss_sum_adds_fractions_by_their_parts():
    one, three = torch.tensor(1.0), torch.tensor(3.0)
    total = LossSum(one, three) + LossSum(three, one)
    assert total.value == 1.0


SETTINGS = {
    "one temperature": {},
    "gamma": {"gamma": 0.6},
    "weights equal to p": {"gamma": 0.5, "temperature": 4.0, "weight_temperature": 2.0},
    "two temperatures": {"gamma": 0.3, "temperature": 2.0, "weight_temperature": 3.0},
    "only T2": {"weight_temperature": 3.0},
    "uniform": {"gamma": 0.0},
    "prior": {"gamma": 0.6, "class_prior": random_prior(6), "labels": torch.tensor([0, 3, 3, 5, 1])},
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def by_definition(student, teacher, *, temperature=1.0, wmse=oracles.pairwise_wmse, **settings):
    """Numerators of soft_ce and wMSE, and the wMSE's denominator."""
    soft_ce = len(student) * oracles.soft_ce(student, teacher, temperature=temperature)
    return soft_ce, *wmse(student, teacher, oracles.weights(teacher, **settings))


# What a caller may make of the two numerators: each alone, and together with any gradient from above.
USES = {
    "soft_ce": lambda soft_ce, _: soft_ce,
    "wmse": lambda _, wmse: wmse,
    "both": lambda soft_ce, wmse: 0.3 * soft_ce - 1.7 * wmse,
    "not linear": lambda soft_ce, wmse: soft_ce.square() * wmse.sqrt(),
}


@each_setting
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_sums_equal_the_definition_whatever_is_made_of_them(settings, use):
    student, teacher = random_logits(5, 6, seed=1).requires_grad_(), random_logits(5, 6, seed=2)
    sums = gkl_sums(student, teacher, **settings)
    soft_ce, wmse, denominator = by_definition(student, teacher, **settings)

    assert sums.soft_ce.denominator == 5
    for value, expected in [
        (sums.soft_ce.numerator, soft_ce),
        (sums.wmse.numerator, wmse),
        (sums.wmse.denominator, denominator),
        (gkl_denominator(teacher, **{k: v for k, v in settings.items() if k != "temperature"}), denominator),
    ]:
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    ours, theirs = use(sums.soft_ce.numerator, sums.wmse.numerator), use(soft_ce, wmse)
    (expected_grad,) = torch.autograd.grad(theirs, student)
    for _ in range(2):  # a retained graph gives the same again
        (grad,) = torch.autograd.grad(ours, student, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-11)


@pytest.fixture
def one_thread():  # whose blocks of rows are the smallest: 2^17 elements
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@each_setting
@pytest.mark.usefixtures("one_thread")
def test_many_blocks_of_rows_equal_the_parts_computed_at_once(settings):
    rows, classes = 1000, 401
    student, teacher = random_logits(rows, classes, seed=1).requires_grad_(), random_logits(rows, classes, seed=2)
    settings = dict(settings)
    if "labels" in settings:
        settings |= {"class_prior": random_prior(classes), "labels": torch.arange(rows) % classes}
    soft_ce, wmse, denominator = by_definition(student, teacher, wmse=oracles.closed_wmse, **settings)
    sums = gkl_sums(student, teacher, **settings)
    assert sums.soft_ce.denominator == rows
    torch.testing.assert_close(sums.wmse.denominator, denominator, rtol=1e-12, atol=0, check_dtype=False)
    for ours, theirs in ((sums.soft_ce.numerator, soft_ce), (sums.wmse.numerator, wmse)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@each_setting
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_bad_logit_shows_in_each_part_alone(settings, bad, side, with_gradient):
    logits = {"student": random_logits(5, 6, seed=1), "teacher": random_logits(5, 6, seed=2)}
    logits[side][1, 2] = bad
    sums = gkl_sums(logits["student"].requires_grad_(with_gradient), logits["teacher"], **settings)
    assert not sums.soft_ce.numerator.isfinite()
    assert not sums.wmse.numerator.isfinite()


def test_no_rows_are_a_sum_of_nothing():
    student = torch.zeros(0, 4, requires_grad=True)
    for sums in gkl_sums(student, torch.zeros(0, 4), gamma=0.5):
        assert sums.numerator == 0
        assert sums.denominator == 0
        (grad,) = torch.autograd.grad(sums.numerator, student, retain_graph=True)
        assert grad.shape == (0, 4)
    assert gkl_denominator(torch.zeros(0, 4)) == 0


def test_the_mass_of_the_weights_counts_classes_whose_probability_underflows():
    teacher = torch.full((1, 1000), -100.0)
    teacher[0, 0] = 100.0  # the others' probability, e^-200, is 0 in float32; its power, e^-2, is not
    expected = (1 + 999 * math.exp(-2)) ** 2
    assert gkl_denominator(teacher, gamma=0.01).item() == pytest.approx(expected, rel=1e-5)
    assert gkl_sums(teacher, teacher, gamma=0.01).wmse.denominator.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_half_precision_logits_is_rounded_once(dtype):
    student, teacher = (random_logits(5, 6, seed=seed).to(dtype) for seed in (1, 2))
    loss = gkl_loss(student.requires_grad_(), teacher, gamma=0.5).loss
    exact = student.detach().float().requires_grad_()
    gkl_loss(exact, teacher.float(), gamma=0.5).loss.backward()
    assert torch.equal(torch.autograd.grad(loss, student)[0], exact.grad.to(dtype))


def test_of_large_matrices_only_the_logits_are_kept_for_the_backward_pass():
    student, teacher = random_logits(400, 400, seed=1).requires_grad_(), random_logits(400, 400, seed=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gkl_loss(student, teacher, gamma=0.5)
        kd_loss(student, teacher, temperature=2.0)
    matrices = {x.data_ptr() for x in kept if x.numel() >= student.numel()}
    assert matrices == {student.data_ptr(), teacher.data_ptr()}


@pytest.mark.parametrize("loss", [gkl_loss, lambda s, t: kd_loss(s, t, temperature=2.0)], ids=["gkl", "kd"])
def test_torch_compile_gives_the_same_in_one_graph(loss):
    def value(student, teacher):
        out = loss(student, teacher)
        return out if isinstance(out, torch.Tensor) else out.loss

    student, teacher = random_logits(6, 9, seed=1).requires_grad_(), random_logits(6, 9, seed=2)
    compiled, plain = (
        torch.compile(value, backend="aot_eager", fullgraph=True)(student, teacher),
        value(student, teacher),
    )
    torch.testing.assert_close(compiled, plain, rtol=1e-14, atol=0)
    grads = [torch.autograd.grad(x, student)[0] for x in (compiled, plain)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_the_wmse_denominator_does_not_depend_on_the_student():
    teacher = random_logits(4, 6)
    sums = gkl_sums(random_logits(4, 6, seed=1).requires_grad_(), teacher).wmse
    assert sums.numerator.requires_grad
    assert not sums.denominator.requires_grad
    assert sums.denominator.item() == pytest.approx(4.0)  # softmax rows sum to 1


def test_a_second_derivative_is_refused_rather_than_wrong():
    student, teacher = random_logits(3, 4, seed=1).requires_grad_(), random_logits(3, 4)
    with pytest.raises(RuntimeError, match="GKL has no second derivative: differentiate without create_graph=True"):
        torch.autograd.grad(gkl_loss(student, teacher).loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="kd_loss has no second derivative"):
        torch.autograd.grad(kd_loss(student, teacher, temperature=1.0), student, create_graph=True)


@pytest.mark.parametrize("use_prior", [False, True])
def test_no_tensor_is_larger_than_the_logits(use_prior):
    batch, classes = 64, 4000
    student = random_logits(batch, classes, seed=1, dtype=torch.float32).requires_grad_()
    teacher = random_logits(batch, classes, seed=2, dtype=torch.float32)
    prior = {"class_prior": torch.eye(classes), "labels": torch.arange(batch)} if use_prior else {}
    with LargestTensor() as seen:
        gkl_loss(student, teacher, gamma=0.5, weight_temperature=2.0, **prior).loss.backward()
    assert seen.numel == batch * classes

    with LargestTensor() as seen:
        oracles.wmse(student[:2, :10], teacher[:2, :10], teacher[:2, :10].softmax(1)).backward()
    assert seen.numel >= 2 * 10 * 10  # the recorder would have seen a pairwise tensor


def test_the_docstring_example_runs():
    results = doctest.testmod(clipdistill.losses.gkl)
    assert results.attempted > 0
    assert results.failed == 0
