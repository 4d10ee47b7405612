"""Towers of timm as students: against timm's own features and settings, and open_clip alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation
from clipdistill.export import export_open_clip
from clipdistill.models.loading import StudentSettings, load_frozen_model, read_image_size
from clipdistill.models.timm_towers import find_timm_tower
from clipdistill.models.towers import FrozenModel
from clipdistill.training.trainer import train
from tests.hub_server import TOKEN, Repo, serve

ROOT = Path(__file__).parents[2]
VIT, WIDENED = "test_vit.r160_in1k", "mobilenetv3_small_050.lamb_in1k"
"""A tower whose pooled features are projected, and one that widens them behind the pooling."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each tower, as timm writes it."""
    root = tmp_path_factory.mktemp("timm")
    for name in (VIT, WIDENED):
        torch.manual_seed(1)
        save_for_hf(timm.create_model(name, num_classes=7), root / name, safe_serialization=True)
    return root


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> FrozenModel:
    return load_frozen_model(f"local-dir:{teacher_folder}")


def picture(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 90, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [VIT, WIDENED])
def test_features_and_pixels_are_timms(name: str, saved: Path, teacher: FrozenModel) -> None:
    settings = StudentSettings(model=f"timm/{name}", pretrained=str(saved / name), text="teacher")
    student = settings.load([teacher]).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    weights = load_file(saved / name / "model.safetensors")
    theirs.load_state_dict({key: value for key, value in weights.items() if key in theirs.state_dict()})
    expected = timm.data.resolve_data_config(model=theirs)
    assert (3, *student.image_size) == expected["input_size"]
    torch.testing.assert_close(student.pixels.mean.flatten(), torch.tensor(expected["mean"]))
    torch.testing.assert_close(student.pixels.std.flatten(), torch.tensor(expected["std"]))
    assert student.pixels.interpolation == expected["interpolation"]
    pixels_BCHW = student.pixels(picture())
    with torch.no_grad():
        ours = student.clip.visual.trunk.forward_features(pixels_BCHW)
        torch.testing.assert_close(ours, theirs.forward_features(pixels_BCHW), rtol=0, atol=0)
    assert student.encode_image(picture()).shape == (2, teacher.embed_dim)
    assert read_image_size(f"timm/{name}") == student.image_size


def test_weights_come_from_a_file_of_a_wrapped_model(saved: Path, teacher: FrozenModel, tmp_path: Path) -> None:
    weights = load_file(saved / VIT / "model.safetensors")
    save_file({f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}, tmp_path / "w.safetensors")
    student = StudentSettings(model=f"timm/{VIT}", pretrained=str(tmp_path / "w.safetensors"), text="teacher")
    trunk = student.load([teacher]).clip.visual.trunk.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trunk.items())


_FROM_THE_HUB = """
import sys, torch
from clipdistill.models.loading import StudentSettings
student = StudentSettings(model="timm/test_vit", pretrained="r160_in1k", text_model=sys.argv[1]).load()
torch.save((student.model_config, student.clip.visual.trunk.state_dict()), sys.argv[2])
"""


def test_weights_come_from_the_hub(saved: Path, tiny_model: Path, tmp_path: Path) -> None:
    with serve() as hub:
        files = {path.name: path.read_bytes() for path in (saved / VIT).iterdir()}
        hub.repos[f"timm/{VIT}"] = Repo(private=False, commits=[files])
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        env |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-c", _FROM_THE_HUB, str(tiny_model), str(tmp_path / "found.pt")]
        subprocess.run(arguments, env=os.environ | env, check=True)
    model_config, trunk = torch.load(tmp_path / "found.pt")
    assert model_config["vision_cfg"]["timm_model_name"] == VIT
    weights = load_file(saved / VIT / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trunk.items())


@pytest.mark.parametrize("other", ["nonsense", WIDENED, "test_vit2"])
def test_weights_of_something_else_are_refused(saved: Path, teacher: FrozenModel, tmp_path: Path, other: str) -> None:
    """timm itself would leave what they lack at random."""
    state = {"a.weight": torch.zeros(3)} if other == "nonsense" else timm.create_model(other).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    settings = StudentSettings(model=f"timm/{VIT}", pretrained=str(tmp_path / "weights.safetensors"), text="teacher")
    with pytest.raises(InputError, match=r"weights do not fit, such as .*; allowed: weights of this architecture"):
        settings.load([teacher])


def test_its_weights_are_random_unless_they_are_named(saved: Path, teacher: FrozenModel) -> None:
    first = [
        StudentSettings(model=f"timm/{VIT}", text="teacher").load([teacher]).clip.visual.trunk.cls_token
        for _ in range(2)
    ]
    assert not torch.equal(*first)


def test_beside_the_text_tower_of_another_model(saved: Path, tiny_model: Path, teacher_folder: Path) -> None:
    for source, weights in ((str(tiny_model), False), (f"local-dir:{teacher_folder}", True)):
        settings = StudentSettings(model=f"timm/{VIT}", pretrained=str(saved / VIT), text_model=source)
        student, owner = settings.load().eval(), load_frozen_model(f"local-dir:{teacher_folder}")
        tokens = student.tokenize(["red", "a green picture"])
        assert student.encode_image(picture()).shape[1] == student.encode_tokens(tokens).shape[1] == 16
        same = torch.allclose(student.encode_tokens(tokens), owner.encode_tokens(tokens), rtol=0, atol=1e-5)
        assert same is weights
        assert student.clip.logit_scale.requires_grad
        if weights:
            assert student.clip.logit_scale.exp().item() == pytest.approx(owner.logit_scale)


