"""The losses as terms of an objective: settings, what they declare, their shares of a batch, and how one is added.

Shapes: B rows, C columns, D and E feature widths of student and teacher.
"""

import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipdistill.losses
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Targets
from clipdistill.errors import InputError
from clipdistill.losses import (
    CLIP,
    DIST,
    DKD,
    FUSED_FROM,
    GKL,
    ICL,
    KL,
    LOSSES,
    Comparison,
    Feature,
    Loss,
    LossParts,
    Term,
    TopKPrior,
    adjusted_logits,
    clip_loss,
    dist_loss,
    dkd_loss,
    feature_loss,
    gkl_loss,
    kd_loss,
)
from clipdistill.models.outputs import ModelOutputs
from clipdistill.settings import union_of, validate
from tests.losses.inputs import DEVICE, LargestTensor, assert_near, features, random_prior

B, C = 8, 7
LABELS = (torch.arange(B) * 3 % C).to(DEVICE)
IDS = torch.tensor([0, 1, 2, 0, 3, 4, 2, 2]).to(DEVICE)
PRIOR = random_prior(C).to(DEVICE)
TOP_PRIOR = TopKPrior.from_dense(PRIOR, 3)


@dataclass(frozen=True)
class Matrix:
    """A model's similarities, for a comparison."""

    rows_BD: Tensor
    columns_CD: Tensor
    scale: Tensor | float
    bias: Tensor | float | None = None

    @cached_property
    def logits_BC(self) -> Tensor:
        logits_BC = self.scale * (self.rows_BD @ self.columns_CD.T)
        return logits_BC if self.bias is None else logits_BC + self.bias

    def part(self, rows: slice) -> "Matrix":
        return replace(self, rows_BD=self.rows_BD[rows])


def compared(columns: int = C, *, equal_widths: bool = False, **more: Any) -> Comparison:
    """Rows of a student beside a teacher's, with the label of each row."""
    image_BD, text_CD, teacher_image_BE, teacher_text_CE = features(B, columns, 6, 6 if equal_widths else 9)
    scale, bias = (torch.tensor(x, device=DEVICE, dtype=torch.float64, requires_grad=True) for x in (5.0, -2.0))
    student = Matrix(image_BD.requires_grad_(), text_CD.requires_grad_(), scale, bias)
    return Comparison(
        student=student, teacher=Matrix(teacher_image_BE, teacher_text_CE, 9.0, -1.0), target_B=LABELS, **more
    )


def parts_of(comparison: Comparison, splits: Sequence[int]) -> list[Comparison]:
    """The comparisons of some of the rows after others."""
    student, teacher = comparison.pair
    assert isinstance(student, Matrix)
    assert isinstance(teacher, Matrix)
    ends = torch.tensor([0, *splits]).cumsum(0).tolist()
    return [
        replace(
            comparison,
            student=student.part(rows),
            teacher=teacher.part(rows),
            target_B=None if comparison.target_B is None else comparison.target_B[rows],
        )
        for rows in map(slice, ends, ends[1:])
    ]


def of_batch(term: Loss, comparisons: Sequence[Comparison]) -> list[LossParts]:
    """The shares of the parts of a batch, as a trainer computes them: denominators first, of the teacher alone."""
    denominators: dict[str, Tensor] = {}
    for comparison in comparisons:
        for name, value in term.denominators(replace(comparison, student=None)).items():
            denominators[name] = denominators.get(name, torch.zeros_like(value)) + value
    teachers = [comparison.pair[1] for comparison in comparisons]
    rows = torch.tensor(sum(len(teacher.rows_BD) for teacher in teachers), dtype=torch.float64, device=DEVICE)
    return [term.compute(comparison, rows, denominators) for comparison in comparisons]


def gradients(value: Tensor, comparison: Comparison) -> list[Tensor]:
    """Towards rows, columns, scale and bias of the student; zeros where there is none."""
    student = comparison.pair[0]
    inputs = [student.rows_BD, student.columns_CD, student.scale, student.bias]
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]


