"""Training on a set whose classes differ in frequency: sampling by class, and adjusted logits, in real runs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipdistill.config import load_config
from clipdistill.data import StreamLoader, expand_urls, index_shards
from clipdistill.errors import InputError
from clipdistill.io.jsonl import read_jsonl
from clipdistill.models.class_embeddings import class_embeddings, similarity_logits
from clipdistill.models.loading import load_frozen_model
from clipdistill.models.prompts import load_prompts
from clipdistill.training.build import load_student_of
from clipdistill.training.trainer import train
from tests.conftest import CLASSES, COLOURS, png, write_tar
from tests.streams import make_stream

COUNTS = (48, 12, 3, 1)


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path) -> Path:
    labels = [label for label, count in enumerate(COUNTS) for _ in range(count)]
    samples = [
        {"key": f"{CLASSES[label]}{number:02d}", "png": png(COLOURS[label], seed=number), "cls": label}
        for number, label in enumerate(labels)
    ]
    for shard, part in enumerate((samples[::2], samples[1::2])):
        write_tar(tmp_path / "tail" / f"{shard}.tar", part)
    return write_config(
        labels="dataset",
        objective=[{"loss": "clip", "over": "prompts"}],
        evaluation={"folders": []},
        data={"shards": [str(tmp_path / "tail")], "batch_size": 16, "workers": 0, "cache": str(tmp_path / "cache")},
        train={"steps": 4, "log_every": 4, "trackers": [], "trace": True},
    )


def test_each_class_is_seen_as_often(config: Path, tmp_path: Path) -> None:
    """In an epoch of 64 samples, a class of 48 and one of 1."""
    train(load_config(config, ["data.sampling=class"]))
    trace = read_jsonl(tmp_path / "run" / "samples" / "rank_00000.jsonl")
    seen = Counter(key.rstrip("0123456789") for line in trace for key in line["keys"])
    assert seen.total() == 64
    for name in CLASSES:
        assert 14 <= seen[name] <= 18
    with pytest.raises(InputError, match=r"^data\.sampling: 'square_root', but the run in .* has 'class'"):
        train(load_config(config, ["data.sampling=square_root"]), resume="auto")


def test_the_adjustment_is_by_the_frequencies_of_the_shards(config: Path, tmp_path: Path) -> None:
    """The loss of the first step, of all samples as one batch, from the untrained student's logits."""
    overrides = ["data.batch_size=64", "train.steps=1", "train.log_every=1", "student.text=teacher"]
    settings = load_config(config, [*overrides, "objective.0.adjustment=0.7"])
    records = read_jsonl(train(settings).output / "metrics.jsonl")

    teachers = [load_frozen_model(settings.teachers[0].model)]
    student = load_student_of(settings, teachers)
    bank_CD = class_embeddings(teachers[0], load_prompts(settings.prompts))
    index = index_shards(expand_urls([str(tmp_path / "tail")]), cache_dir=None)
    batch = next(iter(StreamLoader(make_stream(index, batch_size=64, image_size=16))))
    outputs = student(batch.image_BCHW)
    logits_BC = similarity_logits(outputs.image_BD, bank_CD, outputs.scale, outputs.bias)
    expected = F.cross_entropy(logits_BC + 0.7 * (torch.tensor(COUNTS) / 64).log(), batch.labels_B)
    assert records[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert F.cross_entropy(logits_BC, batch.labels_B).item() != pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.sampling=class", "labels=none", "objective=[{loss: kl}]"],
            r"labels: 'none' .*: dataset, as data\.samp",
        ),
        (["data.sampling=class", "data.samples_per_epoch=64"], r"data\.samples_per_epoch: 64 .*: empty, as data\.samp"),
        (["objective.0.adjustment=1", "labels=teacher"], r"labels: 'teacher' .*: dataset, as clip_prompts has an adj"),
        (["data.sampling=often"], r"data\.sampling: 'often' is not allowed; allowed: square_root, class or empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(config, overrides)
