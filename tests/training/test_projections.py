"""Features of another width than a teacher's: learned maps, trained with the student, left out of what is shipped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from clipdistill.config import load_config
from clipdistill.distill.objective import Objective
from clipdistill.distill.similarities import Similarities
from clipdistill.distill.targets import Targets
from clipdistill.evaluation import load_for_evaluation
from clipdistill.export import export_open_clip
from clipdistill.io.jsonl import read_jsonl
from clipdistill.losses import ICL, Feature, feature_loss, icl_loss
from clipdistill.models.loading import load_student
from clipdistill.models.outputs import ModelOutputs
from clipdistill.training.trainer import train
from tests.conftest import TINY_MODEL, colour_samples, write_tar
from tests.training.test_trainer import assert_same_training, launch, newest

OBJECTIVE = [
    {"loss": "gkl", "gamma": 0.5},
    {"loss": "feature", "kind": "mse", "weight": 20.0},
    {"loss": "feature", "over": "captions", "weight": 0.5},
    {"loss": "icl", "weight": 0.5},
]


@pytest.fixture
def wide_teacher(tmp_path: Path) -> str:
    """A second teacher, whose features have 20 dimensions."""
    path = tmp_path / "wide-teacher.json"
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": 20}))
    torch.manual_seed(11)
    export_open_clip(load_student(str(path), logit_scale=20.0), tmp_path / "wide")
    return f"local-dir:{tmp_path / 'wide'}"


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A student whose features have 12 dimensions."""
    path = tmp_path / "narrow-student.json"
    path.write_text(json.dumps({**TINY_MODEL, "embed_dim": 12}))
    return path


@pytest.fixture
def write(
    write_config: Callable[..., Path], teacher_folder: Path, wide_teacher: str, narrow: Path
) -> Callable[..., Path]:
    """Write a config of the narrow student below teachers of 16 and 20 dimensions."""

    def write(**changes: Any) -> Path:
        teachers = [{"model": f"local-dir:{teacher_folder}"}, {"model": wide_teacher, "weight": 3.0}]
        changes = {"teachers": teachers, "student": {"model": str(narrow)}, "objective": OBJECTIVE} | changes
        return write_config(**changes)

    return write


def features(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_each_teacher_has_a_map_of_its_own(tiny_model: Path) -> None:
    """The loss written out, with the student's width among the teachers': that one is compared as it is."""
    torch.manual_seed(0)
    student = load_student(str(tiny_model))
    student.project_to([16, 24, 8], captions=True)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    out = student(pixels, caption_tokens=None)
    captions_BD = features(5, 16, seed=1)
    out = student._project(out._replace(captions_BD=captions_BD), student.projections)
    teachers = [
        ModelOutputs(features(5, width, seed=width), features(5, width, seed=width + 1)) for width in (16, 24, 8)
    ]
    ids_B = torch.tensor([3, 1, 3, 0, 2])
    terms = [Feature(kind="mse"), Feature(over="captions"), ICL()]
    objective = Objective(terms, teacher_weights=[1.0, 2.0, 1.0])
    targets = Targets(teachers=[Similarities(each) for each in teachers], caption_ids_B=ids_B)
    losses = objective.losses(Similarities(out), targets, objective.denominators([targets], 5))

    maps = {kind: [None, *each] for kind, each in student.projections.maps.items()}
    expected = dict.fromkeys(("feature_images", "feature_captions", "icl_captions"), 0.0)
    for number, (teacher, share) in enumerate(zip(teachers, (0.25, 0.5, 0.25), strict=True)):
        image_BE, captions_BE = (
            x if number == 0 else F.normalize(maps[kind][number](x), dim=-1)
            for kind, x in (("image", out.image_BD), ("captions", captions_BD))
        )
        of_captions = [feature_loss(image_BE, teacher.image_BD), feature_loss(captions_BE, teacher.captions_BD)]
        expected["feature_images"] += share * feature_loss(image_BE, teacher.image_BD, kind="mse")
        expected["feature_captions"] += share * sum(of_captions) / 2
        both = image_BE, captions_BE, teacher.image_BD, teacher.captions_BD
        expected["icl_captions"] += share * icl_loss(*both, logit_scale=out.scale, caption_ids=ids_B)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name].value, value, rtol=1e-5, atol=1e-6)


