"""The stream and its loader, over real tar files and through real worker processes."""

import io
import json
import logging
import os
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from clipdistill.data import Augmentation, LazyIndex, StreamLoader, expand_urls, index_shards
from clipdistill.data.class_lists import find_class_lists
from clipdistill.data.stream import MOST_LOGGED
from clipdistill.errors import InputError
from clipdistill.models.prompts import PromptSet
from tests.streams import make_stream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SETTINGS = {"batch_size": 4, "image_size": 8, "seed": 5, "shuffle": 6}
CHANGES = Augmentation(crop_scale=(0.3, 1.0), rotate=30, flip=0.5, stroke=0.5, brightness=0.3)


def png(number=0, size=12):
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def good(number):
    return {"__key__": f"{number:04d}", "png": png(number), "txt": f"picture {number}", "cls": number % 10}


def write_shards(folder, sizes, bad=None):
    """Shards of the sizes given, samples numbered throughout; `bad` replaces samples by number."""
    number = 0
    for shard, size in enumerate(sizes):
        with wds.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for _ in range(size):
                tar.write((bad or {}).get(number) or good(number))
                number += 1
    return index_shards(expand_urls([str(folder)]), cache_dir=None)


def load(index, **settings):
    return StreamLoader(make_stream(index, **(SETTINGS | settings)))


def take(loader, count):
    return list(islice(iter(loader), count))


def assert_equal(batches, expected):
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    for one, other in zip(batches, expected, strict=True):
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        assert torch.equal(one.labels_B, other.labels_B)
        assert one.captions == other.captions


@pytest.fixture
def uneven(tmp_path):
    """46 samples in uneven shards, one of them empty."""
    return write_shards(tmp_path, [17, 0, 3, 25, 1])


def test_a_batch_carries_each_samples_own_image_caption_and_label(uneven):
    batch = take(load(uneven, augmentation=None, image_size=12), 1)[0]
    assert len(batch) == 4
    assert batch.image_BCHW.shape == (4, 3, 12, 12)
    assert (batch.image_BCHW.dtype, batch.labels_B.dtype) == (torch.uint8, torch.int64)
    for image, caption, label, key in zip(
        batch.image_BCHW, batch.captions, batch.labels_B.tolist(), batch.keys, strict=True
    ):
        number = int(key)
        assert caption == f"picture {number}"
        assert label == number % 10
        pixels = np.asarray(Image.open(io.BytesIO(png(number)))).transpose(2, 0, 1)
        assert (image.numpy() == pixels).all()


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 2), (3, 0), (2, 5)])
def test_an_epoch_over_all_ranks_sees_every_sample_once_save_the_remainder(uneven, ranks, workers):
    loaders = [load(uneven, rank=rank, world_size=ranks, num_workers=workers) for rank in range(ranks)]
    steps = 46 // (ranks * 4)
    assert {loader.steps_per_epoch for loader in loaders} == {steps}
    seen = [[batch.keys for batch in take(loader, 2 * steps)] for loader in loaders]
    for epoch in (slice(0, steps), slice(steps, None)):
        keys = Counter(key for rank in seen for batch in rank[epoch] for key in batch)
        assert set(keys.values()) == {1}
        assert len(keys) == steps * ranks * 4
    assert seen[0][:steps] != seen[0][steps:]


def test_an_augmentation_depends_on_sample_and_epoch_alone(uneven):
    def views(epoch, **settings):
        loader = load(uneven, augmentation=CHANGES, **settings)
        batches = take(loader, (epoch + 1) * loader.steps_per_epoch)[epoch * loader.steps_per_epoch :]
        return {key: image for batch in batches for key, image in zip(batch.keys, batch.image_BCHW, strict=True)}

    alone = views(1)
    for settings in ({"num_workers": 2}, {"rank": 1, "world_size": 2}, {"shuffle": 0, "batch_size": 7}):
        other = views(1, **settings)
        both = alone.keys() & other.keys()
        assert len(both) > 10
        assert all(torch.equal(alone[key], other[key]) for key in both)
    before = views(0)
    assert not any(torch.equal(alone[key], before[key]) for key in alone.keys() & before.keys())


