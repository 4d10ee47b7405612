"""Classes of all training samples, and the sampling that they decide, over real shards."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdistill.data import Augmentation, StreamLoader, expand_urls, index_shards
from clipdistill.data.class_lists import find_class_lists
from clipdistill.data.labels import count_classes, read_labels, sampling_weights
from clipdistill.data.sample import Decoder
from clipdistill.errors import InputError
from clipdistill.models.prompts import PromptSet
from tests.conftest import COLOURS, png, write_tar
from tests.streams import make_stream

PROMPTS = PromptSet(name="pets", classnames=("cat", "dog", "owl"), templates=("{c}",))
LABELS = [0] * 20 + [1] * 5 + [2, "", 1, 2]
"""Of 29 samples in three shards; one has none."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    samples = [
        {
            "key": f"{number:02d}",
            "png": png(COLOURS[number % 4], seed=number),
            **({"cls": label} if label != "" else {}),
        }
        for number, label in enumerate(LABELS)
    ]
    for shard, part in enumerate((samples[:12], samples[12:13], samples[13:])):
        write_tar(tmp_path / "shards" / f"{shard}.tar", part)
    return tmp_path / "shards"


def index_of(folder: Path):
    return index_shards(expand_urls([str(folder)]), cache_dir=None)


def decoder(folder: Path, **settings):
    lists = find_class_lists(expand_urls([str(folder)]), PROMPTS)
    return Decoder(image_size=8, augmentation=None, class_lists=lists, **settings)


def read(folder: Path, cache: Path | None = None, **settings) -> list[int]:
    return np.concatenate(read_labels(index_of(folder), decoder(folder, **settings), cache_dir=cache)).tolist()


def test_labels_are_those_of_the_samples_in_their_order(folder: Path, tmp_path: Path) -> None:
    expected = [-1 if label == "" else label for label in LABELS]
    assert read(folder) == expected
    assert read(folder, tmp_path / "cache") == expected
    assert len(list((tmp_path / "cache" / "labels").iterdir())) == 3
    assert count_classes(read_labels(index_of(folder), decoder(folder), cache_dir=None), 3) == [20, 6, 2]


def test_kept_labels_are_read_again_when_anything_they_come_from_changes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = read(folder, cache)
    (folder / "classnames.txt").write_text("dog\ncat\nowl\n")
    assert read(folder, cache) == [{0: 1, 1: 0}.get(label, label) for label in first]
    (folder / "classnames.txt").unlink()
    assert set(read(folder, cache, label_key="kind")) == {-1}
    write_tar(folder / "1.tar", [{"key": "12", "png": png(COLOURS[0]), "cls": 2}])
    assert read(folder, cache) == [*first[:12], 2, *first[13:]]
    for file in (cache / "labels").iterdir():
        file.write_text(file.read_text().replace("[0", "[1", 1))
    assert read(folder, cache) == [*first[:12], 2, *first[13:]]


def test_labels_that_cannot_be_read_now_are_no_missing_labels(folder: Path, tmp_path: Path) -> None:
    index, cache = index_of(folder), tmp_path / "cache"
    (folder / "0.tar").rename(tmp_path / "0.tar")
    with pytest.raises(InputError, match=r"0\.tar: labels cannot be read: .*; allowed: readable shards"):
        read_labels(index, decoder(folder), cache_dir=cache)
    (tmp_path / "0.tar").rename(folder / "0.tar")
    assert np.concatenate(read_labels(index, decoder(folder), cache_dir=cache)).tolist() == read(folder)


def test_counts_are_those_that_training_sees(folder: Path) -> None:
    """An adjustment by frequency beside a sampling by class changes nothing."""
    labels = read_labels(index_of(folder), decoder(folder), cache_dir=None)
    weights = sampling_weights(labels, "class")
    assert count_classes(labels, 3, weights=weights) == pytest.approx([28 / 3] * 3)


def test_a_label_of_no_class_is_refused_before_the_first_step(folder: Path) -> None:
    write_tar(folder / "3.tar", [{"key": "x", "png": png(COLOURS[0]), "cls": 7}])
    with pytest.raises(InputError, match=r"3\.tar: sample 'x' has cls 7, allowed: 0 to 2"):
        read(folder)


@pytest.mark.parametrize(("sampling", "power"), [("square_root", 0.5), ("class", 0.0)])
def test_weights_give_classes_their_share(folder: Path, sampling: str, power: float) -> None:
    labels = read_labels(index_of(folder), decoder(folder), cache_dir=None)
    weights = sampling_weights(labels, sampling)
    label_N = np.concatenate(labels)
    assert weights.sum() == pytest.approx(len(LABELS))
    assert weights[label_N == -1] == pytest.approx([1.0])
    shares = np.array([20, 6, 2]) ** power
    for label, share in enumerate(shares / shares.sum()):
        of_class = weights[label_N == label]
        assert of_class.sum() == pytest.approx(28 * share)
        assert of_class.min() == pytest.approx(of_class.max())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_by_class_repeats_samples_in_other_views_and_resumes_exactly(folder: Path, workers: int) -> None:
    index = index_of(folder)
    weights = sampling_weights(read_labels(index, decoder(folder), cache_dir=None), "class")

    def load(**settings):
        changes = Augmentation(crop_scale=(0.3, 1.0), rotate=30)
        stream = make_stream(
            index, batch_size=4, image_size=8, seed=3, shuffle=9, augmentation=changes, weights=weights,
            num_workers=workers, **settings,
        )  # fmt: skip
        return StreamLoader(stream)

    batches = list(islice(load(), 70))
    labels = Counter(torch.cat([batch.labels_B for batch in batches]).tolist())
    assert len(batches) * 4 == labels.total()
    for label in range(3):
        assert labels[label] == pytest.approx(28 / 29 / 3 * 280, rel=0.1)
    first = [batch for batch in batches if batch.epoch == 0]
    pictures = [
        image.numpy().tobytes()
        for batch in first
        for key, image in zip(batch.keys, batch.image_BCHW, strict=True)
        if key == "28"
    ]
    assert len(pictures) == len(set(pictures)) > 3
    views = [image.numpy().tobytes() for batch in islice(load(views=3), 70) for image in batch.image_BCHW[
        [key == "28" for key in batch.keys]
    ]]  # fmt: skip
    times = Counter(views)
    assert len(times) == 3
    assert max(times.values()) < 1.6 * min(times.values())

    for stop in (3, 11):
        before = load()
        list(islice(before, stop))
        after = load()
        after.load_state_dict([before.state_dict()])
        for batch, expected in zip(islice(after, 9), batches[stop : stop + 9], strict=True):
            assert batch.keys == expected.keys
            assert torch.equal(batch.image_BCHW, expected.image_BCHW)
