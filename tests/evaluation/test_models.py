"""Models by all of their names, and what is wrong with one in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.evaluation import evaluate_sets, load_for_evaluation, open_set, predict
from clipdistill.evaluation.encoding import evaluation_transform
from clipdistill.evaluation.models import best_step, fingerprint
from clipdistill.io.resources import resource
from clipdistill.models.towers import Tower
from clipdistill.training.trainer import train

TEXTS = ["a photo of a cat", "arrow left circle", "two", "a picture of many more words than the others"]
TOKENIZER = resource("weights", "icons-teacher")


@pytest.fixture(scope="module")
def run(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6, each evaluated, and a moving average."""
    root = tmp_path_factory.mktemp("trained")
    config: dict[str, Any] = {
        "output": str(root / "run"),
        "teachers": [{"model": f"local-dir:{teacher_folder}"}],
        "student": {"model": str(tiny_model), "text": "teacher"},
        "data": {"shards": [str(colours / "train")], "batch_size": 8, "workers": 0, "cache": str(root / "cache")},
        "prompts": str(colours / "prompts"),
        "objective": [{"loss": "gkl"}],
        "optimizer": {"lr": 0.01},
        "train": {"steps": 6, "save_every": 2, "evaluate_every": 2, "keep": 3, "trackers": [], "ema": 0.5},
        "evaluation": {"folders": [str(colours / "set")]},
    }
    (root / "config.json").write_text(json.dumps(config))
    train(load_config(root / "config.json"))
    return root / "run"


def assert_same(ours: Tower, theirs: Tower) -> None:
    expected = theirs.clip.state_dict()
    assert ours.clip.state_dict().keys() == expected.keys()
    for name, tensor in ours.clip.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_is_its_final_student_and_a_step_the_average_of_then(run: Path) -> None:
    final = load_for_evaluation(str(run))
    assert_same(load_for_evaluation(f"local-dir:{run / 'student'}"), final)
    assert_same(load_for_evaluation(str(run / "student")), final)
    assert_same(load_for_evaluation(str(run), step=6), final)
    early = load_for_evaluation(str(run), step=2)
    saved = load_file(run / "checkpoints" / "step_00000002" / "ema.safetensors")
    assert torch.equal(early.clip.visual.proj, saved["clip.visual.proj"])
    assert not torch.equal(early.clip.visual.proj, final.clip.visual.proj)
    assert fingerprint(final) == fingerprint(load_for_evaluation(str(run / "student"))) != fingerprint(early)


def test_half_precision_is_another_model(teacher_folder: Path, colours: Path) -> None:
    data = open_set(colours / "set")
    whole, half = (load_for_evaluation(str(teacher_folder), precision=name) for name in ("fp32", "bf16"))
    expected, found = (predict(tower, data).logits_NC for tower in (whole, half))
    assert 0 < (found - expected).abs().max() < 0.2
    assert fingerprint(half) != fingerprint(whole)


def test_the_best_step_is_by_a_named_metric(run: Path, tmp_path: Path, colours: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = [{"step": step, "evaluation/x": value} for step, value in ((2, 0.3), (4, 0.5), (6, 0.5), (8, 0.9))]
    with (copy / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert best_step(copy, "evaluation/x") == 4
    scores = {}
    for step in (2, 4, 6):
        (record,) = evaluate_sets(load_for_evaluation(str(copy), step=step), [open_set(colours / "set")], model="x")
        scores[step] = record["metrics"]["acc1"]
    assert scores[best_step(copy)] == max(scores.values())
    with pytest.raises(
        InputError,
        match=r"--best loss_of_hope: no checkpoint in .* has a value of it in metrics.jsonl; allowed: a metric",
    ):
        best_step(copy, "loss_of_hope")


def test_bad_checkpoints(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with pytest.raises(InputError, match="no checkpoint of step 3; allowed: 2, 4, 6"):
        load_for_evaluation(str(copy), step=3)
    weights = copy / "checkpoints" / "step_00000004" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"ema\.safetensors differs from what was written"):
        load_for_evaluation(str(copy), step=4)
    shutil.rmtree(copy / "student")
    with pytest.raises(InputError, match=r"no open_clip_config\.json in it or in student/.*--step or --best"):
        load_for_evaluation(str(copy))


def clip_config(activation: str, *, legacy: bool = False) -> transformers.CLIPConfig:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    last = len(tokenizer) + 3
    layers: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    return transformers.CLIPConfig(
        text_config={
            **layers,
            "hidden_act": activation,
            "vocab_size": last,
            "max_position_embeddings": 14,
            "eos_token_id": 2 if legacy else tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": 24,
        },
        vision_config={
            **layers,
            "hidden_act": activation,
            "image_size": 32,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
            "projection_dim": 24,
        },
        projection_dim=24,
    )


@pytest.fixture(scope="module")
def save_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, transformers.CLIPModel]]:
    """Write a CLIP model of transformers with random weights, its tokenizer and its processor."""

    def save(activation: str = "quick_gelu", *, legacy: bool = False) -> tuple[Path, transformers.CLIPModel]:
        folder = tmp_path_factory.mktemp("transformers") / "clip"
        torch.manual_seed(3)
        model = transformers.CLIPModel(clip_config(activation, legacy=legacy)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "logit_scale":
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], resample=2
        )
        processor.save_pretrained(folder)
        return folder, model

    return save