def assert_same_loss(ours: Tensor, theirs: Tensor, comparison: Comparison, tolerance: float) -> None:
    assert_near([ours], [theirs], tolerance)
    of_ours, of_theirs = gradients(ours, comparison), gradients(theirs, comparison)
    assert of_theirs[0].abs().max() > 1e-3
    assert_near(of_ours[:3], of_theirs[:3], tolerance)
    assert of_ours[3].abs() <= 1e-14  # of a bias; 0 of the losses from features, 0 to rounding of those of logits
    assert of_theirs[3].abs() <= 1e-14


SMOOTH = {"alpha": 1.5, "beta": 0.7, "gamma": 0.6, "temperature": 2.0, "weight_temperature": 3.0}
TERMS: dict[str, tuple[Loss, dict[str, Any]]] = {
    "gkl": (GKL(), {}),
    "gkl-smooth": (GKL(**SMOOTH), {}),
    "gkl-uniform": (GKL(gamma=0.0), {}),
    "gkl-prior": (GKL(**SMOOTH, class_prior=True), {"class_prior": PRIOR}),
    "gkl-top-k": (GKL(**SMOOTH, class_prior=True), {"class_prior": TOP_PRIOR}),
    "kl": (KL(), {}),
    "kl-smooth": (KL(temperature=3.0), {}),
    "dkd": (DKD(alpha=0.5, beta=2.0, temperature=3.0), {}),
    "dist": (DIST(beta=2.0, gamma=0.5), {}),
    "clip": (CLIP(over="prompts"), {}),
    "cosine": (Feature(), {"equal_widths": True}),
    "mse": (Feature(kind="mse"), {"equal_widths": True}),
    "icl": (ICL(), {"columns": B, "equal_widths": True, "row_ids_B": IDS, "column_ids_C": IDS}),
}
FUSED = [name for name in TERMS if name.startswith(("gkl", "kl"))]


def functional(name: str, comparison: Comparison) -> Tensor:
    """The loss of a term, by the function of its logits or features."""
    student, teacher = comparison.pair
    logits = student.logits_BC, teacher.logits_BC
    match name:
        case "gkl" | "gkl-smooth" | "gkl-uniform":
            settings = {"gkl": {}, "gkl-smooth": SMOOTH, "gkl-uniform": {"gamma": 0.0}}[name]
            return gkl_loss(*logits, **settings).loss
        case "gkl-prior" | "gkl-top-k":
            return gkl_loss(*logits, **SMOOTH, class_prior=comparison.class_prior, labels=LABELS).loss
        case "kl" | "kl-smooth":
            return kd_loss(*logits, temperature=1.0 if name == "kl" else 3.0)
        case "dkd":
            return dkd_loss(*logits, LABELS, alpha=0.5, beta=2.0, temperature=3.0)
        case "dist":
            return dist_loss(*logits, beta=2.0, gamma=0.5)
        case "clip":
            return F.cross_entropy(logits[0], LABELS)
        case "icl":
            probabilities_BC = (student.scale * student.rows_BD @ teacher.columns_CD.T).softmax(1)
            equal_BC = IDS[:, None] == IDS[None, :]
            return -((probabilities_BC.log() * equal_BC).sum(1) / equal_BC.sum(1)).mean()
        case "cosine" | "mse":
            return feature_loss(student.rows_BD, teacher.rows_BD, kind="cosine" if name == "cosine" else "mse")
    raise AssertionError(name)


# --- what a term computes


def test_every_loss_is_compared() -> None:
    assert {type(term) for term, _ in TERMS.values()} == set(LOSSES)


@pytest.mark.parametrize("implementation", ["auto", "plain"])
@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_the_loss_of_its_logits(name: str, implementation: str) -> None:
    term, more = TERMS[name]
    comparison = compared(**more, implementation=implementation)
    (share,) = of_batch(term, [comparison])
    assert_same_loss(share.value, functional(name, comparison), comparison, 1e-12)
    torch.testing.assert_close(sum(share.parts.values()), share.value, rtol=1e-12, atol=0)


