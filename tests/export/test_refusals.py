"""Bad input, and exports that differ from the model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clipdistill.errors import InputError
from clipdistill.export import export_open_clip
from clipdistill.export.build import write_formats
from clipdistill.export.parity import ParityError
from clipdistill.io.resources import resource
from clipdistill.models.towers import Tower
from tests.export.helpers import Result, assert_refused, copied, tower_of

# Bad input, and models that differ.


def damaged(root: Path, teacher: Path) -> Path:
    copy = copied(root, teacher)
    weights = copy / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return copy


def not_a_number(root: Path, teacher: Path) -> Path:
    copy = copied(root, teacher)
    state = load_file(copy / "open_clip_model.safetensors")
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, copy / "open_clip_model.safetensors")
    return copy


def other_architecture(root: Path, teacher: Path) -> Path:
    copy = copied(root, teacher)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    return copy


def damaged_config(root: Path, teacher: Path) -> Path:
    copy = copied(root, teacher)
    (copy / "config.yaml").write_text("teachers: [")
    return copy


def without_student(root: Path, teacher: Path) -> Path:
    (root / "empty" / "checkpoints").mkdir(parents=True)
    return root / "empty"


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "damaged": (damaged, ("copy", "cannot be loaded")),
    "not a number": (not_a_number, ("copy", "image features are not finite")),
    "other architecture": (other_architecture, ("copy", "weights do not match the architecture")),
    "no student": (without_student, ("empty", "no open_clip_config.json")),
    "damaged config": (damaged_config, ("copy", "config.yaml, identity.json or summary.json is damaged")),
    "nothing": (lambda root, _: root / "none", ("none", "unknown")),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path, name: str) -> None:
    make, words = BAD_CHECKPOINTS[name]
    output = tmp_path / "out"
    assert_refused(export("--checkpoint", make(tmp_path, teacher_folder), "--output", output), *words)
    assert not output.exists()


BAD_ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "format": (("--formats", "open_clip", "coreml"), ("--formats coreml", "open_clip, transformers, onnx")),
    "prompts": (("--prompts", "imagenet"), ("imagenet", "imagenet-1k")),
    "data": (("--data", "/no/such"), ("/no/such", "no such folder")),
    "repo id": (("--push-to-hub", "some one/model"), ("--push-to-hub 'some one/model'", "OWNER/NAME")),
    "no owner": (("--push-to-hub", "model"), ("'model'", "no owner")),
    "data set id": (("--datasets", "a/b/c"), ("data set 'a/b/c'", "OWNER/NAME")),
    "benchmark": (("--benchmark", "icons"), ("--benchmark icons", "SET=OWNER/NAME")),
    "benchmark id": (("--benchmark", "icons=a--b/c"), ("'a--b/c'", "OWNER/NAME")),
    "private": (("--private",), ("--private: given without --push-to-hub", "only together with --push-to-hub")),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path, name: str) -> None:
    arguments, words = BAD_ARGUMENTS[name]
    output = tmp_path / "out"
    assert_refused(export("--checkpoint", teacher_folder, "--output", output, *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_target_that_exists(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path) -> None:
    assert_refused(export("--checkpoint", teacher_folder, "--output", tmp_path), f"--output {tmp_path}: exists")


def test_format_that_is_required_and_does_not_map(export: Callable[..., Result], tmp_path: Path) -> None:
    icons = resource("weights", "icons-teacher")
    result = export("--checkpoint", icons, "--output", tmp_path / "out", "--formats", "open_clip,transformers")
    assert_refused(result, "--formats transformers", "ResNet, a timm model", "allowed here: open_clip, onnx")
    assert list(tmp_path.iterdir()) == []


def test_formats_that_are_not_possible_are_named_and_the_rest_is_written(
    export: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timm tower, on a machine without onnxruntime."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    icons, output = resource("weights", "icons-teacher"), tmp_path / "out"
    result = export("--checkpoint", icons, "--output", output, "--images", 2)
    assert result.returncode == 0, result.stderr
    assert "not written: transformers: CLIPModel has no place for: image tower: ResNet, a timm model" in result.stdout
    assert "not written: onnx: onnxruntime: not installed; allowed: pip install" in result.stdout
    assert "ResNet, a timm model" in (output / "README.md").read_text()
    assert json.loads((output / "parity.json").read_text())["formats"] == ["open_clip"]
    required = export("--checkpoint", icons, "--output", tmp_path / "other", "--formats", "onnx")
    assert_refused(required, "--formats onnx", "pip install 'clipdistill[onnx]'")


def test_export_that_differs_fails_and_leaves_nothing(
    export: Callable[..., Result], teacher_folder: Path, tmp_path: Path
) -> None:
    """With a bound that no other runtime's rounding can meet."""
    output = tmp_path / "out"
    result = export("--checkpoint", teacher_folder, "--output", output, "--parity-bound", 1e-12)
    assert_refused(result, "model.safetensors: differs from the model by", "allowed: at most 1.0e-12", code=1)
    assert list(tmp_path.iterdir()) == []


def test_what_the_weights_do_not_tell_is_found_by_reading_them_back(tmp_path: Path) -> None:
    """A text tower that looks both ways, in a model whose config says that it does not."""
    tower = tower_of(tmp_path)
    tower.clip.attn_mask.zero_()
    with pytest.raises(ParityError, match="features differ by"):
        export_open_clip(tower, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Brancher(nn.Module):
    """An image tower whose path depends on its input, which no static graph can follow."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.visual(pixels) if pixels.sum() > 0 else self.visual(-pixels)


def test_model_that_onnx_cannot_express(tmp_path: Path) -> None:
    tower: Tower = tower_of(tmp_path)
    settings = open_clip.get_model_preprocess_cfg(tower.clip)
    tower.clip.visual = Brancher(tower.clip.visual)
    tower.clip.visual.preprocess_cfg = settings
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=r"^--formats onnx: torch cannot export the graph of image_embeds: .+"
    ) as caught:
        write_formats(tower, tmp_path / "out", formats=["onnx"], images=2)
    assert "\n" not in str(caught.value)
