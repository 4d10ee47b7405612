"""Nested embeddings: terms over first dimensions, models cut to them, in evaluation and export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.cli import main
from clipdistill.config import load_config
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Targets
from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation
from clipdistill.losses import GKL, ICL, KL, Feature, Loss, feature_loss, gkl_loss, icl_loss, kd_loss
from clipdistill.models.loading import StudentSettings, load_frozen_model, load_student
from clipdistill.models.nested import cut_to
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.towers import Tower
from clipdistill.training.trainer import train
from tests.conftest import TINY_MODEL


def pictures() -> Tensor:
    return torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make(kind: str, tiny_model: Path, teacher_folder: Path, tmp_path: Path) -> Tower:
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    match kind:
        case "vit":
            return load_student(str(tiny_model))
        case "resnet":
            path = tmp_path / "resnet-tiny.json"
            vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
            path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": vision}))
            return load_student(str(path))
        case "custom":
            path = tmp_path / "custom-tiny.json"
            path.write_text(json.dumps({**TINY_MODEL, "custom_text": True}))
            return load_student(str(path))
    return StudentSettings(model=f"timm/{kind}", text="teacher").load([teacher])


@pytest.mark.parametrize("kind", ["vit", "resnet", "custom", "test_vit", "mobilenetv3_small_050"])
def test_a_cut_model_has_the_first_dimensions(
    kind: str, tiny_model: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tower = make(kind, tiny_model, teacher_folder, tmp_path).eval()
    cut = cut_to(tower, 6)
    texts = tower.tokenize(["red", "a green picture"])
    with torch.no_grad():
        for ours, whole in (
            (cut.encode_image(pictures()), tower.encode_image(pictures())),
            (cut.encode_tokens(texts), tower.encode_tokens(texts)),
        ):
            assert ours.shape[1] == 6
            torch.testing.assert_close(ours, F.normalize(whole[:, :6], dim=-1), rtol=0, atol=1e-5)
    assert tower.encode_image(pictures()).shape[1] == 16
    assert cut.image_fingerprint() != tower.image_fingerprint()


@pytest.mark.parametrize("dimensions", [0, 16, 17])
def test_only_fewer_dimensions(tiny_model: Path, dimensions: int) -> None:
    with pytest.raises(InputError, match=f"dimensions: {dimensions} of .*; allowed: 1 to 15, fewer than it has"):
        cut_to(load_student(str(tiny_model)), dimensions)


def outputs(seed: int, scale: float) -> ModelOutputs:
    generator = torch.Generator().manual_seed(seed)
    image, captions, prompts = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (6, 6, 4))
    return ModelOutputs(image, captions, prompts, scale)


def first(features: Tensor | None, dimensions: int) -> Tensor:
    assert features is not None
    return F.normalize(features[:, :dimensions], dim=-1)


S, T = outputs(0, 20.0), outputs(1, 30.0)
FULL = T.scale * T.image_BD @ T.prompts_CD.T  # type: ignore[union-attr]


def on_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], Tensor]:
    return lambda d: loss(S.scale * first(S.image_BD, d) @ first(S.prompts_CD, d).T, FULL)


TERMS: list[tuple[Loss, Callable[[int], Tensor]]] = [
    (KL(dims=[2, 5, 8]), on_logits(lambda s, t: kd_loss(s, t, temperature=1.0))),
    (GKL(dims=[2, 8], gamma=0.4, beta=0.3), on_logits(lambda s, t: gkl_loss(s, t, gamma=0.4, beta=0.3).loss)),
    (Feature(dims=[3, 8]), lambda d: feature_loss(first(S.image_BD, d), first(T.image_BD, d))),
    (
        ICL(dims=[4]),
        lambda d: icl_loss(*(first(x, d) for each in (S, T) for x in each[:2]), logit_scale=20.0),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("term", "loss"), TERMS, ids=[term.loss for term, _ in TERMS])
@pytest.mark.parametrize("implementation", ["plain", "tiled"])
def test_a_term_is_its_mean_over_nested_dimensions(
    term: Loss, loss: Callable[[int], Tensor], implementation: Any
) -> None:
    objective = Objective([term], teacher_weights=[1.0], num_classes=4, implementation=implementation)
    targets = Targets(teachers=[Similarities(T)], caption_ids_B=torch.arange(6))
    found = objective.losses(Similarities(S), targets, objective.denominators([targets], 6))[term.term_name].value
    assert term.dims is not None
    expected = torch.stack([loss(dimensions) for dimensions in term.dims]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def run(write_config: Callable[..., Path]) -> Path:
    objective = [{"loss": "kl", "dims": [4, 16]}, {"loss": "gkl", "over": "captions", "dims": [8]}]
    return train(load_config(write_config(objective=objective))).output


def test_evaluation_and_export_of_first_dimensions(run: Path, colours: Path, tmp_path: Path) -> None:
    """What is exported is what was evaluated, and open_clip loads it."""
    command = ["evaluate", "--model", str(run), "--data", str(colours / "set"), "--output", str(tmp_path / "results")]
    assert main([*command, "--dims", "4", "8"]) == 0
    rows = json.loads((tmp_path / "results" / "summary.json").read_text())
    names = sorted(str(row) for row in (tmp_path / "results").iterdir() if row.is_dir())
    assert len(names) == 3
    assert rows
    export = ["export", "--checkpoint", str(run), "--formats", "open_clip", "--output", str(tmp_path / "cut")]
    assert main([*export, "--dims", "4", "--results", str(tmp_path / "results")]) == 0
    shipped, whole = load_for_evaluation(str(tmp_path / "cut")), load_for_evaluation(str(run))
    expected = F.normalize(whole.encode_image(pictures())[:, :4], dim=-1)
    torch.testing.assert_close(shipped.encode_image(pictures()), expected, rtol=0, atol=1e-5)
    assert open_clip.create_model(f"local-dir:{tmp_path / 'cut'}").text_projection.shape[1] == 4
    cut = (tmp_path / "cut" / "README.md").read_text()
    assert "acc1" in cut
    bare = [
        "export",
        "--checkpoint",
        str(run),
        "--formats",
        "open_clip",
        "--output",
        str(tmp_path / "bare"),
        "--dims",
        "4",
    ]
    assert main(bare) == 0
    assert "acc1" not in (tmp_path / "bare" / "README.md").read_text()  # the run's are of all dimensions


@pytest.mark.parametrize(
    ("objective", "student", "message"),
    [
        ([{"loss": "kl", "dims": [4, 20]}], {}, "objective.kl_prompts.dims: [4, 20] is not allowed; allowed: up to 16"),
        ([{"loss": "kl", "dims": []}], {}, "objective.0.dims: [] is not allowed"),
        ([{"loss": "kl", "dims": [4, 4]}], {}, "dims: [4, 4] is not allowed; allowed: different numbers"),
        ([{"loss": "kl", "dims": [0]}], {}, "objective.0.dims.0: 0 is not allowed"),
        ([{"loss": "feature", "dims": [4]}], {"embed_dim": 12}, "none, as a projection to the [16] dimensions"),
    ],
)  # fmt: skip
def test_wrong_dimensions_are_one_line(
    write_config: Callable[..., Path], tmp_path: Path, objective: Any, student: dict[str, int], message: str
) -> None:
    path = tmp_path / "student-of-nested.json"
    path.write_text(json.dumps({**TINY_MODEL, **student}))
    with pytest.raises(InputError) as error:
        train(load_config(write_config(objective=objective, student={"model": str(path)})))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