def bad_samples():
    """Samples that cannot be used, with the reason; all else about each is good."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with_image = {"png": png(), "txt": "t", "cls": 1}
    return [
        ({"txt": "t", "cls": 1}, "no image"),
        (with_image | {"png": b"no image at all"}, "broken image"),
        (with_image | {"png": png()[:-40]}, "broken image"),
        (with_image | {"png": bomb}, "too many pixels"),
        ({"png": png(), "cls": 1}, "no caption"),
        (with_image | {"txt": " \n"}, "empty caption"),
        (with_image | {"txt": b"caf\xe9"}, "caption not UTF-8"),
        (with_image | {"txt": "long " * 200_000}, "caption too long"),
        ({"png": png(), "txt": "t"}, "no label"),
        (with_image | {"cls": b"cat"}, "label not a class number"),
        (with_image | {"cls": b"1.0"}, "label not a class number"),
        (with_image | {"cls": b"9" * 5000}, "label not a class number"),
        ({"png": png(), "gif": png(), "cls": 2}, "no caption"),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_named_once(tmp_path, caplog, workers):
    cases = bad_samples()
    bad = {3 * i: sample | {"__key__": f"bad/{i:02d}"} for i, (sample, _) in enumerate(cases)}
    index = write_shards(tmp_path, [30, 34], bad)
    loader = load(index, require_captions=True, require_labels=True, num_workers=workers)
    epochs = 2
    batches = take(loader, epochs * loader.steps_per_epoch)
    assert [len(batch) for batch in batches] == [4] * 32
    assert not any(key.startswith("bad") for batch in batches for key in batch.keys)
    assert loader.skipped == {
        reason: epochs * count for reason, count in Counter(reason for _, reason in cases).items()
    }
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for i, (_, reason) in enumerate(cases):
        (message,) = [text for text in warned if f"'bad/{i:02d}'" in text]
        assert reason in message
        assert str(tmp_path / f"{int(3 * i >= 30)}.tar") in message
        assert "\n" not in message


def test_after_bad_samples_a_worker_fills_up_from_its_own_share(tmp_path):
    index = write_shards(tmp_path, [24], {number: {"__key__": f"bad{number}", "txt": "t"} for number in (1, 7, 8)})
    loader = load(index)
    keys = Counter(key for batch in take(loader, 6) for key in batch.keys)
    assert len(keys) == 21
    assert sorted(keys.values()) == [1] * 18 + [2] * 3


@pytest.mark.parametrize("form", ["txt", "json"])
@pytest.mark.parametrize("resampled", [False, True])
def test_one_of_several_captions_is_drawn_for_each_epoch(tmp_path, form, resampled):
    """By seed, epoch and sample, whatever the number of ranks and workers; the pictures stay the same."""
    for name, captions in (("several", 4), ("single", 1)):
        (tmp_path / name).mkdir()
        with wds.TarWriter(str(tmp_path / name / "0.tar")) as tar:
            for number in range(24):
                texts = [f"{number} {at}" for at in range(captions)]
                lines = " \n".join(texts) + "\n\n"
                text = {"txt": lines} if form == "txt" else {"json": {"text": [*texts, " "]}}
                tar.write({"__key__": f"{number}", "png": png(), **text})

    def epochs(name="several", ranks=1, workers=0, seed=0):
        """Of each epoch, the captions and pictures that each sample had."""
        found = [{} for _ in range(6)]
        urls = expand_urls([str(tmp_path / name)])
        index = LazyIndex(urls, cache_dir=None) if resampled else index_shards(urls, cache_dir=None)
        settings = {"caption_key": "txt" if form == "txt" else "text", "require_captions": True, "seed": seed}
        settings |= {"samples_per_epoch": 24} if resampled else {}
        for rank in range(ranks):
            layout = {"rank": rank, "world_size": ranks, "num_workers": workers, "batch_size": 4 // ranks}
            for batch in take(load(index, augmentation=CHANGES, **settings, **layout), 36):
                for key, caption, image in zip(batch.keys, batch.captions, batch.image_BCHW, strict=True):
                    found[batch.epoch].setdefault(key, []).append((caption, image.numpy().tobytes()))
        return found

    drawn = epochs()
    captions = {caption for samples in drawn for shown in samples.values() for caption, _ in shown}
    assert {caption.split()[1] for caption in captions} == {"0", "1", "2", "3"}
    assert len(captions) > 2 * 24 - 12
    assert epochs() == drawn
    assert epochs(seed=1) != drawn
    if not resampled:
        assert epochs(ranks=2, workers=2) == drawn

    def pictures(epochs):
        return [{key: [image for _, image in shown] for key, shown in samples.items()} for samples in epochs]

    assert pictures(epochs("single")) == pictures(drawn)


def test_bad_samples_are_logged_up_to_a_number_and_all_counted(tmp_path, caplog):
    with wds.TarWriter(str(tmp_path / "0.tar")) as tar:
        for number in range(MOST_LOGGED + 110):
            tar.write({"__key__": f"{number:04d}", "txt": "no picture"} if number % 100 else good(number))
    loader = load(index_shards([str(tmp_path / "0.tar")], cache_dir=None), batch_size=2, shuffle=0)
    take(loader, 10)
    logged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("skipped")]
    assert len(logged) == MOST_LOGGED
    assert [line.endswith("(more of this reason are only counted)") for line in logged[-2:]] == [False, True]
    assert loader.skipped["no image"] > MOST_LOGGED


def test_captions_and_labels_that_nobody_requires_may_be_missing(tmp_path):
    samples = [
        {"png": png()},
        {"png": png(), "txt": b"\xff", "cls": b"x"},
        {"png": png(), "txt": "", "cls": b" 7\n"},
    ]
    index = write_shards(tmp_path, [3], {i: sample | {"__key__": str(i)} for i, sample in enumerate(samples)})
    (batch,) = take(load(index, batch_size=3, shuffle=0), 1)
    found = {
        key: (caption, label)
        for key, caption, label in zip(batch.keys, batch.captions, batch.labels_B.tolist(), strict=True)
    }
    assert found == {"0": ("", -1), "1": ("", -1), "2": ("", 7)}


def test_captions_and_labels_come_from_json_where_asked(tmp_path):
    contents = [
        {"text": "a cat", "y": 3},
        {"text": "b", "y": "4"},
        {"text": 5, "y": 3},
        {"text": "c", "y": True},
        {"text": "\ud800", "y": 1},
        [1],
    ]
    bad = {i: {"__key__": str(i), "png": png(), "json": json.dumps(c).encode()} for i, c in enumerate(contents)}
    bad[6] = {"__key__": "6", "png": png(), "json": b"{"}
    bad[7] = {"__key__": "7", "png": png(), "json": b"[" * 100_000}
    index = write_shards(tmp_path, [8], bad)
    loader = load(index, batch_size=8, caption_key="text", label_key="y", require_captions=True, require_labels=True)
    (batch,) = take(loader, 1)
    assert set(zip(batch.keys, batch.captions, batch.labels_B.tolist(), strict=True)) == {
        ("0", "a cat", 3),
        ("1", "b", 4),
    }
    assert loader.skipped == {
        "broken json": 2,
        "caption not UTF-8": 1,
        "caption not text": 1,
        "label not a class number": 1,
        "no caption": 1,
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_class_list_is_the_users_error(tmp_path, workers, label):
    index = write_shards(tmp_path, [20], {13: good(13) | {"cls": label}})
    ten = PromptSet(name="ten", classnames=tuple("abcdefghij"), templates=("{c}",))
    with pytest.raises(InputError) as caught:
        take(load(index, class_lists=find_class_lists([], ten), num_workers=workers), 5)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path / "0.tar"), "'0013'", f"cls {label},", "0 to 9"):
        assert part in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_without_a_good_sample_is_an_error_that_names_it(tmp_path, workers):
    index = write_shards(tmp_path, [8], {i: {"__key__": f"{i}", "txt": "t"} for i in range(8)})
    with pytest.raises(InputError, match=r"\d samples in a row, all bad, for worker 0 of rank 0.*0\.tar.*no image"):
        take(load(index, num_workers=workers), 1)


def test_too_few_samples_for_a_step_is_an_error_with_both_numbers(uneven):
    with pytest.raises(InputError, match=r"46 samples in 5 shards.* 60 .*3 ranks x batch_size 20"):
        load(uneven, batch_size=20, world_size=3)


def test_duplicate_members_hostile_names_and_pickles(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(4):
            add(tar, f"../../x{number}.png", png(number))
            for extension in ("pyd", "pkl", "pickle", "pth", "npy", "json"):
                add(tar, f"../../x{number}.{extension}", pickle.dumps(Bomb()))
        for name in ("twice.png", "twice.txt", "twice.png"):
            add(tar, name, png())
        add(tar, "../../x1.png", png(9))
    index = index_shards([str(tmp_path / "0.tar")], cache_dir=None)
    loader = load(index, batch_size=6)
    (batch,) = take(loader, 1)
    assert set(batch.keys) == {f"../../x{number}" for number in range(4)}
    assert loader.skipped.keys() == {"duplicate key", "duplicate member"}
    assert not (tmp_path / "pwned").exists()
    assert not list(tmp_path.parent.parent.glob("x*"))


def test_a_shard_that_vanishes_or_shrinks_is_counted_and_the_next_is_read(tmp_path, caplog):
    index = write_shards(tmp_path, [10, 10, 10])
    (tmp_path / "0.tar").unlink()
    os.truncate(tmp_path / "1.tar", int(index[1].offsets[7]) + 700)
    loader = load(index, batch_size=5)
    batches = take(loader, 6)
    assert {int(key) for batch in batches for key in batch.keys} == {*range(20, 30)}
    assert loader.skipped == {"shard unreadable": 20}
    assert "0.tar" in caplog.text
    assert "1.tar was overwritten" in caplog.text


def test_a_shard_rewritten_under_its_reader_never_mixes_samples(tmp_path):
    index = write_shards(tmp_path, [6], {number: good(number) | {"txt": "long " * 900} for number in range(6)})
    size = (tmp_path / "0.tar").stat().st_size
    with wds.TarWriter(str(tmp_path / "0.tar")) as tar:
        for number in range(6, 24):
            tar.write({"__key__": f"{number:04d}", "txt": f"picture {number}", "png": png(number)})
    os.truncate(tmp_path / "0.tar", size)
    loader = load(index, batch_size=1, augmentation=None, image_size=12)
    for batch in take(loader, 6):
        number = int(batch.keys[0])
        assert batch.captions == [f"picture {number}"]
        pixels = np.asarray(Image.open(io.BytesIO(png(number)))).transpose(2, 0, 1)
        assert (batch.image_BCHW[0].numpy() == pixels).all()


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resuming_anywhere_goes_on_bit_for_bit(tmp_path, workers):
    bad = {number: {"__key__": f"bad{number}", "txt": "t"} for number in (0, 5, 6, 20, 33)}
    settings = {"augmentation": CHANGES, "num_workers": workers}
    index = write_shards(tmp_path, [17, 0, 3, 13], bad)
    whole = load(index, **settings)
    batches, states = [], [json.dumps(whole.state_dict())]
    for batch in islice(iter(whole), 20):  # two and a half epochs
        batches.append(batch)
        states.append(json.dumps(whole.state_dict()))
    assert whole.steps_per_epoch == 8
    for position in range(0, 17, 1 if not workers else 3):
        again = load(index, **settings)
        again.load_state_dict([json.loads(states[position])])
        assert json.dumps(again.state_dict()) == states[position]
        assert_equal(take(again, 4), batches[position : position + 4])
        assert json.dumps(again.state_dict()) == states[position + 4]


def test_a_new_iteration_goes_on_after_what_was_handed_out(uneven):
    expected = take(load(uneven, num_workers=2), 6)
    loader = load(uneven, num_workers=2)
    assert_equal(take(loader, 3) + take(loader, 3), expected)


def test_the_state_of_a_cut_off_run_restores_the_counts(tmp_path):
    index = write_shards(tmp_path, [16], {2: {"__key__": "bad", "txt": "t"}})
    loader = load(index)
    take(loader, 4)
    again = load(index)
    again.load_state_dict([loader.state_dict()])
    assert again.skipped == {"no image": 1}
    take(again, 4)
    assert again.skipped == {"no image": 2}


def test_a_state_of_another_seed_is_refused(uneven):
    with pytest.raises(InputError, match="seed was 5 and is 6"):
        load(uneven, seed=6).load_state_dict([load(uneven).state_dict()])


def test_shards_that_were_moved_and_renamed_are_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    first = load(write_shards(tmp_path / "one", [12, 12]))
    take(first, 2)
    state, expected = first.state_dict(), take(first, 5)
    (tmp_path / "moved").mkdir()
    for number, path in enumerate(sorted((tmp_path / "one").iterdir())):
        (tmp_path / "moved" / f"part-{number}.tar").write_bytes(path.read_bytes())
    again = load(index_shards(expand_urls([str(tmp_path / "moved")]), cache_dir=None))
    again.expect_shards(first.shards_read())
    again.load_state_dict([state])
    assert_equal(take(again, 5), expected)


def test_other_shards_are_refused_by_name(tmp_path):
    before = load(write_shards(tmp_path, [12, 12, 12, 12])).shards_read()
    tars = sorted(tmp_path.glob("*.tar"))
    with wds.TarWriter(str(tars[1]), mtime=1.0) as tar:  # as many samples and bytes, written at another time
        for number in range(12, 24):
            tar.write(good(number))
    tars[2].rename(tmp_path / "other.tar")
    tars[3].unlink()
    index = index_shards(expand_urls([str(tmp_path)]), cache_dir=None)
    named = "'1.tar' changed, '2.tar' is gone, '3.tar' is gone, 'other.tar' is new;"
    for loader in (load(index), load(index, num_workers=2)):
        with pytest.raises(InputError, match=named):
            loader.expect_shards(before)


def test_shards_in_another_order_are_refused(tmp_path):
    index = write_shards(tmp_path, [12, 12])
    with pytest.raises(InputError, match="their order changed"):
        load(index[::-1]).expect_shards(load(index).shards_read())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_of_a_resampled_stream_is_checked_when_it_is_opened(tmp_path, workers):
    """One bit of one picture, in a shard of the same name, size and time."""
    write_shards(tmp_path, [10, 10, 10])
    first = resampled(tmp_path, num_workers=workers)
    assert first.shards_read() == [["0.tar", ""], ["1.tar", ""], ["2.tar", ""]]
    take(first, 30)
    record = first.shards_read()
    assert all(digest for _, digest in record)
    same = resampled(tmp_path, num_workers=workers)
    same.expect_shards(record)
    take(same, 30)
    path = tmp_path / "1.tar"
    status, content = path.stat(), bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    other = resampled(tmp_path, num_workers=workers)
    other.expect_shards(record)
    with pytest.raises(InputError, match=r"^data\.shards: '1\.tar' \(digest \w+\) is not the shard that the run"):
        take(other, 30)
    with pytest.raises(InputError, match=r"not those of the saved run: '3\.tar' is gone"):
        other.expect_shards([*record, ["3.tar", ""]])


LAYOUTS = [
    {"world_size": 1, "num_workers": 0, "batch_size": 4},
    {"world_size": 2, "num_workers": 0, "batch_size": 3},
    {"world_size": 3, "num_workers": 0, "batch_size": 1},
    {"world_size": 1, "num_workers": 3, "batch_size": 5, "shuffle": 0},
    {"world_size": 2, "num_workers": 2, "batch_size": 2, "shuffle": 50},
]


def ranks_of(index, layout, states=()):
    loaders = [load(index, rank=rank, **LAYOUTS[layout]) for rank in range(LAYOUTS[layout]["world_size"])]
    for loader in loaders if states else ():
        loader.load_state_dict(json.loads(json.dumps(states)))
    return loaders


@pytest.mark.parametrize(
    ("layouts", "steps"),
    [
        ([0, 1, 0], [3, 2]),
        ([3, 4, 2], [2, 3]),
        ([4, 0], [0]),
        ([1, 4, 3], [5, 1]),
        ([2, 3], [23]),
        ([0, 2, 0], [11, 9]),
    ],
)
def test_other_ranks_and_workers_see_what_is_left_of_the_epoch_exactly_once(uneven, layouts, steps):
    seen = {epoch: Counter() for epoch in range(20)}
    states = []
    for layout, count in zip(layouts, [*steps, 30], strict=True):
        loaders = ranks_of(uneven, layout, states)
        for loader in loaders:
            for batch in take(loader, count):
                seen[batch.epoch].update(batch.keys)
        states = [loader.state_dict() for loader in loaders]
        assert len({batch.epoch for loader in ranks_of(uneven, layout, states) for batch in take(loader, 1)}) == 1
    largest = max(LAYOUTS[layout]["world_size"] * LAYOUTS[layout]["batch_size"] for layout in layouts)
    last = max(epoch for epoch in seen if seen[epoch])
    assert last >= 2
    for epoch in range(last):
        assert max(seen[epoch].values()) == 1
        assert len(seen[epoch]) > 46 - largest


def test_bad_samples_are_not_seen_again_by_other_ranks(tmp_path):
    bad = {number: {"__key__": f"bad{number}", "txt": "t"} for number in (3, 20, 21, 40)}
    index = write_shards(tmp_path, [17, 0, 3, 25, 1], bad)
    first = ranks_of(index, 1)
    for loader in first:
        take(loader, 4)
    rest = ranks_of(index, 2, [loader.state_dict() for loader in first])
    assert rest[0].samples == sum(loader.samples for loader in first) == 24
    assert rest[0].skipped == {"no image": sum(sum(loader.skipped.values()) for loader in first)}
    for loader in rest:
        take(loader, int(loader.batches_before(1)))
    assert sum(sum(loader.skipped.values()) for loader in rest) in (3, 4)


def test_after_other_ranks_took_over_a_resume_is_exact_again(uneven):
    first = ranks_of(uneven, 4)
    for loader in first:
        take(loader, 3)
    second = ranks_of(uneven, 1, [loader.state_dict() for loader in first])
    batches, states = [], []
    for loader in second:
        take(loader, 2)
        states.append(loader.state_dict())
        batches.append(take(loader, 12))
    for loader, expected in zip(ranks_of(uneven, 1, states), batches, strict=True):
        assert_equal(take(loader, 12), expected)


def test_states_must_be_those_of_all_ranks_in_order(uneven):
    states = [loader.state_dict() for loader in ranks_of(uneven, 1)]
    for wrong in (states[:1], states[::-1]):
        with pytest.raises(InputError, match="ranks of the states was"):
            load(uneven).load_state_dict(wrong)


def resampled(folder, cache=None, **settings):
    index = LazyIndex(expand_urls([str(folder)]), cache_dir=cache)
    return StreamLoader(make_stream(index, **(SETTINGS | {"samples_per_epoch": 40} | settings)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [0, 6, 1000])
def test_resuming_a_resampled_stream_anywhere_goes_on_bit_for_bit(tmp_path, workers, shuffle):
    write_shards(tmp_path, [17, 0, 3, 13], {2: {"__key__": "bad", "txt": "t"}})
    settings = {"augmentation": CHANGES, "num_workers": workers, "shuffle": shuffle}
    whole = resampled(tmp_path, **settings)
    batches, states = [], [json.dumps(whole.state_dict())]
    for batch in islice(iter(whole), 25):
        batches.append(batch)
        states.append(json.dumps(whole.state_dict()))
    assert [batch.epoch for batch in batches] == [number // 10 for number in range(25)]
    for position in range(0, 22, 1 if not workers else 7):
        again = resampled(tmp_path, **settings)
        again.load_state_dict([json.loads(states[position])])
        assert json.dumps(again.state_dict()) == states[position]
        assert_equal(take(again, 3), batches[position : position + 3])
        assert json.dumps(again.state_dict()) == states[position + 3]


def test_a_resampled_stream_draws_every_shard_as_often(tmp_path):
    write_shards(tmp_path, [10, 10, 10, 10])
    loader = resampled(tmp_path, augmentation=None, batch_size=10, rank=1, world_size=2)
    keys = Counter(key for batch in take(loader, 400) for key in batch.keys)
    assert len(keys) == 40
    by_shard = [sum(keys[f"{number:04d}"] for number in range(first, first + 10)) for first in (0, 10, 20, 30)]
    assert all(800 < count < 1200 for count in by_shard)  # 1,000 expected, standard deviation 87


def test_workers_and_ranks_of_a_resampled_stream_draw_apart(tmp_path):
    write_shards(tmp_path, [10, 10, 10, 10])
    loaders = [resampled(tmp_path, rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    orders = [tuple(key for batch in batches for key in batch.keys) for batches in (take(one, 10) for one in loaders)]
    assert len(set(orders)) == 2


def test_a_resampled_stream_reads_its_shards_as_it_draws_them(tmp_path, caplog):
    write_shards(tmp_path, [10, 10, 10])
    urls = [*expand_urls([str(tmp_path)]), str(tmp_path / "missing.tar")]
    loader = StreamLoader(make_stream(LazyIndex(urls, cache_dir=None), **SETTINGS, samples_per_epoch=40))
    take(loader, 60)
    assert loader.skipped.keys() == {"shard unreadable"}
    assert 1 < loader.skipped["shard unreadable"] < 30
    assert caplog.text.count("missing.tar") >= 1


def test_a_resampled_stream_without_samples_is_an_error(tmp_path):
    write_shards(tmp_path, [0, 0])
    with pytest.raises(
        InputError, match=r"draws in a row from 2 shards yielded no sample; allowed: shards with samples$"
    ):
        take(resampled(tmp_path), 1)


def test_a_resampled_stream_with_other_ranks_draws_anew_and_keeps_its_epoch(tmp_path):
    write_shards(tmp_path, [10, 10, 10])
    first = resampled(tmp_path)
    before = take(first, 15)
    second = [resampled(tmp_path, rank=rank, world_size=2, batch_size=2) for rank in range(2)]
    for loader in second:
        loader.load_state_dict([first.state_dict()])
    after = [take(loader, 6) for loader in second]
    assert [batch.epoch for batch in after[0]] == [1] * 5 + [2]
    assert second[0].batches_before(2) == 5
    fresh = take(resampled(tmp_path, rank=0, world_size=2, batch_size=2), 6)
    assert [batch.keys for batch in after[0]] != [batch.keys for batch in fresh]
    assert before[-1].epoch == 1


def test_the_number_of_workers_must_be_the_loaders(uneven):
    stream = make_stream(uneven, **SETTINGS, num_workers=2)
    with pytest.raises(ValueError, match="num_workers is 2"):
        next(iter(stream))


def test_the_training_process_keeps_its_random_numbers(uneven):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    take(load(uneven, num_workers=2, augmentation=CHANGES), 3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_no_worker_outlives_its_loader(uneven):
    def children():
        return {
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/stat")
            if path.read_text().rsplit(")", 1)[1].split()[1] == str(os.getpid())
        }

    before = children()
    loader = load(uneven, num_workers=2)
    batches = iter(loader)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    assert children() == before
