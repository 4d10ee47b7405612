"""The two-sided losses: gradients towards both logits, against the authors' code and autograd of the definitions."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.losses import gkl_loss, gkl_loss_from_features, kd_loss, kd_loss_from_features
from tests.losses import oracles

GOLDEN = Path(__file__).parent / "golden"
CASES = [case for case in json.loads((GOLDEN / "two_sided.json").read_text()) if case["loss"] == "gkl_two_sided"]
TENSORS = np.load(GOLDEN / "two_sided.npz")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def golden(case: dict[str, object], name: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.from_numpy(TENSORS[f"{case['name']}.{name}"]).to(dtype)


def by_logits(student_BC: Tensor, teacher_BC: Tensor, **settings: object) -> Tensor:
    return gkl_loss(student_BC, teacher_BC, **settings).loss  # type: ignore[arg-type]


def by_features(student_BC: Tensor, teacher_BC: Tensor, **settings: object) -> Tensor:
    """From the logits themselves as embeddings, over unit vectors as classes."""
    unit_CC = torch.eye(student_BC.shape[1], dtype=student_BC.dtype)
    scales = {"student_scale": 1.0, "teacher_scale": 1.0}
    return gkl_loss_from_features(student_BC, unit_CC, teacher_BC, unit_CC, **scales, **settings).loss  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("compute", [by_logits, by_features])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_matches_the_authors_code(case: dict[str, float], compute: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student_BC, teacher_BC = (golden(case, f"{side}_logits", dtype).requires_grad_() for side in ("student", "teacher"))
    labels_B = golden(case, "labels")
    settings = {name: case[name] for name in ("alpha", "beta", "gamma")}
    loss = compute(
        student_BC,
        teacher_BC,
        **settings,
        class_prior=golden(case, "class_prior", dtype),
        labels=labels_B,
        two_sided=True,
    )
    cross_entropy = F.cross_entropy(teacher_BC, labels_B)
    assert loss.item() == pytest.approx(case["expected_loss"], rel=TOLERANCE[dtype])
    assert cross_entropy.item() == pytest.approx(case["expected_ce"], rel=TOLERANCE[dtype])
    grads = torch.autograd.grad(loss, (student_BC, teacher_BC), retain_graph=True)
    (with_ce_BC,) = torch.autograd.grad(loss + cross_entropy, teacher_BC)
    for grad_BC, name in zip((*grads, with_ce_BC), ("student", "teacher", "teacher_with_ce"), strict=True):
        expected_BC = golden(case, f"expected_grad_{name}")
        bound = TOLERANCE[dtype] * max(expected_BC.abs().max().item(), 1.0)
        torch.testing.assert_close(grad_BC.double(), expected_BC, rtol=TOLERANCE[dtype], atol=bound)


SETTINGS = [
    {"alpha": 2.0, "beta": 3.0, "gamma": 0.5, "temperature": 2.0, "weight_temperature": 4.0},
    {"alpha": 0.0, "beta": 1.0, "gamma": 1.0},
    {"alpha": 1.0, "beta": 0.0, "gamma": 0.0},
]


def embeddings(rows: int, classes: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    sizes = (rows, classes, rows, classes)
    found = [F.normalize(torch.randn(size, width, generator=generator, dtype=torch.float64), dim=1) for size in sizes]
    return [each.requires_grad_() for each in found]


def reference(student_BC: Tensor, teacher_BC: Tensor, settings: dict[str, float]) -> Tensor:
    weighting = {name: settings[name] for name in ("gamma", "weight_temperature") if name in settings}
    soft_ce = oracles.soft_ce(student_BC, teacher_BC, temperature=settings.get("temperature", 1.0))
    numerator, denominator = oracles.closed_wmse(student_BC, teacher_BC, oracles.weights(teacher_BC, **weighting))
    return settings["alpha"] * soft_ce + settings["beta"] * numerator / denominator


@pytest.mark.parametrize(("rows", "classes"), [(7, 11), (700, 400)], ids=["kept", "in blocks"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_go_to_both_embeddings(rows: int, classes: int, settings: dict[str, float]) -> None:
    """By way of logits and fused, equal to autograd of the definition: images, texts and scales of both sides."""
    parts = embeddings(rows, classes, 16)
    scales = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (9.0, 7.0)]
    student_BC, teacher_BC = (scales[side] * parts[2 * side] @ parts[2 * side + 1].T for side in (0, 1))
    fused = gkl_loss_from_features(
        *parts, student_scale=scales[0], teacher_scale=scales[1], two_sided=True, **settings
    ).loss
    expected = torch.autograd.grad(reference(student_BC, teacher_BC, settings), (*parts, *scales), retain_graph=True)
    for loss in (gkl_loss(student_BC, teacher_BC, two_sided=True, **settings).loss, fused):
        found = torch.autograd.grad(loss, (*parts, *scales), retain_graph=True, allow_unused=settings["beta"] == 0)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-9, atol=1e-12)


def test_parts_are_differentiated_apart() -> None:
    student_BC, teacher_BC = (torch.randn(5, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for compute in (gkl_loss, lambda s, t, **more: gkl_loss(s.repeat(99, 40), t.repeat(99, 40), **more)):
        out = compute(student_BC, teacher_BC, two_sided=True)
        soft_ce = torch.autograd.grad(out.soft_ce, (student_BC, teacher_BC), retain_graph=True, allow_unused=True)
        wmse = torch.autograd.grad(out.wmse, (student_BC, teacher_BC))
        assert soft_ce[1] is None or not soft_ce[1].any()
        torch.testing.assert_close(wmse[0], -wmse[1])


@pytest.mark.parametrize("repeat", [1, 60], ids=["small", "in blocks"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_is_that_of_trades(repeat: int, temperature: float) -> None:
    """KL with gradients to both, by way of logits and fused, against torch; at T = 1 it has the gradients of GKL's two
    parts, each towards one side (Theorem 1 of arXiv 2305.13948)."""
    parts = embeddings(5 * repeat, 7 * repeat, 8)
    student_BC, teacher_BC = 6 * parts[0] @ parts[1].T, 8 * parts[2] @ parts[3].T
    log_q_BC, log_p_BC = ((logits_BC / temperature).log_softmax(1) for logits_BC in (student_BC, teacher_BC))
    expected = temperature**2 * F.kl_div(log_q_BC, log_p_BC, log_target=True, reduction="batchmean")
    losses = [
        kd_loss(student_BC, teacher_BC, temperature=temperature, two_sided=True),
        kd_loss_from_features(*parts, student_scale=6.0, teacher_scale=8.0, temperature=temperature, two_sided=True),
    ]
    grads = torch.autograd.grad(expected, parts, retain_graph=True)
    for loss in losses:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        for one, other in zip(torch.autograd.grad(loss, parts, retain_graph=True), grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    if temperature == 1:
        out = gkl_loss(student_BC, teacher_BC, two_sided=True)
        torch.testing.assert_close(torch.autograd.grad(out.soft_ce, parts[0], retain_graph=True)[0], grads[0])
        torch.testing.assert_close(torch.autograd.grad(out.wmse, parts[2])[0], grads[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [6, 600], ids=["small", "in blocks"])
def test_half_precision_is_computed_in_float32(rows: int, dtype: torch.dtype) -> None:
    logits = [torch.randn(rows, 300).to(dtype).requires_grad_() for _ in range(2)]
    exact = [logits_BC.detach().float().requires_grad_() for logits_BC in logits]
    for compute in (by_logits, kd_loss):
        settings = {"temperature": 2.0, "two_sided": True}
        found, expected = (torch.autograd.grad(rows * compute(*pair, **settings), pair) for pair in (logits, exact))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other.to(dtype))


def test_one_sided_by_default() -> None:
    student_BC, teacher_BC = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    for loss in (gkl_loss(student_BC, teacher_BC).loss, kd_loss(student_BC, teacher_BC, temperature=1.0)):
        assert torch.autograd.grad(loss, teacher_BC, allow_unused=True) == (None,)


def test_the_kernels_are_one_sided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parts = [part.float() for part in embeddings(3, 4, 5)]
    with pytest.raises(ValueError, match="'triton' needs"):
        gkl_loss_from_features(*parts, student_scale=1.0, teacher_scale=1.0, two_sided=True, implementation="triton")