@pytest.mark.parametrize(
    ("activation", "legacy"),
    [("quick_gelu", False), ("gelu", False), ("gelu_pytorch_tanh", False), ("gelu", True)],
)
@torch.no_grad()
def test_a_clip_of_transformers_computes_the_same(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], activation: str, legacy: bool
) -> None:
    folder, model = save_clip(activation, legacy=legacy)
    tower = load_for_evaluation(str(folder))
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = model.get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(tower.clip.encode_image(images), theirs, rtol=1e-5, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=14, truncation=True, return_tensors="pt"
    )
    theirs = torch.nn.functional.normalize(model.get_text_features(input_ids=words.input_ids).pooler_output, dim=-1)
    torch.testing.assert_close(tower.encode_tokens(tower.tokenize(TEXTS)), theirs, rtol=1e-5, atol=1e-5)
    assert tower.clip.logit_scale.item() == pytest.approx(model.logit_scale.item())
    assert tower.pixels.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    assert tower.pixels.interpolation == "bilinear"


def test_a_clip_of_transformers_is_evaluated(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], colours: Path
) -> None:
    """End to end, its own processor and tokenizer on the other side."""
    folder, model = save_clip()
    data = open_set(colours / "set")
    found = predict(load_for_evaluation(str(folder)), data)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(data.prompts.texts(), padding="max_length", max_length=14, return_tensors="pt")
    pixels = processor([sample.image() for sample in data.samples()], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(input_ids=words.input_ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(found.logits_NC, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("form", ["safetensors in parts", "bin", "bin in parts"])
def test_weights_of_transformers_in_every_form(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], tmp_path: Path, form: str
) -> None:
    folder, model = save_clip()
    expected = load_for_evaluation(str(folder))
    (folder / "model.safetensors").unlink()
    if form == "safetensors in parts":
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    elif form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        names = list(model.state_dict())
        parts = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(names)}
        for part in set(parts.values()):
            torch.save({n: t for n, t in model.state_dict().items() if parts[n] == part}, folder / part)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    assert_same(load_for_evaluation(str(folder)), expected)


def test_parts_of_weights_are_beside_their_index(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], tmp_path: Path
) -> None:
    folder, _ = save_clip()
    (folder / "model.safetensors").rename(folder.parent / "stray.safetensors")
    with pytest.raises(InputError, match=r"has no weights; allowed: model.safetensors or pytorch_model.bin, whole or"):
        load_for_evaluation(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../stray.safetensors"}}))
    with pytest.raises(InputError, match=r"names '../stray.safetensors', which is not a file beside it"):
        load_for_evaluation(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
        {"size": {"height": 32, "width": 32}},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_the_switches_of_an_image_processor_count(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], settings: dict[str, Any]
) -> None:
    folder, _ = save_clip()
    transformers.CLIPImageProcessor.from_pretrained(folder, **settings).save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8))
    expected = transformers.CLIPImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values[0]
    ours = evaluation_transform(load_for_evaluation(str(folder)))(image)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.05 * float(expected.std()))


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"do_center_crop": False}, {"size": {"shortest_edge": 40}}])
def test_an_image_processor_that_open_clip_cannot_express_is_refused(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], settings: dict[str, Any]
) -> None:
    folder, _ = save_clip()
    transformers.CLIPImageProcessor.from_pretrained(folder, **settings).save_pretrained(folder)
    with pytest.raises(InputError, match=r"images .* allowed: the model's input size of 32"):
        load_for_evaluation(str(folder))


