"""``clipdistill models``: figures against the libraries' own models, filters, the cache, wrong names."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm

from clipdistill.catalogue import find_names
from clipdistill.cli import main


def listed(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The models that the command shows."""
    file = folder / "models.json"
    file.unlink(missing_ok=True)
    assert main(["models", "--cache", str(folder / "cache"), "--json", str(file), *arguments]) == 0
    shown: list[dict[str, Any]] = json.loads(file.read_text())
    return shown


def test_parameters_and_operations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, vit, rn50 = "timm/mobilenetv4_conv_small", "ViT-B-32", "RN50"
    found = {each["name"]: each for each in listed(tmp_path, small, vit, rn50)}
    assert list(found) == [rn50, vit, small]  # largest first
    theirs = timm.create_model("mobilenetv4_conv_small", num_classes=512)
    parameters = sum(each.numel() for each in theirs.parameters()) / 1e6
    assert found[small]["parameters_m"] == pytest.approx(parameters)
    assert found[small]["image_size"] == [224, 224]
    assert found[small]["text_parameters_m"] is None
    tokens, width = 50, 768
    a_layer = 12 * tokens * width**2 + 2 * tokens**2 * width
    expected = 2 * (49 * 32 * 32 * 3 * width + 12 * a_layer + width * 512)
    assert found[vit]["gflops"] == pytest.approx(expected / 1e9, rel=1e-3)
    assert found[vit]["parameters_m"] + found[vit]["text_parameters_m"] == pytest.approx(151.277, abs=0.001)
    assert [found[name]["transformers"] for name in (vit, rn50, small)] == [True, False, False]
    assert "mobilenetv4_conv_small" in "".join(capsys.readouterr().out.split())


def test_limits_order_and_speed(tmp_path: Path) -> None:
    names = ["timm/test_resnet", "timm/test_vit", "timm/test_convnext"]
    assert len(listed(tmp_path, *names)) == 3
    few = listed(tmp_path, *names, "--max-params", "0.35", "--sort", "name")
    assert [each["name"] for each in few] == ["timm/test_convnext", "timm/test_vit"]
    few = listed(tmp_path, *names, "--max-gflops", "0.1", "--top", "1", "--speed", "--batch-size", "2")
    assert [each["name"] for each in few] == ["timm/test_vit"]
    assert few[0]["images_per_second"] > 1


@pytest.mark.parametrize("damage", ["", "cut", "another format"])
def test_figures_come_from_the_cache_unless_it_is_damaged(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listed(tmp_path, "timm/test_vit")
    (file,) = (tmp_path / "cache" / "catalogue").iterdir()
    if damage:
        file.write_text(file.read_text()[:40] if damage == "cut" else '{"timm/test_vit": {"name": 1}}')
    else:  # nothing is built for what is known
        monkeypatch.setattr("open_clip.timm_model.timm.create_model", None)
    assert listed(tmp_path, "timm/test_vit") == before


def test_names() -> None:
    assert find_names(["ViT-B-32"]) == ["ViT-B-32"]  # not those that begin so
    assert {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-32-256"} <= set(find_names(["vit-b-32*"]))
    assert "timm/mobilenetv4_conv_small" in find_names(["mobilenetv4"])
    everything = find_names([])
    assert "ViT-B-16" in everything
    assert "timm/resnet18" in everything
    assert not [name for name in everything if name.startswith("timm/test_")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm/mobilenetv44"], "NAME timm/mobilenetv44: no model of open_clip or timm"),
        (["timm/test_vit", "--max-params", "0.01"], "--max-params: none of 1 models is so small"),
        (["timm/test_vit", "--max-gflops", "-1"], "--max-gflops: -1 is not allowed; allowed: a finite number"),
        (["timm/test_vit", "--sort", "speed"], "--sort speed: without --speed"),
        (["timm/test_vit", "--speed", "--device", "nonsense"], "--device nonsense"),
        (["timm/test_vit", "--json", "nowhere/models.json"], "--json nowhere/models.json: no folder nowhere"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["models", "--cache", str(tmp_path), *arguments])
    except SystemExit as exited:
        code = exited.code
    printed = capsys.readouterr().err
    assert code == 2
    assert message in printed
    assert printed.count("\n") == 1
