"""Teachers of any make: against transformers' own results, and against the same model as one of open_clip."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.evaluation import load_for_evaluation, predict
from clipdistill.io.jsonl import read_jsonl
from clipdistill.models.adapted import AdaptedModel
from clipdistill.models.loading import TeacherSettings
from clipdistill.report.page import write_report
from clipdistill.training.cache_command import build_cache
from clipdistill.training.trainer import train
from tests.evaluation.test_models import TOKENIZER, open_set, save_clip  # noqa: F401

TEXTS = ["a red picture", "Grey, indeed!"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, transformers.SiglipModel]:
    """A SigLIP folder of transformers with random weights, its tokenizer and its processor."""
    folder = tmp_path_factory.mktemp("transformers") / "siglip"
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    layers = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**layers, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "projection_size": 24}
    text |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(5)
    config = transformers.SiglipConfig(text_config=text, vision_config={**layers, "image_size": 16, "patch_size": 8})
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5, 0.4, 0.3]).save_pretrained(
        folder
    )
    return folder, model


def test_siglip_of_transformers(siglip: tuple[Path, transformers.SiglipModel], colours: Path) -> None:
    """Features and logits are those of the model with its own processor and tokenizer."""
    folder, model = siglip
    teacher = TeacherSettings(model=f"local-dir:{folder}").load()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(TEXTS, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        mean = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
        theirs = model(input_ids=words, pixel_values=(images / 255 - mean) / 0.5)
    torch.testing.assert_close(teacher.encode_image(images), theirs.image_embeds, rtol=0, atol=1e-5)
    texts_ND = teacher.encode_tokens(teacher.tokenize(TEXTS))
    torch.testing.assert_close(texts_ND, theirs.text_embeds, rtol=0, atol=1e-5)
    logits = teacher.logit_scale * teacher.encode_image(images) @ texts_ND.T + teacher.bias
    torch.testing.assert_close(logits, theirs.logits_per_image, rtol=0, atol=1e-4)
    found = predict(load_for_evaluation(str(folder)), open_set(colours / "set"))
    assert found.logits_NC.shape == (21, 4)


FACTORY = """
import torch, open_clip
from clipdistill.models.loading import load_frozen_model

