"""The export of a run: every format against the model and against the library that reads it, the card, bad input."""

import argparse
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from clipdistill.config import load_config
from clipdistill.errors import InputError, RunError
from clipdistill.export import export_open_clip
from clipdistill.export.build import write_formats
from clipdistill.export.command import add_arguments
from clipdistill.export.command import run as run_export
from clipdistill.export.onnx_format import load_onnx
from clipdistill.export.parity import ParityError, image_features, smooth_pictures, text_features, transformed
from clipdistill.export.tokenizer_files import write_tokenizer
from clipdistill.export.transformers_format import load_transformers, unmapped, write_transformers
from clipdistill.io.resources import resource
from clipdistill.models.prompts import load_prompts, shipped_prompt_sets
from clipdistill.models.towers import Student, Tower, load_student, load_teacher
from clipdistill.training.trainer import train
from tests.conftest import CLASSES, TINY_MODEL, colour_samples

TEMPLATES = ("a {c} picture", "{c}")
ONNX_FILES = ("image.onnx", "text.onnx", "classifier.onnx")
INT8_FILES = tuple(name.replace(".onnx", ".int8.onnx") for name in ONNX_FILES)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``clipdistill export`` in this process, with the command line's exit codes."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = command(*arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    try:
        run_export(parser.parse_args([str(argument) for argument in arguments]))
    except (InputError, RunError) as error:
        print(f"clipdistill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


@pytest.fixture(scope="module")
def run_folder(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: a tiny vision transformer, distilled from another for four steps."""
    root = tmp_path_factory.mktemp("exported-run")
    config = {
        "output": str(root / "colours-student"),
        "teachers": [{"model": f"local-dir:{teacher_folder}"}],
        "student": {"model": str(tiny_model)},
        "data": {
            "shards": [str(colours / "train")],
            "batch_size": 8,
            "workers": 0,
            "cache": str(root / "cache"),
        },
        "prompts": str(colours / "prompts"),
        "objective": [{"loss": "gkl", "gamma": 0.5}, {"loss": "feature", "weight": 2}],
        "train": {"steps": 4, "log_every": 2, "trackers": []},
        "evaluation": {"folders": [str(colours / "set")]},
    }
    (root / "config.yaml").write_text(json.dumps(config))
    return train(load_config(root / "config.yaml")).output


@pytest.fixture(scope="module")
def exported(run_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of that run, in every format, checked on real images."""
    folder = tmp_path_factory.mktemp("exports") / "all"
    arguments = ("--checkpoint", run_folder, "--output", folder, "--int8", "--data", colours / "set")
    told = ("--license", "mit", "--datasets", "someone/colours", "--benchmark", "set=someone/colours-benchmark:main")
    cache = ("--cache", folder.parent / "cache")
    assert command(*arguments, *told, *cache) == 0
    return folder


@pytest.fixture(scope="module")
def model(run_folder: Path) -> Any:
    """The run's student as open_clip loads it: the oracle of every format."""
    return open_clip.create_model_from_pretrained(f"local-dir:{run_folder / 'student'}")[0].eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def probabilities_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What open_clip's own zero-shot classifier says of the colours."""
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    templates = [lambda name, template=template: template.replace("{c}", name) for template in TEMPLATES]
    bank = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, templates)
    with torch.no_grad():
        return (model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ bank).softmax(dim=-1)


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


def tower_of(tmp_path: Path, **changes: Any) -> Student:
    """A tiny model with changed parts; ``vision`` and ``text`` change their configs."""
    config = {
        **TINY_MODEL,
        **{key: value for key, value in changes.items() if key not in ("vision", "text")},
        "vision_cfg": {**TINY_MODEL["vision_cfg"], **changes.get("vision", {})},
        "text_cfg": {**TINY_MODEL["text_cfg"], **changes.get("text", {})},
    }
    path = tmp_path / f"changed-{abs(hash(json.dumps(config)))}.json"
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    return load_student(str(path)).eval()


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
    difference = (ours - transformed(tower, pictures)).abs()
    assert difference.mean() < 1 / 255 / 0.2
    other = {"shortest": "squash", "squash": "shortest"}[resize_mode]
    set_model_preprocess_cfg(tower.clip, {**open_clip.get_model_preprocess_cfg(tower.clip), "resize_mode": other})
    assert (ours - transformed(tower, pictures)).abs().mean() > 0.1


# The tokenizer.


def test_tokenizer_file_gives_open_clips_ids_of_every_shipped_prompt(tmp_path: Path) -> None:
    tower = tower_of(tmp_path, text={"context_length": 77})
    sets = [load_prompts(name) for name in shipped_prompt_sets()]
    texts = [text for prompts in sets for text in prompts.texts_of(0)]
    texts += [template.replace("{c}", "cat") for prompts in sets for template in prompts.templates]
    assert len(texts) > 2000
    assert write_tokenizer(tower, tmp_path, texts) is None


def test_tokenizer_of_a_model_with_its_own_vocabulary(tmp_path: Path) -> None:
    teacher = load_teacher(f"local-dir:{resource('weights', 'icons-teacher')}")
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
    loaded = load_onnx(folder / "text.onnx", load_teacher(f"local-dir:{folder}"))
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


# The card.


def test_card_metadata(exported: Path, run_folder: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "open_clip"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert (data["license"], data["datasets"]) == ("mit", ["someone/colours"])
    assert "base_model" not in data
    (entry,) = data["model-index"]
    assert entry["name"] == "colours-student"
    summary = json.loads((run_folder / "summary.json").read_text())
    (record,) = summary["evaluations"]
    found = {metric["name"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    expected = {name: value for name, value in record["metrics"].items() if value is not None}
    assert found == pytest.approx(expected, abs=1e-6)
    (result,) = parse_eval_result_entries(yaml.safe_load((exported / ".eval_results" / "set.yaml").read_text()))
    assert (result.dataset_id, result.task_id) == ("someone/colours-benchmark", "main")
    assert result.value == pytest.approx(record["metrics"]["acc1"], abs=1e-6)


def test_card_of_a_retrieval_set(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path) -> None:
    """Its main metric stands for it, and its results are not called a classification; of an older run's log, too."""
    run = copied(tmp_path, teacher_folder)
    metrics = {"image_retrieval_recall@5": 0.75, "mean_recall@1": 0.25, "image_retrieval_recall@10": None}
    logged = {f"evaluation/captions/{name}": value for name, value in metrics.items()}
    (run / "config.yaml").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4} | logged) + "\n")
    record = {"dataset": "captions", "task": "zeroshot_retrieval", "metrics": metrics}
    arguments = ("--formats", "open_clip", "--images", 2, "--benchmark", "captions=someone/captions")
    for name, summary in (("older", {}), ("newer", {"evaluations": [record]})):
        (run / "summary.json").write_text(json.dumps(summary))
        folder = tmp_path / name
        result = export("--checkpoint", run, "--output", folder, *arguments)
        assert result.returncode == 0, result.stderr
        found = ModelCard.load(folder / "README.md").data.eval_results
        assert {each.metric_name: each.metric_value for each in found} == {
            "image_retrieval_recall@5": 0.75,
            "mean_recall@1": 0.25,
        }
        assert {(each.task_type, each.task_name) for each in found} == {("image-text-retrieval", "zero-shot retrieval")}
        (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "captions.yaml").read_text()))
        assert (entry.value, entry.notes) == (0.25, "zero-shot retrieval, mean_recall@1")