@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_other_trainers(
    teacher_folder: Path, tiny_model: Path, tmp_path: Path, kind: str, prefix: str, wrapper: str
) -> None:
    state = load_file(teacher_folder / "open_clip_model.safetensors")
    state = {prefix + name: tensor for name, tensor in state.items()}
    file = tmp_path / f"weights.{kind}"
    if kind == "pt":
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    elif wrapper:
        pytest.skip("safetensors holds tensors alone")
    else:
        save_file(state, file)
    assert_same(load_for_evaluation(str(tiny_model), str(file)), load_for_evaluation(f"local-dir:{teacher_folder}"))


def test_weights_that_do_not_fit_are_named_on_both_sides(
    tiny_model: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    state = load_file(teacher_folder / "open_clip_model.safetensors")
    state["visual.projection"] = state.pop("visual.proj")
    save_file(state, tmp_path / "weights.safetensors")
    message = (
        "weights do not match the architecture: 1 missing, such as visual.proj; 1 unexpected, such as visual.projection"
    )
    with pytest.raises(InputError, match=f"{message}$"):
        load_for_evaluation(str(tiny_model), str(tmp_path / "weights.safetensors"))
    torch.save({"model": state, "ema": state}, tmp_path / "two.pt")
    with pytest.raises(InputError, match="holds model and ema; allowed: one set of weights"):
        load_for_evaluation(str(tiny_model), str(tmp_path / "two.pt"))


def _other_depth(folder: Path) -> str:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return "weights do not match the architecture"


def _cut_short(folder: Path) -> str:
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "cannot be loaded: .*"


def _no_safetensors(folder: Path) -> str:
    (folder / "open_clip_model.safetensors").write_bytes(b"weights, honestly")
    return "cannot be loaded: .*"


def _not_a_number(folder: Path, name: str, message: str) -> str:
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state[name].view(-1)[3] = torch.nan
    save_file(state, weights, metadata={"format": "pt"})
    return message


BAD: dict[str, Callable[[Path], str]] = {
    "another architecture": _other_depth,
    "cut short": _cut_short,
    "no safetensors": _no_safetensors,
    "NaN in the image tower": lambda folder: _not_a_number(
        folder, "visual.proj", r"the features of 21 of 21 images of set are not finite \(first: 's01000'\)"
    ),
    "NaN in the text tower": lambda folder: _not_a_number(
        folder, "text_projection", r"the features of 4 of 4 class prompts set are not finite \(first: 'red'\)"
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused_in_one_line(teacher_folder: Path, colours: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(teacher_folder, folder)
    message = BAD[name](folder)
    data = open_set(colours / "set")
    with pytest.raises(InputError, match=message) as caught:
        evaluate_sets(load_for_evaluation(str(folder)), [data], model="x")
    assert "\n" not in str(caught.value)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_bad_models_of_transformers(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], tmp_path: Path
) -> None:
    folder, _ = save_clip()
    copy = tmp_path / "other"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_for_evaluation(str(copy))
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)

    shutil.copytree(folder, copy)
    _edit_config(copy, model_type="siglip")
    refused("model_type 'siglip'; allowed: an architecture like OpenAI's CLIP")
    shutil.copytree(folder, copy)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    _edit_config(copy, vision_config=vision | {"num_hidden_layers": 3})
    refused("weights do not match the architecture: .*resblocks.2")
    shutil.copytree(folder, copy)
    _edit_config(copy, vision_config=vision | {"hidden_act": "relu"})
    refused("activations quick_gelu and relu")
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-64])
    refused("cannot be loaded: SafetensorError")
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    refused("cannot be loaded: .*model.safetensors")


def test_a_clip_of_transformers_without_its_tokenizer_is_refused(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]], tmp_path: Path
) -> None:
    """transformers makes an empty tokenizer where the files are missing, and every text would be the same."""
    folder = tmp_path / "bare"
    shutil.copytree(save_clip()[0], folder)

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load_for_evaluation(str(folder))
        assert "\n" not in str(caught.value)

    (folder / "tokenizer.json").write_text("{}")
    refused("bare: its tokenizer cannot be loaded: ")
    (folder / "tokenizer.json").unlink()
    refused("bare: has no tokenizer; allowed: a folder with tokenizer.json, or vocab.json and merges.txt")
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text("{}")
    refused("has no tokenizer")
    (folder / "vocab.json").rename(folder / "vocab.txt")  # of another kind than the model's
    refused("its tokenizer's vocabulary has only special tokens; allowed: a folder with")
