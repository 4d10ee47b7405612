"""Every format against the model and against the library that reads it."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer

from clipdistill.export import export_open_clip
from clipdistill.export.onnx_format import load_onnx
from clipdistill.export.parity import image_features, smooth_pictures, text_features, transform_images
from clipdistill.export.tokenizer_files import write_tokenizer
from clipdistill.export.transformers_format import load_transformers, unmapped, write_transformers
from clipdistill.io.resources import resource
from clipdistill.models.loading import load_frozen_model
from clipdistill.models.prompts import load_prompts, shipped_prompt_sets
from tests.conftest import CLASSES, colour_samples
from tests.export.helpers import (
    INT8_FILES,
    ONNX_FILES,
    TEMPLATES,
    Result,
    probabilities_of,
    session,
    snippets_of,
    tower_of,
)

# The formats.


def test_open_clip_loads_the_export(exported: Path, model: Any, pixels: torch.Tensor) -> None:
    loaded = open_clip.create_model_from_pretrained(f"local-dir:{exported}")[0].eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))


def test_weights_may_be_read_by_whoever_may_read_the_config(exported: Path) -> None:
    modes = {path.stat().st_mode for path in exported.iterdir() if path.is_file()}
    assert len(modes) == 1


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_onnx_towers_equal_open_clip_at_any_batch(exported: Path, model: Any, pixels: torch.Tensor, batch: int) -> None:
    texts = ["a red picture", "grey", "", "one word after another " * 9, "blue!"][:batch]
    with torch.no_grad():
        image = model.encode_image(pixels[:batch], normalize=True).numpy()
        text = model.encode_text(open_clip.SimpleTokenizer(context_length=12)(texts), normalize=True).numpy()
    (ours,) = session(exported / "image.onnx").run(None, {"pixel_values": pixels[:batch].numpy()})
    np.testing.assert_allclose(ours, image, rtol=0, atol=1e-5)
    tokenizer = Tokenizer.from_file(str(exported / "tokenizer.json"))
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)])
    (ours,) = session(exported / "text.onnx").run(None, {"input_ids": ids})
    np.testing.assert_allclose(ours, text, rtol=0, atol=1e-5)


def test_onnx_classifier_equals_open_clips_zero_shot_classifier(
    exported: Path, model: Any, pixels: torch.Tensor
) -> None:
    classifier = session(exported / "classifier.onnx")
    (ours,) = classifier.run(None, {"pixel_values": pixels.numpy()})
    np.testing.assert_allclose(ours, probabilities_of(model, pixels).numpy(), rtol=0, atol=1e-5)
    metadata = {key: json.loads(value) for key, value in classifier.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classnames"] == list(CLASSES)
    assert metadata["templates"] == list(TEMPLATES)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    assert (metadata["size"], metadata["mean"], metadata["std"]) == (
        16,
        list(preprocessing["mean"]),
        list(preprocessing["std"]),
    )
    assert load_prompts(exported).classnames == CLASSES


@pytest.mark.parametrize("name", [*ONNX_FILES, *INT8_FILES])
def test_onnx_files_use_only_what_browsers_run(exported: Path, name: str) -> None:
    graph = onnx.load(exported / name)
    onnx.checker.check_model(graph, full_check=True)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 18)]
    assert graph.functions == []
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_int8_files_are_smaller_and_their_loss_is_the_one_stated(exported: Path, colours: Path, model: Any) -> None:
    measured = {row["name"]: row for row in json.loads((exported / "parity.json").read_text())["measured"]}
    preprocess = open_clip.create_model_from_pretrained(f"local-dir:{exported}")[1]
    pictures = [
        sample["png"] for first, count in ((1000, 12), (1012, 9)) for sample in colour_samples(count, first=first)
    ]
    batch = torch.stack([preprocess(open_png(picture)) for picture in pictures])
    expected = probabilities_of(model, batch).numpy()
    classifier = session(exported / "classifier.int8.onnx")
    parts = [batch[:16].numpy(), batch[16:].numpy()]
    ours = np.concatenate([classifier.run(None, {"pixel_values": part})[0] for part in parts])
    row = measured["classifier.int8.onnx"]
    assert row["bound"] is None
    assert row["difference"] == pytest.approx(abs(ours - expected).max(), rel=1e-3)
    assert 0 < row["difference"] < 0.1
    assert row["agreement"] == pytest.approx((ours.argmax(1) == expected.argmax(1)).mean())
    for name, small in zip(ONNX_FILES, INT8_FILES, strict=True):
        assert (exported / small).stat().st_size < (exported / name).stat().st_size


def open_png(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_every_file_is_measured_within_its_bound(exported: Path) -> None:
    report = json.loads((exported / "parity.json").read_text())
    assert report["formats"] == ["open_clip", "transformers", "onnx"]
    assert report["probe"] == "21 images of the data set set (split test)"
    names = {row["name"] for row in report["measured"]}
    assert names == {"open_clip_model.safetensors", "model.safetensors", *ONNX_FILES, *INT8_FILES}
    for row in report["measured"]:
        assert row["megabytes"] == (exported / row["name"]).stat().st_size / 1e6
        assert all(value > 0 for value in row["milliseconds"].values())
        if row["bound"] is not None:
            assert row["difference"] <= row["bound"]
            assert row["agreement"] == 1.0


def test_half_the_size(export: Callable[..., Result], exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    arguments = ("--half", "--formats", "open_clip", "transformers", "--images", 20)
    result = export("--checkpoint", exported, "--output", folder, *arguments)
    assert result.returncode == 0, result.stderr
    for name in ("open_clip_model.safetensors", "model.safetensors"):
        assert {tensor.dtype for tensor in load_file(folder / name).values()} == {torch.float16}
        assert (folder / name).stat().st_size < 0.6 * (exported / name).stat().st_size
    for row in json.loads((folder / "parity.json").read_text())["measured"]:
        assert 1e-5 < row["difference"] < 0.01


# What maps to transformers, and what does not.


UNMAPPED: dict[str, tuple[dict[str, Any], str]] = {
    "timm": ({"vision": {"timm_model_name": "test_resnet", "timm_model_pretrained": False}}, "ResNet, a timm model"),
    "resnet": ({"vision": {"layers": [1, 1, 1, 1], "image_size": 32}}, "ModifiedResNet, not a vision transformer"),
    "attention pooling": ({"vision": {"attentional_pool": True, "attn_pooler_heads": 2}}, "attention pooling"),
    "average pooling": ({"vision": {"pool_type": "avg"}}, "pooling 'avg'"),
    "no ln_pre": ({"vision": {"no_ln_pre": True}}, "no_ln_pre"),
    "layer scale of images": ({"vision": {"ls_init_value": 0.1}}, "image tower: layer scale"),
    "layer scale of texts": ({"text": {"ls_init_value": 0.1}}, "text tower: layer scale"),
    "oblong": ({"vision": {"image_size": [16, 24]}}, "not square"),
    "both ways": ({"text": {"no_causal_mask": True}}, "no causal mask"),
    "class token of texts": ({"text": {"embed_cls": True, "pool_type": "last"}, "custom_text": True}, "embed_cls"),
    "first token": ({"text": {"pool_type": "first"}}, "text tower: pooling 'first'"),
    "legacy end": ({"text": {"pool_type": "eos", "eos_id": 2}}, "id 2"),
    "projection with bias": ({"text": {"proj_bias": True}, "custom_text": True}, "projection with bias"),
    "logit bias": ({"init_logit_bias": -10}, "logits: a bias"),
    "other blocks": ({"vision": {"qk_norm": True}}, "blocks of another kind"),
    "epsilon": ({"vision": {"norm_kwargs": {"eps": 1e-6}}}, ""),
}


@pytest.mark.parametrize("name", UNMAPPED)
def test_what_does_not_map_is_named(name: str, tmp_path: Path) -> None:
    changes, reason = UNMAPPED[name]
    found = unmapped(tower_of(tmp_path, **changes))
    assert len(found) == bool(reason), found
    assert all(reason in each for each in found)


MAPPED: dict[str, dict[str, Any]] = {
    "quick_gelu": {"quick_gelu": True},
    "tanh": {"vision": {"act_kwargs": {"approximate": "tanh"}}},
    "own text module, end of text": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": 49407}},
    "linear projection": {"custom_text": True, "text": {"proj_type": "linear"}},
    "epsilon": {"vision": {"norm_kwargs": {"eps": 1e-3}}, "text": {"norm_kwargs": {"eps": 1e-4}}},
    "wide": {"embed_dim": 24, "vision": {"mlp_ratio": 2.5, "width": 48}, "text": {"heads": 1, "layers": 3}},
}


@pytest.mark.parametrize("name", MAPPED)
def test_what_maps_computes_the_same(name: str, tmp_path: Path, pixels: torch.Tensor) -> None:
    tower = tower_of(tmp_path, **MAPPED[name])
    for parameter in tower.clip.parameters():  # far from the start, where activations hardly differ
        if parameter.ndim > 1:
            parameter.data.mul_(2)
    assert unmapped(tower) == []
    assert write_tokenizer(tower, tmp_path, ["a cat"]) is None
    write_transformers(tower, tmp_path)
    loaded = load_transformers(tmp_path)
    assert loaded.image is not None
    assert loaded.text is not None
    texts = ["a red picture", "grey", "one word after another " * 9]
    torch.testing.assert_close(loaded.image(pixels), image_features(tower, pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.text(texts), text_features(tower, texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_processor_gives_open_clips_pixels(tmp_path: Path, resize_mode: str, interpolation: str) -> None:
    from open_clip.factory import set_model_preprocess_cfg
    from transformers import AutoImageProcessor

    tower = tower_of(tmp_path)
    changed = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    settings = {"resize_mode": resize_mode, "interpolation": interpolation, **changed}
    set_model_preprocess_cfg(tower.clip, {**open_clip.get_model_preprocess_cfg(tower.clip), **settings})
    write_transformers(tower, tmp_path)
    pictures = smooth_pictures(2, height=32, width=96)
    ours = AutoImageProcessor.from_pretrained(tmp_path)(images=pictures, return_tensors="pt").pixel_values
    difference = (ours - transform_images(tower, pictures)).abs()
    assert difference.mean() < 1 / 255 / 0.2
    other = {"shortest": "squash", "squash": "shortest"}[resize_mode]
    set_model_preprocess_cfg(tower.clip, {**open_clip.get_model_preprocess_cfg(tower.clip), "resize_mode": other})
    assert (ours - transform_images(tower, pictures)).abs().mean() > 0.1


# The tokenizer.


def test_tokenizer_file_gives_open_clips_ids_of_every_shipped_prompt(tmp_path: Path) -> None:
    tower = tower_of(tmp_path, text={"context_length": 77})
    sets = [load_prompts(name) for name in shipped_prompt_sets()]
    texts = [text for prompts in sets for text in prompts.texts_of(0)]
    texts += [template.replace("{c}", "cat") for prompts in sets for template in prompts.templates]
    assert len(texts) > 2000
    assert write_tokenizer(tower, tmp_path, texts) is None


def test_tokenizer_of_a_model_with_its_own_vocabulary(tmp_path: Path) -> None:
    teacher = load_frozen_model(f"local-dir:{resource('weights', 'icons-teacher')}")
    assert write_tokenizer(teacher, tmp_path, load_prompts("icons").texts()) is None
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 16


def test_tokenizer_that_cannot_be_told_to_others_is_named(tmp_path: Path) -> None:
    tower = tower_of(tmp_path)
    tower.tokenizer = open_clip.SimpleTokenizer(context_length=12, clean="canonicalize")
    reason = write_tokenizer(tower, tmp_path, ["a cat", "a cat, a dog"])
    assert reason == "tokenizer: other ids than open_clip's for 'a cat, a dog'"
    assert list(tmp_path.glob("*token*")) == []


def cleaning_model(root: Path, *, own_vocabulary: bool) -> Path:
    """A model's folder whose tokenizer canonicalizes texts, as SigLIP's do: CLIP's own, or one of its own files."""
    text: dict[str, Any] = {"tokenizer_kwargs": {"clean": "canonicalize"}}
    if own_vocabulary:
        text |= {"vocab_size": 2048, "hf_tokenizer_name": str(resource("weights", "icons-teacher"))}
    export_open_clip(tower_of(root, text=text), root / "cleaning")
    return root / "cleaning"