def test_card_tells_what_the_run_knows_and_no_path_of_the_machine(
    exported: Path, run_folder: Path, colours: Path, teacher_folder: Path
) -> None:
    card = (exported / "README.md").read_text()
    for words in (
        "| local-dir:tiny | its folder's | 1.0 | unknown |",
        "| gkl | prompts | 1.0 | gamma 0.5 |",
        "| feature | images | 2.0 | kind cosine |",
        "a vision transformer of 2 layers, width 32, patches of 8 pixels, 16 x 16 pixels",
        "| set | zero-shot classification | acc1 | ",
        '4 classes, "a {c} picture"',
        "| steps | 4 |",
        "arXiv:2503.08038",
        "arXiv:2305.13948",
    ):
        assert words in card
    for path in (run_folder.parent, colours, teacher_folder.parent, exported.parent):
        assert str(path) not in card
    report = json.loads((exported / "parity.json").read_text())
    for row in report["measured"]:
        assert f"| {row['name']} | {row['runtime']} | {row['megabytes']:.1f} | {row['difference']:.1e} |" in card


def test_card_of_a_run_with_public_teachers_and_private_paths(
    export: Callable[..., Result], teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teachers are named by their repos, with the licence of a card that is in the Hub's cache; URLs lose secrets."""
    repo = tmp_path / "hub" / "models--someone--big-clip"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# big\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = copied(tmp_path, teacher_folder)
    config = {
        "teachers": [
            {"model": "ViT-L-14", "pretrained": "laion2b_s32b_b82k", "weight": 0.5},
            {"model": "hf-hub:someone/big-clip"},
        ],
        "data": {
            "shards": ["https://user:secret@host/photos/{0..9}.tar?Signature=xyz", "/home/me/photos/train"],
            "batch_size": 4,
        },
        "objective": [{"loss": "kl", "over": "prompts", "temperature": 4.0}, {"loss": "clip", "weight": 0.0}],
        "prompts": "/home/me/labels",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.5}, {"step": 4, "evaluation/photos/acc1": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result = export("--checkpoint", run, "--output", tmp_path / "out", "--formats", "open_clip", "--images", 2)
    assert result.returncode == 0, result.stderr
    assert "without the run's prompt set: " in result.stdout
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == ["laion/CLIP-ViT-L-14-laion2B-s32B-b82K", "someone/big-clip"]
    assert [(each.dataset_name, each.metric_value) for each in data.eval_results] == [("photos", 0.25)]
    assert "knowledge-distillation" in data.tags
    for words in (
        "[laion/CLIP-ViT-L-14-laion2B-s32B-b82K](https://huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K) | 0.5 |",
        "/someone/big-clip) | 1.0 | cc-by-4.0 |",
        "`https://host/photos/{0..9}.tar`, `photos/train`",
        "class prompts: `me/labels`",
        "| kl | prompts | 1.0 | temperature 4.0 |",
        "| loss, last logged | 0.5 |",
        "arXiv:1503.02531",
    ):
        assert words in text
    for secret in ("secret", "Signature", "/home", "2103.00020", "2503.08038"):
        assert secret not in text


def snippets_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def beside_a_picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Go to a folder and put a ``picture.png`` there, as a reader of the card would."""
    pictures = []

    def go(folder: Path) -> None:
        monkeypatch.chdir(folder)
        pictures.append(folder / "picture.png")
        smooth_pictures(1, height=48, width=144)[0].save(pictures[-1])

    yield go
    for picture in pictures:
        picture.unlink()


def picture_pixels(folder: Path) -> torch.Tensor:
    preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")[1]
    return preprocess(smooth_pictures(1, height=48, width=144)[0]).unsqueeze(0)


def scores_of(model: Any, pixels: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """Probabilities of labels in the first template, computed with open_clip alone."""
    tokens = open_clip.SimpleTokenizer(context_length=12)([f"a {name} picture" for name in labels])
    with torch.no_grad():
        image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        return (model.logit_scale.exp() * image @ text.T).softmax(dim=-1)[0]


def test_card_has_three_snippets(exported: Path) -> None:
    assert len(snippets_of(exported)) == 3


def test_snippet_of_open_clip_runs(
    exported: Path, model: Any, beside_a_picture: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = scores_of(model, picture_pixels(exported), CLASSES[:3])
    beside_a_picture(exported)
    exec(snippets_of(exported)[0], {})
    assert capsys.readouterr().out.splitlines()[-1] == CLASSES[int(scores.argmax())]


ALONE = """
import sys
for name in ("open_clip", "clipdistill", "timm", "onnxruntime"):
    sys.modules[name] = None
"""
MORE = """
import json
from transformers import CLIPModel
assert str(CLIPModel.from_pretrained(".").dtype) == "torch.float32"
guesses = classify("picture.png", candidate_labels=labels, hypothesis_template=template)
print(json.dumps({guess["label"]: guess["score"] for guess in guesses}))
"""


def test_snippet_of_transformers_runs_with_nothing_else(
    exported: Path, model: Any, beside_a_picture: Callable[[Path], None]
) -> None:
    """In a process where open_clip, timm and clipdistill cannot be imported."""
    beside_a_picture(exported)
    program = ALONE + snippets_of(exported)[1] + MORE
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    best, scores = done.stdout.splitlines()[-2:]
    expected = scores_of(model, picture_pixels(exported), CLASSES[:3])
    assert best == CLASSES[int(expected.argmax())]
    assert [json.loads(scores)[name] for name in CLASSES[:3]] == pytest.approx(expected.tolist(), abs=1e-3)


def test_snippet_of_onnxruntime_runs(
    exported: Path, model: Any, beside_a_picture: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = probabilities_of(model, picture_pixels(exported))[0]
    beside_a_picture(exported)
    exec(snippets_of(exported)[2], {})
    assert capsys.readouterr().out.splitlines()[-1] == CLASSES[int(expected.argmax())]


def test_model_without_a_run_and_without_prompts(
    export: Callable[..., Result],
    teacher_folder: Path,
    tmp_path: Path,
    beside_a_picture: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The card says what is unknown, and the snippet of onnxruntime compares image and texts; in float16, too."""
    folder = tmp_path / "bare"
    arguments = ("--formats", "onnx", "--images", 3, "--half")
    result = export("--checkpoint", teacher_folder, "--output", folder, *arguments)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in folder.glob("*.onnx")} == {"image.onnx", "text.onnx"}
    weights = sum(tensor.numel() for tensor in load_file(teacher_folder / "open_clip_model.safetensors").values())
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 3 * weights
    differences = {
        row["name"]: row["difference"] for row in json.loads((folder / "parity.json").read_text())["measured"]
    }
    assert all(1e-5 < difference < 0.01 for difference in differences.values())
    card = (folder / "README.md").read_text()
    assert "Training data: unknown." in card
    assert "There is no classifier.onnx: no prompt set was chosen." in card
    assert "3 synthetic pictures" in card
    (snippet,) = snippets_of(folder)
    beside_a_picture(folder)
    exec(snippet, {})
    assert capsys.readouterr().out.splitlines()[-1] in ("a cat", "a dog", "a car")


# Bad input, and models that differ.


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line]
    for word in words:
        assert word in line, line


def damaged(root: Path, teacher: Path) -> Path:
    copy = copied(root, teacher)
    weights = copy / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return copy


def copied(root: Path, teacher: Path) -> Path:
    folder = root / "copy"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


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
    "damaged config": (damaged_config, ("copy", "config.yaml or summary.json is damaged")),
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
    "private": (("--private",), ("--private", "--push-to-hub")),
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
    assert "not written: onnx: onnxruntime: not installed; allowed: after pip install" in result.stdout
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
        InputError, match=r"^--formats onnx: torch cannot translate what gives image_embeds: .+"
    ) as caught:
        write_formats(tower, tmp_path / "out", formats=["onnx"], images=2)
    assert "\n" not in str(caught.value)