class Wrapped(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.tower = load_frozen_model("local-dir:" + folder)
        self.image_size, self.logit_scale = self.tower.image_size, self.tower.logit_scale
        self.mean, self.std = self.tower.pixels.mean.flatten().tolist(), self.tower.pixels.std.flatten().tolist()
        self.tokenizer = self.tower.tokenizer

    def encode_image(self, images):
        return 3 * self.tower.clip.encode_image(images)

    def encode_text(self, tokens):
        return 0.5 * self.tower.clip.encode_text(tokens)

def teacher():
    return Wrapped({folder!r})

class Half:
    image_size, logit_scale, fingerprint = 16, 10.0, "v1"
    tokenizer = staticmethod(lambda texts: torch.zeros(len(texts), 4, dtype=torch.long))
    def encode_image(self, images):
        return torch.ones(len(images), 5)
    def encode_text(self, tokens):
        return torch.ones(len(tokens), {text_width})

def half():
    return Half()

def nameless():
    model = Half(); model.fingerprint = None
    return model

def broken():
    raise OSError("no licence")

def not_finite():
    model = Half(); model.encode_image = lambda images: torch.full((len(images), 7), float("nan"))
    return model

def empty():
    return object()
"""


@pytest.fixture
def module(tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A Python module of a user, with factories of teachers."""
    name = f"users_models_{tmp_path.name.replace('-', '_')}"
    text = FACTORY.replace("{folder!r}", repr(str(teacher_folder))).replace("{text_width}", "7")
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


OBJECTIVE = [{"loss": "gkl", "gamma": 0.5}, {"loss": "kl", "over": "captions"}, {"loss": "feature", "over": "captions"}]


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_of_the_user_teaches_as_one_of_open_clip(
    module: str, write_config: Callable[..., Path], teacher_folder: Path, tmp_path: Path, cached: bool
) -> None:
    losses = []
    for name, model in (("own", f"python:{module}:teacher"), ("theirs", f"local-dir:{teacher_folder}")):
        config = write_config(objective=OBJECTIVE, teachers=[{"model": model}])
        changes = [f"output={tmp_path / name}", "evaluation.folders=[]"]
        changes += ["data.views=1", f"teacher_cache.folder={tmp_path / f'cache-{name}'}"] if cached else []
        if cached:
            build_cache(load_config(config, changes))
        run = train(load_config(config, changes)).output
        losses.append([record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    identity = json.loads((tmp_path / "own" / "identity.json").read_text())
    assert len(identity["teachers"][0]["image_weights"]) == 64


def test_a_report_runs_no_code_that_a_run_names(
    module: str, write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    config = write_config(objective=OBJECTIVE[1:2], teachers=[{"model": f"python:{module}:teacher"}])
    run = train(load_config(config, ["train.steps=2"])).output
    monkeypatch.delitem(sys.modules, module)
    said: list[str] = []
    write_report(run, output=tmp_path / "report.html", progress=said.append)
    assert [line for line in said if f"left out teacher python:{module}:teacher" in line]
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("python:nowhere.models:teacher", {}, "No module named 'nowhere'; allowed: a function of a module on sys.path"),
        ("python:{module}:other", {}, "has no attribute 'other'"),
        ("python:{module}", {}, "incomplete; allowed: python:MODULE:FACTORY"),
        ("python:{module}:broken", {}, "broken() failed: OSError: no licence"),
        ("python:{module}:empty", {}, "has no image_size"),
        ("python:{module}:nameless", {}, "has no fingerprint"),
        ("python:{module}:not_finite", {}, "features that are not finite"),
        ("python:{module}:half", {}, "features of shape (1, 5) of 1 image and (2, 7) of 2 texts"),
        ("python:{module}:teacher", {"text": "teacher"}, "student.text: 'teacher' is not allowed; allowed: train"),
        ("python:{module}:teacher", {"init": {"from": "teacher"}}, "which is no open_clip model"),
    ],
)  # fmt: skip
def test_what_is_no_teacher_is_one_line(
    module: str, write_config: Callable[..., Path], tiny_model: Path, model: str, changes: dict[str, str], message: str
) -> None:
    student = {"model": str(tiny_model)} | changes
    with pytest.raises(InputError) as error:
        train(load_config(write_config(teachers=[{"model": model.format(module=module)}], student=student)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_clip_of_transformers_lends_its_text_tower(
    save_clip: Callable[..., tuple[Path, transformers.CLIPModel]],  # noqa: F811
    write_config: Callable[..., Path],
    tiny_model: Path,
) -> None:
    folder, model = save_clip("gelu")
    student = {"model": str(tiny_model), "text": "teacher"}
    teacher = [{"model": f"local-dir:{folder}"}]
    objective = [{"loss": "kl"}, {"loss": "feature"}]
    result = train(load_config(write_config(teachers=teacher, student=student, objective=objective), ["train.steps=2"]))
    shipped = load_for_evaluation(str(result.output))
    words = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=14, return_tensors="pt"
    )
    with torch.no_grad():
        theirs: Tensor = F.normalize(model.get_text_features(input_ids=words.input_ids).pooler_output, dim=-1)
    torch.testing.assert_close(shipped.encode_tokens(shipped.tokenize(TEXTS)), theirs, rtol=0, atol=1e-5)


def test_an_adapted_model_cannot_be_sharded(module: str) -> None:
    teacher = TeacherSettings(model=f"python:{module}:teacher").load()
    assert isinstance(teacher, AdaptedModel)
    with pytest.raises(InputError, match=r"teachers\.shard"):
        teacher.shard(torch.device("cpu"))