@pytest.mark.parametrize("own_vocabulary", [False, True])
@pytest.mark.slow
def test_model_for_which_only_open_clip_tokenizes(
    export: Callable[..., Result],
    tmp_path: Path,
    beside_a_picture: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
    own_vocabulary: bool,
) -> None:
    """The whole export succeeds, says why, and leaves no file that would give ONNX other ids than the model's."""
    folder = tmp_path / "out"
    checkpoint = cleaning_model(tmp_path, own_vocabulary=own_vocabulary)
    result = export("--checkpoint", checkpoint, "--output", folder, "--images", 2)
    assert result.returncode == 0, result.stderr
    reason = "tokenizer: other ids than open_clip's for 'a photo of a cat.'"
    note = f"Only open_clip tokenizes for this model ({reason})."
    report = json.loads((folder / "parity.json").read_text())
    assert (report["formats"], report["left_out"]) == (["open_clip", "onnx"], {"transformers": reason})
    assert note in report["notes"]
    assert {row["name"] for row in report["measured"]} == {"open_clip_model.safetensors", "image.onnx", "text.onnx"}
    card = (folder / "README.md").read_text()
    assert note in card
    assert "as only open_clip's tokenizer of this model gives them" in card
    assert "tokenizer.json" not in card
    assert (folder / "tokenizer.json").is_file() == own_vocabulary

    texts = ["A cat, a dog!", "it's_a  (red) picture.", "grey"]
    model = open_clip.create_model_from_pretrained(f"local-dir:{checkpoint}")[0].eval()
    ids = open_clip.get_tokenizer(f"local-dir:{checkpoint}")(texts)
    with torch.no_grad():
        expected = model.encode_text(ids, normalize=True)
    (ours,) = session(folder / "text.onnx").run(None, {"input_ids": ids.numpy()})
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-5)
    loaded = load_onnx(folder / "text.onnx", load_frozen_model(f"local-dir:{folder}"))
    assert loaded.text is not None
    torch.testing.assert_close(loaded.text(texts), expected, rtol=0, atol=1e-5)

    beside_a_picture(folder)
    guesses = []
    for snippet in snippets_of(folder):
        exec(snippet, {})
        guesses.append(capsys.readouterr().out.splitlines()[-1])
    assert len(guesses) == 2
    assert set(guesses) <= {"a cat", "a dog", "a car"}


def test_onnx_alone_of_a_model_for_which_only_open_clip_tokenizes(
    export: Callable[..., Result],
    tmp_path: Path,
    beside_a_picture: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without open_clip's files nothing in the folder tokenizes: the card's example is of images."""
    folder = tmp_path / "out"
    checkpoint = cleaning_model(tmp_path, own_vocabulary=False)
    result = export("--checkpoint", checkpoint, "--output", folder, "--formats", "onnx", "--images", 2)
    assert result.returncode == 0, result.stderr
    (snippet,) = snippets_of(folder)
    beside_a_picture(folder)
    exec(snippet, {})
    numbers = re.findall(r"-?\d\.\d+(?:e-?\d+)?", capsys.readouterr().out)
    assert np.linalg.norm([float(number) for number in numbers]) == pytest.approx(1, abs=1e-3)