_ALONE = """
import sys, open_clip, torch
assert not any(name.startswith("clipdistill") for name in sys.modules)
model, _, transform = open_clip.create_model_and_transforms(sys.argv[1])
pixels = torch.load(sys.argv[2])
with torch.no_grad():
    features = torch.nn.functional.normalize(model.eval().encode_image(pixels), dim=-1)
torch.save((features, str(transform)), sys.argv[3])
"""


@pytest.mark.parametrize("name", [VIT, WIDENED])
def test_the_export_loads_with_open_clip_alone(name: str, saved: Path, teacher: FrozenModel, tmp_path: Path) -> None:
    settings = StudentSettings(model=f"timm/{name}", pretrained=str(saved / name), text="teacher")
    student = settings.load([teacher]).eval()
    export_open_clip(student, tmp_path / "student")
    pixels_BCHW = student.pixels(picture())
    torch.save(pixels_BCHW, tmp_path / "pixels.pt")
    arguments = [f"local-dir:{tmp_path / 'student'}", tmp_path / "pixels.pt", tmp_path / "found.pt"]
    subprocess.run([sys.executable, "-c", _ALONE, *map(str, arguments)], cwd=tmp_path, check=True)
    features_BD, transform = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        torch.testing.assert_close(features_BD, student.encode_image(picture()), rtol=0, atol=1e-5)
    assert f"size={student.image_size[0]}" in transform
    mean = timm.data.resolve_data_config(model=student.clip.visual.trunk)["mean"]
    assert str(list(mean)) in transform


@pytest.fixture
def write_timm_config(write_config: Callable[..., Path], saved: Path) -> Callable[..., Path]:
    """Write a config whose student is a tower of timm."""

    def write(**changes: Any) -> Path:
        return write_config(
            student={"model": f"timm/{VIT}", "pretrained": str(saved / VIT), "text": "teacher"} | changes
        )

    return write


def test_a_run_ends_in_a_student_and_a_checkpoint_that_agree(
    write_timm_config: Callable[..., Path], tmp_path: Path
) -> None:
    result = train(load_config(write_timm_config(), ["train.steps=2", "train.save_every=1"]))
    whole, last = load_for_evaluation(str(result.output)), load_for_evaluation(str(result.output), step=2)
    torch.testing.assert_close(whole.encode_image(picture()), last.encode_image(picture()), rtol=0, atol=1e-6)
    identity = json.loads((result.output / "identity.json").read_text())
    assert identity["student"]["image_weights"] is not None


@pytest.mark.parametrize(
    "name", ["efficientvit_b0", "ghostnet_100", "hgnetv2_b0", "lcnet_050", "mobilenetv4_conv_small", "repghostnet_100"]
)
def test_towers_that_widen_pooled_features_reach_the_width_of_the_space(name: str) -> None:
    tower = find_timm_tower(f"timm/{name}")
    with torch.device("meta"):
        model = open_clip.create_model(tower.register(), embed_dim=24, device="meta").eval()
        assert model.encode_image(torch.zeros(1, 3, *tower.preprocess["size"])).shape == (1, 24)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"model": "timm/test_vitt"}, "no architecture of timm; nearest: timm/test_vit"),
        ({"model": "timm/test_vit.r161_in1k"}, "tag r161_in1k: unknown; allowed: r160_in1k"),
        ({"model": "timm/test_vit", "pretrained": "nowhere.safetensors"}, "tag nowhere.safetensors: unknown"),
        ({"model": f"timm/{VIT}", "pretrained": "nowhere.safetensors"}, "not its tag; allowed: r160_in1k, or a file"),
        ({"model": "timm/test_vit2"}, "weights of test_vit; allowed: test_vit2"),
        ({"model": "timm/resnet18"}, "weights of test_vit; allowed: resnet18"),
        ({"model": f"timm/{VIT}", "text": "train"}, "text_model: None is not allowed; allowed: a model with a text"),
        ({"model": "timm/mobilenetv5_300m_enc", "pretrained": ""}, "gives no vector of features"),
        ({"model": "ViT-B-32", "pretrained": "", "text_model": "ViT-B-32"}, "text_model: 'ViT-B-32' is not allowed"),
        ({"text": "freeze", "text_model": f"timm/{VIT}"}, "text_model: 'timm/test_vit.r160_in1k' is not allowed"),
    ],
)  # fmt: skip
def test_wrong_names_are_one_line(
    write_timm_config: Callable[..., Path], student: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError) as error:
        train(load_config(write_timm_config(**student)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_of_unusual_geometry_is_refused(saved: Path, teacher: FrozenModel, tmp_path: Path) -> None:
    save_for_hf(timm.create_model(VIT, img_size=96), tmp_path, safe_serialization=True)
    with pytest.raises(InputError, match=r"model_args .*img_size"):
        StudentSettings(model=f"timm/{VIT}", pretrained=str(tmp_path), text="teacher").load([teacher])
