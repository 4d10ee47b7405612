"""Small real things that several tests share: shards on disk, tiny models, runs."""

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CLASSES = ("red", "green", "blue", "grey")
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 40, 220), (128, 128, 128))

TINY_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def png(colour: tuple[int, int, int], *, size: int = 20, seed: int = 0) -> bytes:
    """A noisy picture of one colour."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(-25, 26, (size, size, 3))
    pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """A shard: each sample has a ``key``, and for every other entry a member ``key.entry``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension, value in sample.items():
                if extension != "key":
                    content = value if isinstance(value, bytes) else str(value).encode()
                    member = tarfile.TarInfo(f"{sample['key']}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def colour_samples(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Labelled, captioned pictures of four colours in turn."""
    return [
        {
            "key": f"s{number:05d}",
            "png": png(COLOURS[number % 4], seed=number),
            "txt": f"a {CLASSES[number % 4]} picture",
            "cls": number % 4,
        }
        for number in range(first, first + count)
    ]


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``train/`` (3 uneven shards, 50 samples), ``prompts/`` and ``set/`` (CLIP_benchmark's layout)."""
    root = tmp_path_factory.mktemp("colours")
    for number, (first, count) in enumerate(((0, 20), (20, 17), (37, 13))):
        write_tar(root / "train" / f"{number}.tar", colour_samples(count, first=first))
    (root / "prompts").mkdir()
    (root / "prompts" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "prompts" / "templates.txt").write_text("a {c} picture\n{c}\n")
    test = root / "set"
    write_tar(test / "test" / "0.tar", colour_samples(12, first=1000))
    write_tar(test / "test" / "1.tar", colour_samples(9, first=1012))
    (test / "test" / "nshards.txt").write_text("2")
    (test / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (test / "zeroshot_classification_templates.txt").write_text("a {c} picture\n")
    return root


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model config small enough for a test."""
    path = tmp_path_factory.mktemp("models") / "tiny-test-clip.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


@pytest.fixture(scope="session")
def teacher_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with fixed random weights, to be loaded with ``local-dir:``."""
    import torch

    from clipdistill.export import export_open_clip
    from clipdistill.models.loading import load_student

    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    export_open_clip(load_student(str(tiny_model), logit_scale=20.0), folder)
    return folder


@pytest.fixture
def write_config(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a config of a small distillation run; keyword arguments replace top-level keys."""

    def write(**changes: Any) -> Path:
        config: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "teachers": [{"model": f"local-dir:{teacher_folder}"}],
            "student": {"model": str(tiny_model)},
            "data": {
                "shards": [str(colours / "train")],
                "batch_size": 8,
                "workers": 0,
                "shuffle": 16,
                "cache": str(tmp_path / "cache"),
            },
            "prompts": str(colours / "prompts"),
            "objective": [{"loss": "gkl", "gamma": 0.5}],
            "optimizer": {"lr": 0.003},
            "train": {"steps": 6, "log_every": 2, "save_every": 3, "trackers": []},
            "evaluation": {"folders": [str(colours / "set")]},
        }
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(config | changes))
        return path

    return write
