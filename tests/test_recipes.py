"""The recipes of CONTRIBUTING: each addition by one file and one line, here of the tests, and it works."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

import clipdistill.data.formats
import clipdistill.evaluation.command
import clipdistill.evaluation.session
import clipdistill.evaluation.tasks
from clipdistill.cli import main
from clipdistill.data import StreamLoader, index_shards
from clipdistill.data.shard_format import BadSampleError, RawSample, ReadAt, ReadContent, ShardLayout
from clipdistill.evaluation import main_metric
from clipdistill.evaluation.tasks import Task
from clipdistill.models.initialisation import INITIALISATIONS, Initialisation
from clipdistill.models.loading import load_frozen_model, load_student
from clipdistill.models.towers import FrozenModel, Student
from clipdistill.settings import union_of, validate
from clipdistill.training.optimizer import OPTIMIZERS, Optimizer, Schedule, parameter_groups, set_learning_rate
from tests.conftest import colour_samples
from tests.streams import make_stream


class Descent(Optimizer):
    """Gradient descent, whose scales and biases learn at half the rate."""

    name: Literal["descent"] = "descent"
    momentum: float = 0.0

    def make(self, student: nn.Module, device: torch.device) -> torch.optim.SGD:
        groups = parameter_groups(student, self.weight_decay)
        groups[1]["lr_scale"] = 0.5
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


def test_an_optimizer() -> None:
    kind = union_of((*OPTIMIZERS, Descent), "name", default="adamw")
    assert validate(kind, {"lr": 0.5}).name == "adamw"
    settings = validate(kind, {"name": "descent", "lr": 0.5, "weight_decay": 0, "warmup_steps": 2})
    layer = nn.Linear(2, 2)
    optimizer = settings.make(layer, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    schedule = Schedule(settings, total_steps=10)
    set_learning_rate(optimizer, schedule.rate(0))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    weight, bias = layer.parameters()
    torch.testing.assert_close(weight, before[0] - 0.25 * weight.grad)
    torch.testing.assert_close(bias, before[1] - 0.125 * bias.grad)


class Zeros(Initialisation):
    """An image projection of zeros."""

    name: Literal["zeros"] = "zeros"

    def apply(self, student: Student, teachers: Sequence[FrozenModel]) -> None:
        with torch.no_grad():
            student.clip.visual.proj.zero_()


def test_a_student_initialisation(tiny_model: Path) -> None:
    kind = union_of((*INITIALISATIONS, Zeros), "name", default="own")
    student = load_student(str(tiny_model))
    before = student.clip.visual.proj.clone()
    validate(kind, {}).apply(student, ())
    assert torch.equal(student.clip.visual.proj, before)
    validate(kind, {"name": "zeros"}).apply(student, ())
    assert not student.clip.visual.proj.any()


class Lines:
    """A sample a line: JSON with base64 members."""

    def scan(self, read_at: ReadAt, size: int, read_content: ReadContent) -> ShardLayout:
        offsets, at = [], 0
        for line in read_at(0, size).splitlines(keepends=True):
            offsets.append(at)
            at += len(line)
        return ShardLayout(offsets=offsets, end=at)

    def read_sample(self, data: bytes, wanted: frozenset[str], raw: RawSample) -> None:
        try:
            sample = json.loads(data)
        except ValueError as error:
            raise BadSampleError("broken line", str(error)) from error
        raw.key = sample.pop("key")
        raw.members |= {name: base64.b64decode(value) for name, value in sample.items() if name in wanted}


def test_a_training_data_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clipdistill.data.formats.FORMATS, ".lines", Lines())
    with (tmp_path / "shard.lines").open("w") as file:
        for sample in colour_samples(12):
            members = {name: value for name, value in sample.items() if name != "key"}
            contents = {name: v if isinstance(v, bytes) else str(v).encode() for name, v in members.items()}
            encoded = {name: base64.b64encode(content).decode() for name, content in contents.items()}
            file.write(json.dumps({"key": sample["key"], **encoded}) + "\n")
        file.write("{\n")
    index = index_shards([str(tmp_path / "shard.lines")], cache_dir=tmp_path)
    assert len(index[0]) == 13
    loader = StreamLoader(make_stream(index, batch_size=13, image_size=16, shuffle=0, num_workers=1))
    (batch,) = islice(loader, 1)
    loader.close()
    assert loader.skipped == {"broken line": 1}
    labels = {sample["key"]: sample["cls"] for sample in colour_samples(12)}
    assert [labels[key] for key in batch.keys] == batch.labels_B.tolist()
    assert set(batch.keys) == set(labels)


class Spread(Task):
    """Mean length of the set's mean image feature: 1 where all images look alike."""

    name = "spread"
    kinds = ("classification",)
    main_metrics = ("spread",)

    def measure(self, evaluator, data, teacher):
        return {"spread": float(evaluator.features(data).image_ND.mean(0).norm())}, {"samples": len(data)}


def test_an_evaluation_task(
    colours: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = (*clipdistill.evaluation.tasks.SET_TASKS, Spread())
    for module in (clipdistill.evaluation.tasks, clipdistill.evaluation.session):
        monkeypatch.setattr(module, "SET_TASKS", tasks)
    monkeypatch.setattr(clipdistill.evaluation.command, "TASKS", ("auto", "spread"))
    model = f"local-dir:{teacher_folder}"
    command = ["evaluate", "--model", model, "--data", str(colours / "set"), "--cache", str(tmp_path / "cache")]
    assert main([*command, "--task", "spread", "--output", str(tmp_path / "spread.json")]) == 0
    record = json.loads((tmp_path / "spread.json").read_text())
    clip, preprocess = open_clip.create_model_from_pretrained(model)
    pictures = [Image.open(io.BytesIO(sample["png"])).convert("RGB") for sample in colour_samples(21, first=1000)]
    with torch.no_grad():
        images = clip.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    assert record["task"] == "spread"
    assert main_metric(record)[1] == pytest.approx(float(images.mean(0).norm()), rel=1e-5)
    assert main([*command, "--output", str(tmp_path / "auto.json")]) == 0
    assert json.loads((tmp_path / "auto.json").read_text())["task"] == "zeroshot_classification"


def test_the_defaults_of_the_recipes_are_in_a_config(write_config: Callable[..., Path], teacher_folder: Path) -> None:
    from clipdistill.config import load_config, to_dict

    config = to_dict(load_config(write_config()))
    assert config["optimizer"]["name"] == "adamw"
    assert config["student"]["init"] == {"name": "own"}
    assert load_frozen_model(f"local-dir:{teacher_folder}").training is False
