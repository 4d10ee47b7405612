"""Embeddings that were computed elsewhere: a run from them is the run with the model that made them."""

import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.io.jsonl import read_jsonl
from clipdistill.models.class_embeddings import class_embeddings
from clipdistill.models.loading import load_frozen_model
from clipdistill.models.prompts import load_prompts
from clipdistill.training.cache_command import build_cache
from clipdistill.training.trainer import train
from tests.conftest import CLASSES, colour_samples, write_tar

OBJECTIVE = [{"loss": "gkl", "gamma": 0.5}, {"loss": "kl", "over": "captions"}, {"loss": "feature", "weight": 3.0}]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of pictures at the teacher's size, whose pixels need no resizing."""
    for number in (0, 1):
        samples = colour_samples(12, first=12 * number)
        for sample in samples:
            picture = Image.open(BytesIO(sample["png"])).resize((16, 16))
            buffer = BytesIO()
            picture.save(buffer, "PNG")
            sample["png"] = buffer.getvalue()
        write_tar(tmp_path / "small" / f"{number}.tar", samples)
    return tmp_path / "small"


@pytest.fixture
def table(shards: Path, teacher_folder: Path, colours: Path, tmp_path: Path) -> dict[str, Any]:
    """What a user computes with the teacher, in another order than the shards', and scaled."""
    teacher = load_frozen_model(f"local-dir:{teacher_folder}")
    keys, images, captions = [], [], []
    for shard in sorted(shards.iterdir(), reverse=True):
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in sorted({name.partition(".")[0] for name in content}, reverse=True):
            keys.append(f"{shard.stem}/{key}")
            pixels = np.array(Image.open(BytesIO(content[f"{key}.png"])).convert("RGB"))
            images.append(torch.from_numpy(pixels).permute(2, 0, 1))
            captions.append(content[f"{key}.txt"].decode())
    image_ND = 7 * teacher.encode_image(torch.stack(images))
    captions_ND = 0.5 * teacher.encode_tokens(teacher.tokenize(captions))
    classes_CD = class_embeddings(teacher, load_prompts(str(colours / "prompts")))
    return {
        "keys": keys,
        "image": image_ND.numpy(),
        "captions": captions_ND.numpy(),
        "classes": classes_CD.flip(0).numpy(),
        "names": CLASSES[::-1],
        "scale": teacher.logit_scale,
    }


def write(folder: Path, table: dict[str, Any], form: str) -> Path:
    """The table as files."""
    folder.mkdir()
    if form == "npy":
        np.save(folder / "image.npy", table["image"])
        np.save(folder / "captions.npy", table["captions"])
        (folder / "keys.txt").write_text("\n".join(table["keys"]) + "\n")
    else:
        for number, rows in enumerate((slice(0, 10), slice(10, None))):
            columns = {
                "key": table["keys"][rows],
                "image": list(table["image"][rows]),
                "caption": list(table["captions"][rows]),
            }
            pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{number}.parquet")
    np.save(folder / "classes.npy", table["classes"])
    (folder / "classnames.txt").write_text("\n".join(table["names"]) + "\n")
    return folder


@pytest.fixture
def config_of(write_config: Callable[..., Path], shards: Path, tmp_path: Path) -> Callable[..., Any]:
    """The config of a run from the cache of a teacher."""

    def make(name: str, teacher: dict[str, Any], *overrides: str) -> Any:
        config = write_config(teachers=[teacher], objective=OBJECTIVE)
        cache = [
            f"teacher_cache.folder={tmp_path / f'cache-{name}'}",
            "teacher_cache.precision=fp32",
            "data.views=2",
            "data.augmentation={crop_scale: [1, 1]}",
        ]
        changes = [f"data.shards=[{shards}]", f"output={tmp_path / name}", "evaluation.folders=[]", *cache, *overrides]
        return load_config(config, changes)

    return make


def build_and_train(config: Any) -> Path:
    build_cache(config)
    return train(config).output


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_a_run_from_embeddings_is_the_run_with_their_model(
    table: dict[str, Any], config_of: Callable[..., Any], teacher_folder: Path, tmp_path: Path, form: str
) -> None:
    folder = write(tmp_path / "embeddings", table, form)
    teachers = {
        "model": {"model": f"local-dir:{teacher_folder}"},
        "table": {"model": f"embeddings:{folder}", "logit_scale": table["scale"]},
    }
    losses = []
    for name, teacher in teachers.items():
        config = config_of(name, teacher)
        run = build_and_train(config)
        losses.append([record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _drop_row(table: dict[str, Any]) -> None:
    for name in ("keys", "image", "captions"):
        table[name] = table[name][1:]


def _same_key(table: dict[str, Any]) -> None:
    table["keys"][1] = table["keys"][0]


def _fewer_keys(table: dict[str, Any]) -> None:
    table["keys"] = table["keys"][1:]


def _not_a_number(table: dict[str, Any]) -> None:
    table["image"][5, 2] = np.nan


def _narrow_captions(table: dict[str, Any]) -> None:
    table["captions"] = table["captions"][:, :8]


def _integers(table: dict[str, Any]) -> None:
    table["image"] = table["image"].astype(np.int32)


def _other_class(table: dict[str, Any]) -> None:
    table["names"] = ("grey", "blue", "green", "pink")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_row, "no row for 1 of 4 samples of shard 1, such as 's00023'"),
        (_same_key, "key '1/s00023' more than once"),
        (_fewer_keys, "shape (24, 16); allowed: (23, D)"),
        (_not_a_number, "row 5 is zero or not finite"),
        (_narrow_captions, "captions.npy: shape (24, 8); allowed: (24, 16)"),
        (_integers, "image.npy: int32; allowed: (24, D), numbers with a point"),
        (_other_class, "classnames.txt has no class 'red'; allowed: the names of prompts"),
    ],
)
def test_a_table_that_does_not_fit_is_one_line(
    table: dict[str, Any], config_of: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None], message: str
) -> None:
    spoil(table)
    folder = write(tmp_path / "table", table, "npy")
    config = config_of("run", {"model": f"embeddings:{folder}", "logit_scale": 20.0})
    with pytest.raises(InputError) as error:
        build_and_train(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_needs_a_cache_and_a_scale(
    table: dict[str, Any], config_of: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "table", table, "npy")
    with pytest.raises(InputError, match=r"teacher_cache\.folder: '' is not allowed; allowed: a folder that"):
        config_of("run", {"model": f"embeddings:{folder}"}, "teacher_cache.folder=''")
    with pytest.raises(InputError, match=r"teachers\.logit_scale: None"):
        build_cache(config_of("run", {"model": f"embeddings:{folder}"}))
    with pytest.raises(InputError, match=r"student\.text: 'teacher' is not allowed"):
        config_of("run", {"model": f"embeddings:{folder}", "logit_scale": 2.0}, "student.text=teacher")


def test_changed_embeddings_make_another_cache(
    table: dict[str, Any], config_of: Callable[..., Any], tmp_path: Path
) -> None:
    teacher = {"model": f"embeddings:{write(tmp_path / 'table', table, 'npy')}", "logit_scale": 20.0}
    build_cache(config_of("run", teacher))
    table["image"][0] *= -1
    np.save(tmp_path / "table" / "image.npy", table["image"])
    with pytest.raises(InputError, match=r"teacher_cache\.folder"):
        train(config_of("run", teacher))