def test_the_parts_of_gkl_carry_their_factors() -> None:
    comparison = compared()
    out = gkl_loss(comparison.pair[0].logits_BC, comparison.pair[1].logits_BC, **SMOOTH)
    for implementation in ("plain", "tiled"):
        (share,) = of_batch(GKL(**SMOOTH), [replace(comparison, implementation=implementation)])
        assert share.parts.keys() == {"soft_ce", "wmse"}
        torch.testing.assert_close(share.parts["soft_ce"], 1.5 * out.soft_ce, rtol=1e-12, atol=0)
        torch.testing.assert_close(share.parts["wmse"], 0.7 * out.wmse, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FUSED)
def test_tiled_is_plain(name: str) -> None:
    term, more = TERMS[name]
    comparison = compared(**more)
    (plain,), (tiled,) = (
        of_batch(term, [replace(comparison, implementation=implementation)]) for implementation in ("plain", "tiled")
    )
    assert plain.parts.keys() == tiled.parts.keys()
    assert_same_loss(tiled.value, plain.value, comparison, 1e-12)
    for part, value in plain.parts.items():
        assert_same_loss(tiled.parts[part], value, comparison, 1e-12)


@pytest.mark.parametrize("implementation", ["plain", "tiled"])
@pytest.mark.parametrize("splits", [[3, 5], [8, 0]])
@pytest.mark.parametrize("name", [name for name, (term, _) in TERMS.items() if term.separable])
def test_the_shares_of_two_micro_batches_make_the_batch(name: str, splits: list[int], implementation: str) -> None:
    term, more = TERMS[name]
    comparison = compared(**more, implementation=implementation)
    shares = of_batch(term, parts_of(comparison, splits))
    added = shares[0].value + shares[1].value
    assert_same_loss(added, functional(name, comparison), comparison, 1e-12)


def test_the_shares_of_a_loss_that_couples_rows_would_be_another() -> None:
    comparison = compared()
    shares = of_batch(DIST(), parts_of(comparison, [3, 5]))
    whole = dist_loss(comparison.pair[0].logits_BC, comparison.pair[1].logits_BC, beta=1.0, gamma=1.0)
    assert abs((3 * shares[0].value + 5 * shares[1].value) / 8 - whole) > 1e-3 * whole


def test_an_adjusted_cross_entropy_is_that_of_the_training_sets_frequencies() -> None:
    """A class without samples counts as one; the minimiser's logits, without the adjustment, favour no class."""
    counts_C = torch.tensor([70, 25, 5, 0])
    logits_BC = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequency = [70 / 101, 25 / 101, 5 / 101, 1 / 101]
    for strength in (1.0, 0.5):
        found = adjusted_logits(logits_BC, counts_C, strength=strength).softmax(1)
        weighted_BC = logits_BC.exp() * torch.tensor(frequency, dtype=torch.float64) ** strength
        torch.testing.assert_close(found, weighted_BC / weighted_BC.sum(1, keepdim=True), rtol=1e-6, atol=1e-7)
    free_C = torch.zeros(3, requires_grad=True)
    labels_B = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    adjusted = adjusted_logits(free_C.expand(100, 3), counts_C[:3])
    F.cross_entropy(adjusted, labels_B).backward()
    torch.testing.assert_close(free_C.grad, torch.zeros(3), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"class_counts_C must have shape \(4,\), got \(3,\)"):
        adjusted_logits(logits_BC, counts_C[:3])


def test_clip_over_captions_is_the_mean_of_both_directions() -> None:
    ids = torch.tensor([4, 1, 4, 0, 2, 1, 3, 7], device=DEVICE)
    comparison = compared(B, row_ids_B=ids, column_ids_C=ids)
    image = comparison.pair[0]
    assert isinstance(image, Matrix)
    text = replace(image, rows_BD=image.columns_CD, columns_CD=image.rows_BD)
    rows = torch.tensor(float(B), device=DEVICE)
    directions = [CLIP().compute(replace(comparison, student=matrix), rows, {}).value for matrix in (image, text)]
    expected = clip_loss(
        image.rows_BD, image.columns_CD, logit_scale=image.scale, logit_bias=image.bias, caption_ids=ids
    )
    assert_same_loss(sum(directions) / 2, expected, comparison, 1e-12)


