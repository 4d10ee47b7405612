"""What several tests of the export share."""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import open_clip
import torch

from clipdistill.errors import InputError, RunError
from clipdistill.export.command import add_arguments
from clipdistill.export.command import run as run_export
from clipdistill.models.loading import load_student
from clipdistill.models.towers import Student
from tests.conftest import CLASSES, TINY_MODEL

TEMPLATES = ("a {c} picture", "{c}")
ONNX_FILES = ("image.onnx", "text.onnx", "classifier.onnx")
INT8_FILES = tuple(name.replace(".onnx", ".int8.onnx") for name in ONNX_FILES)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    try:
        run_export(parser.parse_args([str(argument) for argument in arguments]))
    except (InputError, RunError) as error:
        print(f"clipdistill: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def probabilities_of(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What open_clip's own zero-shot classifier says of the colours."""
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    templates = [lambda name, template=template: template.replace("{c}", name) for template in TEMPLATES]
    bank = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, templates)
    with torch.no_grad():
        return (model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ bank).softmax(dim=-1)


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.returncode == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line]
    for word in words:
        assert word in line, line


def copied(root: Path, teacher: Path) -> Path:
    folder = root / "copy"
    folder.mkdir()
    for file in teacher.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def snippets_of(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


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