def test_interactive_contrast_is_cross_entropy_to_the_matching_pair() -> None:
    image, text, teacher_image, teacher_text = (features(6, 9, seed=seed).double() for seed in range(4))
    ours = icl_loss(image, text, teacher_image, teacher_text, logit_scale=7.0)
    pairs = torch.arange(6)
    theirs = F.cross_entropy(7 * image @ teacher_text.T, pairs) + F.cross_entropy(7 * text @ teacher_image.T, pairs)
    torch.testing.assert_close(ours, theirs / 2, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"caption_ids must have shape \(6,\)"):
        icl_loss(image, text, teacher_image, teacher_text, logit_scale=7.0, caption_ids=pairs[:5])


@pytest.mark.parametrize("objective", [OBJECTIVE, OBJECTIVE[:2]], ids=["together", "apart"])
def test_layout_does_not_change_the_training(
    write: Callable[..., Path], tmp_path: Path, objective: list[dict[str, Any]]
) -> None:
    """Micro-batches of one step, and two ranks, train the maps and the student as one batch does."""
    write_tar(tmp_path / "twin" / "0.tar", colour_samples(16))  # each step sees all of them, in every layout
    config = write(objective=objective)
    fixed = [
        f"data.shards=[{tmp_path / 'twin'}]",
        "optimizer.eps=1e-3",
        "train.steps=3",
        "train.log_every=1",
        "train.save_every=3",
        "evaluation.folders=[]",
    ]
    layouts = {"whole": (16, 1, 1), "accumulated": (4, 4, 1), "two": (4, 2, 2)}  # samples, micro-batches, ranks
    for name, (batch, accumulate, ranks) in layouts.items():
        sizes = [f"data.batch_size={batch}", f"train.accumulate={accumulate}"]
        launch(config, *fixed, *sizes, f"output={tmp_path / name}", processes=ranks)
    for name in ("accumulated", "two"):
        assert_same_training(tmp_path / name, tmp_path / "whole", tolerance=2e-4)
    saved = load_file(newest(tmp_path / "whole") / "student.safetensors")
    maps = sorted(name for name in saved if name.startswith("projections."))
    kinds = ("captions", "image") if len(objective) > 2 else ("image",)
    assert maps == [
        f"projections.maps.{kind}.{n}.{part}" for kind in kinds for n in (0, 1) for part in ("bias", "weight")
    ]
    shares = []
    for name in ("whole", "accumulated"):
        record = next(record for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record)
        shares.append({key: value for key, value in record.items() if key.startswith("gradient_share/")})
    assert shares[0]["gradient_share/feature_images/mse"] > 0.01
    assert sum(shares[0].values()) == pytest.approx(1.0)


def test_what_is_shipped_has_no_maps_and_a_checkpoint_loads(write: Callable[..., Path], narrow: Path) -> None:
    result = train(load_config(write(), ["train.steps=2", "train.save_every=1", "train.ema=0.5"]))
    with safe_open(result.student / "open_clip_model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert names == set(load_student(str(narrow)).clip.state_dict())
    finished, last = load_for_evaluation(str(result.output)), load_for_evaluation(str(result.output), step=2)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(finished.encode_image(pixels), last.encode_image(pixels), rtol=0, atol=1e-6)


def test_a_killed_run_goes_on_to_the_same_maps(write: Callable[..., Path], tmp_path: Path) -> None:
    steps = ["train.steps=4", "train.save_every=2", "evaluation.folders=[]"]
    train(load_config(write(), [*steps, f"output={tmp_path / 'whole'}"]))
    train(load_config(write(), [*steps, f"output={tmp_path / 'half'}"]))
    for path in (tmp_path / "half" / "checkpoints").iterdir():
        if path.name != "step_00000002":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (tmp_path / "half" / "summary.json").unlink()
    train(load_config(write(), [*steps, f"output={tmp_path / 'half'}"]), resume="auto")
    whole, half = (load_file(newest(tmp_path / name) / "student.safetensors") for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(tensor, half[name]) for name, tensor in whole.items())