def test_auto_computes_large_matrices_from_the_features() -> None:
    """And needs no room for the logits there; below ``FUSED_FROM`` they are faster."""
    for classes, is_plain in ((100, True), (FUSED_FROM[DEVICE] // 512, False)):
        rows_BD, columns_CD, *teacher = features(512, classes, 2, 2, dtype=torch.float32)
        for term in (GKL(gamma=0.5), KL()):
            student = Matrix(rows_BD.requires_grad_(), columns_CD, 5.0)
            comparison = Comparison(student=student, teacher=Matrix(*teacher, 9.0))
            with LargestTensor() as seen:
                of_batch(term, [comparison])[0].value.backward()
            assert ("logits_BC" in vars(student)) == is_plain
            assert is_plain or seen.numel < 512 * classes


@pytest.mark.parametrize("implementation", ["plain", "tiled"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", TERMS)
def test_a_bad_feature_makes_the_term_non_finite(name: str, bad: float, implementation: str) -> None:
    term, more = TERMS[name]
    fields = ["rows_BD", "columns_CD", "scale", "bias"] if term.needs_logits else ["rows_BD"]
    used = {"student": fields, **({"teacher": fields} if term.needs_teacher else {})}
    if name == "icl":
        used = {"student": ["rows_BD", "scale"], "teacher": ["columns_CD"]}
    for side, of_side in used.items():
        for field in of_side:
            comparison = compared(**more, implementation=implementation)
            matrix = getattr(comparison, side)
            value = torch.as_tensor(getattr(matrix, field)).detach().clone()
            value[(0,) * value.ndim] = bad
            comparison = replace(comparison, **{side: replace(matrix, **{field: value})})
            assert not of_batch(term, [comparison])[0].value.isfinite()


# --- what a term declares

# Over which it may be, and of each: needs_labels, needs_caption_ids, separable; then what holds for both.
DECLARED: dict[type[Loss], tuple[dict[str, tuple[bool, bool, bool]], dict[str, bool]]] = {
    GKL: ({"prompts": (False, False, True), "captions": (False, False, False)}, {}),
    KL: ({"prompts": (False, False, True), "captions": (False, False, False)}, {}),
    DKD: ({"prompts": (True, False, True), "captions": (False, False, False)}, {}),
    DIST: ({"prompts": (False, False, False), "captions": (False, False, False)}, {"couples_rows": True}),
    CLIP: ({"captions": (False, True, False), "prompts": (True, False, True)}, {"needs_teacher": False}),
    Feature: (
        {"images": (False, False, True), "captions": (False, False, True)},
        {"needs_logits": False, "needs_equal_widths": True},
    ),
    ICL: ({"captions": (False, True, False)}, {"needs_equal_widths": True}),
}
USUAL = {"needs_teacher": True, "needs_logits": True, "needs_equal_widths": False, "couples_rows": False}
PAPERS = {
    GKL: {"2503.08038", "2305.13948"},
    KL: {"1503.02531"},
    DKD: {"2203.08679"},
    DIST: {"2205.10536"},
    CLIP: {"2103.00020"},
    Feature: {"2307.12732"},
    ICL: {"2307.12732"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_declares_what_it_needs(loss: type[Loss]) -> None:
    of_each, of_all = DECLARED[loss]
    tag = loss.model_fields["loss"].default
    assert validate(Term, {"loss": tag}).over == next(iter(of_each))
    for over, expected in of_each.items():
        term = validate(Term, {"loss": tag, "over": over})
        assert type(term) is loss
        assert (term.needs_labels, term.needs_caption_ids, term.separable) == expected
        assert {name: getattr(term, name) for name in USUAL} == USUAL | of_all
        assert term.prior_temperature is None
        assert term.term_name == f"{tag}_{over}"
    for over in {"prompts", "captions", "images", "texts"} - of_each.keys():
        with pytest.raises(InputError, match=rf"^over: '{over}' is not allowed; allowed: {', '.join(of_each)}$"):
            validate(Term, {"loss": tag, "over": over})


def test_a_class_prior_needs_labels_and_prompts() -> None:
    term = validate(Term, {"loss": "gkl", "class_prior": True, "weight_temperature": 3})
    assert term.needs_labels
    assert term.separable
    assert term.prior_temperature == 3.0
    with pytest.raises(InputError, match=r"^class_prior: True is not allowed; allowed: true only with over: prompts$"):
        validate(Term, {"loss": "gkl", "over": "captions", "class_prior": True})


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_cites_its_papers(loss: type[Loss]) -> None:
    assert {paper.arxiv for paper in loss.papers} == PAPERS[loss]
    module = sys.modules[loss.__module__].__doc__
    for paper in loss.papers:
        assert f"arXiv {paper.arxiv}" in " ".join(str(module).split())
        assert paper.year == 2000 + int(paper.arxiv[:2])
        assert paper.author.split(",")[0] in module


def test_the_losses_are_those_of_the_library() -> None:
    exported = {each for each in vars(clipdistill.losses).values() if isinstance(each, type) and issubclass(each, Loss)}
    assert exported == {*LOSSES, Loss}
    for values in ({each.model_fields["loss"].default for each in LOSSES}, DECLARED, PAPERS):
        assert len(values) == len(LOSSES)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_unknown_setting_is_refused_by_name(loss: type[Loss]) -> None:
    tag = loss.model_fields["loss"].default
    with pytest.raises(InputError, match=r"^objective\.0\.temprature: unknown config key; ") as caught:
        validate(Term, {"loss": tag, "temprature": 2.0}, at="objective.0")
    assert str(caught.value).endswith(f"allowed here: {', '.join(loss.model_fields)}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "kl", "alpha": 1.0}, "^alpha: unknown config key; "),
        ({"loss": "gkl", "gama": 0.5}, "^gama: unknown config key; nearest valid key: gamma; "),
        ({"loss": "gkl", "gamma": 1.01}, r"^gamma: 1\.01 is not allowed; allowed: 0 to 1$"),
        ({"loss": "gkl", "weight_temperature": 0}, "^weight_temperature: 0 is not allowed; allowed: > 0$"),
        ({"loss": "kl", "temperature": math.inf}, "^temperature: inf is not allowed; allowed: "),
        ({"loss": "dkd", "beta": "much"}, "^beta: 'much' is not allowed; allowed: a finite number$"),
        ({"loss": "dist", "weight": -1}, "^weight: -1 is not allowed; allowed: >= 0$"),
        ({"loss": "clip", "adjustment": 1}, "^adjustment: 1 is not allowed; allowed: empty, or a number with over"),
        ({"loss": "clip", "name": "a b"}, "^name: 'a b' is not allowed; allowed: text that matches "),
        ({"loss": "feature", "kind": "l1"}, "^kind: 'l1' is not allowed; allowed: cosine, mse$"),
        ({"loss": "mse"}, "loss: 'mse' is not allowed; allowed: gkl, kl, dkd, dist, clip, feature, icl$"),
        ({"over": "prompts"}, "loss: no value; it must be stated$"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_a_wrong_setting_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(Term, values)


# --- how a loss is added

DUMMY = '''
"""The mean distance of the logits, in units of the teacher's: ``sum_bj |t_bj - s_bj| / (C sum_bj |t_bj|) + shift``."""

from typing import ClassVar, Literal

from clipdistill.losses import Loss, LossParts, Paper
from clipdistill.settings import NonNegative


class Dummy(Loss):
    loss: Literal["dummy"] = "dummy"
    over: Literal["prompts", "captions"] = "prompts"
    shift: NonNegative = 0.0
    """Added to the loss."""

    papers: ClassVar = (Paper(key="nobody", title="None", author="Nobody", year=2024, arxiv="2401.00000"),)

    def denominators(self, comparison):
        return {"size": comparison.teacher.logits_BC.abs().sum()}

    def compute(self, comparison, rows, denominators):
        student, teacher = comparison.pair
        distance = (teacher.logits_BC - student.logits_BC).abs().sum() / denominators["size"]
        return LossParts.single("dummy", distance + self.shift * len(student.rows_BD) / rows)
'''


@pytest.fixture
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Loss]:
    """A loss in a file of its own."""
    (tmp_path / "dummy_loss_of_a_test.py").write_text(DUMMY)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("dummy_loss_of_a_test")
    monkeypatch.delitem(sys.modules, module.__name__)
    loss: type[Loss] = module.Dummy
    return loss


def test_a_loss_is_added_by_a_class_alone(dummy: type[Loss]) -> None:
    union = union_of((*LOSSES, dummy), "loss")
    term = validate(union, {"loss": "dummy", "shift": 0.25, "weight": 2.0, "warmup_epochs": 1})
    assert type(term) is dummy
    assert type(validate(union, {"loss": "kl"})) is KL
    with pytest.raises(InputError, match=r"^shifft: unknown config key; nearest valid key: shift; "):
        validate(union, {"loss": "dummy", "shifft": 1.0})
    with pytest.raises(
        InputError, match=r"'dumy' is not allowed; allowed: gkl, kl, dkd, dist, clip, feature, icl, dummy$"
    ):
        validate(union, {"loss": "dumy"})
    with pytest.raises(InputError, match="'dummy' is not allowed"):
        validate(Term, {"loss": "dummy"})

    image_BD = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], requires_grad=True)
    prompts_CD = torch.eye(2)
    student = ModelOutputs(image_BD=image_BD, prompts_CD=prompts_CD, scale=torch.tensor(2.0))
    teachers = [
        ModelOutputs(image_BD=torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]), prompts_CD=prompts_CD, scale=5.0),
        ModelOutputs(image_BD=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), prompts_CD=prompts_CD, scale=4.0),
    ]
    # Student logits 2 0, 1.2 1.6, 0 2; the teachers' 0 5, 5 0, 3 4 and 4 0, 4 0, 0 4.
    from_first = (2 + 5 + 3.8 + 1.6 + 3 + 2) / (5 + 5 + 7)
    from_second = (2 + 0 + 2.8 + 1.6 + 0 + 2) / (4 + 4 + 4)
    expected = 0.25 * (from_first + 0.25) + 0.75 * (from_second + 0.25)

    objective = Objective([term], warmup_steps={"dummy_prompts": 4}, teacher_weights=[1, 3])
    assert objective.needs_prompts
    assert objective.needs_teachers
    assert objective.separable
    assert not objective.needs_captions
    sizes = [2, 1]
    batches = [
        Targets(teachers=[Similarities(outputs) for outputs in each])
        for each in zip(*(outputs.split(sizes) for outputs in teachers), strict=True)
    ]
    denominators = objective.denominators(batches, rows=3)
    assert {name: value.item() for name, value in denominators.items()} == pytest.approx(
        {"rows": 3.0, "dummy_prompts/0/0/size": 17.0, "dummy_prompts/1/0/size": 12.0}, rel=1e-6
    )
    shares = [
        objective.losses(Similarities(outputs), targets, denominators)
        for outputs, targets in zip(student.split(sizes), batches, strict=True)
    ]
    assert sum(share["dummy_prompts"].value.item() for share in shares) == pytest.approx(expected, rel=1e-6)
    assert sum(share["dummy_prompts"].parts["dummy"].item() for share in shares) == pytest.approx(expected, rel=1e-6)
    total = sum(objective.total(share, step=3) for share in shares)
    assert total.item() == pytest.approx(2.0 * 3 / 4 * expected, rel=1e-6)

    total.backward()
    # Each logit, 2 times an entry, pulls by the sign of s - t over the size; the second teacher's 0 on 0 does not pull.
    signs = [torch.tensor([[1, -1], [-1, 1], [-1, -1]]), torch.tensor([[-1, 0], [-1, 1], [0, -1]])]
    by_hand = 2.0 * 3 / 4 * 2.0 * (0.25 * signs[0] / 17 + 0.75 * signs[1] / 12)
    torch.testing.assert_close(image_BD.grad, by_hand, rtol=1e-6, atol=1e-8)
