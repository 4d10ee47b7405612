"""The model card: metadata, content, and snippets that run."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.export.parity import smooth_pictures
from tests.conftest import CLASSES
from tests.export.helpers import Result, assert_refused, copied, probabilities_of, snippets_of

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


def test_results_of_the_same_weights_go_into_the_card(
    export: Callable[..., Result], run_folder: Path, teacher_folder: Path, colours: Path, tmp_path: Path
) -> None:
    for name, model in {"own": run_folder, "other": teacher_folder}.items():
        command = ["evaluate", "--model", model, "--data", colours / "set", "--output", tmp_path / name]
        assert main([*map(str, command), "--attack", "pgd", "--eps", "2/255"]) == 0
    (details,) = (tmp_path / "own").glob("*/details/*.json")
    value = json.loads(details.read_text())["record"]["metrics"]["robust_acc1"]
    arguments = ("--checkpoint", run_folder, "--output", tmp_path / "export", "--formats", "open_clip")
    assert export(*arguments, "--results", tmp_path / "own").returncode == 0
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"| set | attack (PGD, linf, 21 images) | robust_acc1@2/255 | {value:.4f} |" in card
    assert "| set | zero-shot classification | acc1 |" in card
    assert "and by `clipdistill evaluate` on the same weights." in card
    metadata = ModelCard.load(tmp_path / "export" / "README.md").data
    assert ("attack (PGD, linf, 21 images)", "robust_acc1") in {
        (result.task_name, result.metric_name) for result in metadata.eval_results
    }
    refused = export(*arguments[:3], tmp_path / "again", "--results", tmp_path / "other")
    assert_refused(refused, "--results", "none of this model's weights in fp32")
    assert not (tmp_path / "again").exists()


def test_card_of_a_retrieval_set(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path) -> None:
    """Its main metric stands for it, and its results are not called a classification."""
    run = copied(tmp_path, teacher_folder)
    metrics = {"image_retrieval_recall@5": 0.75, "mean_recall@1": 0.25, "image_retrieval_recall@10": None}
    record = {"dataset": "captions", "task": "zeroshot_retrieval", "metrics": metrics}
    (run / "config.yaml").write_text("{}")
    (run / "summary.json").write_text(json.dumps({"evaluations": [record]}))
    arguments = ("--formats", "open_clip", "--images", 2, "--benchmark", "captions=someone/captions")
    folder = tmp_path / "out"
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
            {"model": "embeddings:/home/me/vectors"},
            {"model": "/home/me/siglip"},
        ],
        "student": {"model": "timm/test_vit.r160_in1k", "pretrained": "r160_in1k", "text": "train"},
        "data": {
            "shards": ["https://user:secret@host/photos/{0..9}.tar?Signature=xyz", "/home/me/photos/train"],
            "batch_size": 4,
        },
        "objective": [{"loss": "kl", "over": "prompts", "temperature": 4.0}, {"loss": "clip", "weight": 0.0}],
        "prompts": "/home/me/labels",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.5}]
    evaluation = {"dataset": "photos", "task": "zeroshot_classification", "metrics": {"acc1": 0.25}}
    (run / "summary.json").write_text(json.dumps({"evaluations": [evaluation]}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ("--checkpoint", run, "--output", tmp_path / "out", "--formats", "open_clip", "--images", 2)
    result = export(*command)
    assert result.returncode == 2
    assert "--prompts: not given, and the run's are not there: " in result.stderr
    prompts = {"classnames": ["red", "blue"], "templates": ["a {c} picture"]}
    (run / "identity.json").write_text(json.dumps({"prompts": prompts}))
    result = export(*command)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == [
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "someone/big-clip",
        "timm/test_vit.r160_in1k",
    ]
    assert [(each.dataset_name, each.metric_value) for each in data.eval_results] == [("photos", 0.25)]
    assert "knowledge-distillation" in data.tags
    for words in (
        "[laion/CLIP-ViT-L-14-laion2B-s32B-b82K](https://huggingface.co/laion/CLIP-ViT-L-14-laion2B-s32B-b82K) | 0.5 |",
        "/someone/big-clip) | 1.0 | cc-by-4.0 |",
        "`https://host/photos/{0..9}.tar`, `photos/train`",
        "class prompts: `me/labels`",
        "timm/test_vit.r160_in1k, from pretrained weights, text tower: train",
        "embeddings:vectors",
        "| kl | prompts | 1.0 | temperature 4.0 |",
        "| loss, last logged | 0.5 |",
        "arXiv:1503.02531",
    ):
        assert words in text
    for secret in ("secret", "Signature", "/home", "2103.00020", "2503.08038"):
        assert secret not in text


def test_card_of_an_inherited_student(export: Callable[..., Result], teacher_folder: Path, tmp_path: Path) -> None:
    run = copied(tmp_path, teacher_folder)
    init = {"from": "/home/me/runs/large", "layers": "last", "width": "largest", "towers": "image"}
    (run / "config.yaml").write_text(yaml.safe_dump({"student": {"model": "ViT-S-16", "text": "train", "init": init}}))
    result = export("--checkpoint", run, "--output", tmp_path / "out", "--formats", "open_clip", "--images", 2)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "out" / "README.md").read_text()
    assert "ViT-S-16, from weights of large (image tower), last layers, largest channels, text tower: train" in text
    assert "/home" not in text


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


@pytest.mark.slow
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
