"""The losses against values computed in float64 with the authors' own published code (golden/)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdistill.losses import dist_loss, dkd_loss, gkl_loss, kd_loss

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "losses.json").read_text())
TENSORS = np.load(GOLDEN / "losses.npz")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def run(case, student, teacher):
    """The parts of the loss by the name that the golden file gives them."""
    name = case["name"]
    settings = {k: case[k] for k in ("alpha", "beta", "gamma", "temperature", "weight_temperature") if k in case}
    labels = torch.from_numpy(TENSORS[f"{name}.labels"]) if f"{name}.labels" in TENSORS else None
    if case["loss"] == "gkl":
        if case["class_prior"]:
            settings |= {
                "class_prior": torch.from_numpy(TENSORS[f"{name}.class_prior"]).to(student),
                "labels": labels,
            }
        out = gkl_loss(student, teacher, **settings)
        return {"loss": out.loss, "soft_ce": out.soft_ce, "wmse": out.wmse}
    if case["loss"] == "dkd":
        return {"loss": dkd_loss(student, teacher, labels, **settings)}
    return {"loss": {"kd": kd_loss, "dist": dist_loss}[case["loss"]](student, teacher, **settings)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['loss']}")
def test_matches_the_authors_code(case, dtype):
    student, teacher = (
        torch.from_numpy(TENSORS[f"{case['name']}.{side}_logits"]).to(dtype) for side in ("student", "teacher")
    )
    parts = run(case, student.requires_grad_(), teacher)
    for part, value in parts.items():
        assert value.ndim == 0
        assert value.dtype == dtype
        assert value.item() == pytest.approx(case[f"expected_{part}"], rel=TOLERANCE[dtype])
    (grad,) = torch.autograd.grad(parts["loss"], student)
    expected = torch.from_numpy(TENSORS[f"{case['name']}.expected_grad_student"])
    scale = expected.abs().max().item()
    torch.testing.assert_close(grad.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_every_golden_loss_is_covered():
    assert len(CASES) == 14
    assert {case["loss"] for case in CASES} == {"gkl", "kd", "dkd", "dist"}
