"""Runs that start without reading their shards: sizes from files beside them, over real files and servers."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from clipdistill.data import LazyIndex, StreamLoader, expand_urls, index_shards
from clipdistill.data.sizes import stated_sizes
from clipdistill.errors import InputError
from tests.data.test_stream import CHANGES, SETTINGS, good
from tests.servers import Ranges, age, files, serving, write_noise_shards
from tests.streams import make_stream

SIZES = (7, 12, 5, 16, 9, 11)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def sizes_json(folder: Path) -> None:
    (folder / "sizes.json").write_text(json.dumps({f"{number:05d}.tar": size for number, size in enumerate(SIZES)}))


def img2dataset(folder: Path) -> None:
    for number, size in enumerate(SIZES):
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": size + 3, "successes": size}))


def wids(folder: Path) -> None:
    shards = [{"url": f"{number:05d}.tar", "nsamples": size} for number, size in enumerate(SIZES)]
    (folder / "index.json").write_text(json.dumps({"__kind__": "wids-shard-index-v1", "shardlist": shards}))


LISTS = {"sizes.json": sizes_json, "img2dataset": img2dataset, "wids": wids}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder, number = tmp_path / "shards", 0
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for _ in range(size):
                tar.write(good(number))
                number += 1
    return folder


def lazy(folder: Path | str, **settings: Any) -> StreamLoader:
    urls = expand_urls([f"{folder}/{{00000..0000{len(SIZES) - 1}}}.tar"])
    sizes = [size for size in stated_sizes(urls) if size is not None]
    index = LazyIndex(urls, cache_dir=settings.pop("cache", None), sizes=sizes)
    return StreamLoader(make_stream(index, **(SETTINGS | settings)))


def seen(loader: StreamLoader, steps: int) -> list[Any]:
    return [
        (batch.epoch, batch.keys, batch.captions, batch.labels_B.tolist(), batch.image_BCHW.numpy().tobytes())
        for batch in islice(iter(loader), steps)
    ]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_that_of_an_index_of_all_shards(folder: Path, name: str, workers: int) -> None:
    LISTS[name](folder)
    settings = {"num_workers": workers, "augmentation": CHANGES, "views": 2}
    index = index_shards(expand_urls([str(folder)]), cache_dir=None)
    expected = seen(StreamLoader(make_stream(index, **(SETTINGS | settings))), 40)
    loader = lazy(folder, **settings)
    assert seen(loader, 40) == expected
    assert loader.opened == set(range(len(SIZES)))


@pytest.mark.parametrize("name", LISTS)
def test_a_run_starts_with_the_first_shards_alone(folder: Path, name: str) -> None:
    """Over HTTP, requests are counted: the lists, and of the shards those of the first batch."""
    LISTS[name](folder)
    asked: Counter[str] = Counter()

    class Counting(Ranges):
        def do_GET(self) -> None:
            asked[Path(self.path).name] += 1
            super().do_GET()

    with serving(files(folder, Counting)) as url:
        assert seen(lazy(url, shuffle=0), 1) == seen(lazy(folder, shuffle=0), 1)
    assert len([name for name in asked if name.endswith(".tar")]) <= 2


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", ["a folder", "a file", None])
def test_what_is_fetched_for_the_index_is_not_fetched_again(tmp_path: Path, workers: int, cache: str | None) -> None:
    """Bytes that a server sends in an epoch: those of the shards, once; twice where no temporary file can be made."""
    write_noise_shards(tmp_path / "shards")
    total = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    (tmp_path / "a file").touch()
    sent = []

    class Counting(Ranges):
        def copyfile(self, source: Any, outputfile: Any) -> None:
            raise AssertionError("a whole file was asked for")

        def send_header(self, keyword: str, value: str) -> None:
            if keyword == "Content-Length" and self.command == "GET":
                sent.append(int(value))
            super().send_header(keyword, value)

    settings = {"batch_size": 4, "image_size": 8, "shuffle": 6, "num_workers": workers, "augmentation": None}

    def run(root: Path | str) -> list[Any]:
        place = None if cache is None else tmp_path / cache
        index = LazyIndex(expand_urls([f"{root}/{{0..1}}.tar"]), cache_dir=place, sizes=[10, 14])
        loader = StreamLoader(make_stream(index, **settings))
        found = seen(loader, 6)
        loader.close()
        return found

    age(tmp_path / "shards")
    expected = run(tmp_path / "shards")
    with serving(files(tmp_path / "shards", Counting)) as url:
        assert run(url) == expected
        # The epoch begins within a shard, and returns to its beginning at the end; a worker is already in the next one.
        most = 1.8 if workers else 1.4
        assert total <= sum(sent) < (most + 1 if cache == "a file" else most) * total
        assert sum(sent) > most * total or cache != "a file"


def test_without_lists_the_sizes_are_unknown(folder: Path) -> None:
    urls = expand_urls([str(folder)])
    assert stated_sizes(urls) == [None] * len(SIZES)
    assert stated_sizes(["https://example.org/a.tar?signature=1"]) == [None]
    (folder / "notes.json").write_text("not JSON")
    (folder / "sizes.json").write_text('{"00001.tar": 12}')
    assert stated_sizes(urls) == [None, 12, None, None, None, None]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"sizes.json": "[1]"}, r"sizes\.json: list; allowed: shards and their sizes"),
        ({"sizes.json": '{"00000.tar": "7"}'}, r"sizes\.json: '7' samples in 00000\.tar; allowed: a whole number"),
        ({"sizes.json": '{"00000.tar"'}, r"sizes\.json: not JSON: .*; allowed: the sizes of shards"),
        ({"00000_stats.json": '{"successes": -1}'}, r"00000_stats\.json: -1 samples"),
        ({"i.json": '{"__kind__": "wids-shard-index-v1", "shardlist": [3]}'}, r"i\.json: shardlist '\[3\]'; allowed"),
        ({"i.json": '{"__kind__": "wids-shard-index-v1"}'}, r"i\.json: shardlist 'None'; allowed: a list of shards"),
        (
            {
                "sizes.json": '{"00000.tar": 8}',
                "i.json": '{"__kind__": "wids-shard-index-v1", "shardlist": [{"url": "00000.tar", "nsamples": 7}]}',
            },
            r"i\.json: 7 samples in 00000\.tar; another list beside it says 8",
        ),
    ],
)
def test_damaged_lists_are_refused(folder: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        stated_sizes(expand_urls([str(folder)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stated", [15, 17])
def test_a_shard_of_another_size_than_stated_stops_the_stream(folder: Path, stated: int) -> None:
    sizes_json(folder)
    listed = json.loads((folder / "sizes.json").read_text())
    (folder / "sizes.json").write_text(json.dumps(listed | {"00003.tar": stated}))
    with pytest.raises(InputError, match=rf"00003\.tar has 16 samples, and the files beside it say {stated}; allowed"):
        seen(lazy(folder), 30)


def test_what_damage_hides_is_bad_and_counted(folder: Path) -> None:
    sizes_json(folder)
    content = (folder / "00003.tar").read_bytes()
    (folder / "00003.tar").write_bytes(content[: len(content) // 2])
    loader = lazy(folder, shuffle=0, batch_size=1)
    (folder / "00005.tar").unlink()
    found = seen(loader, sum(SIZES))
    numbers = {int(key) for epoch, keys, *_ in found for key in keys if epoch == 0}
    of_3, of_5 = (set(range(sum(SIZES[:shard]), sum(SIZES[: shard + 1]))) for shard in (3, 5))
    lost = set(range(sum(SIZES))) - numbers
    assert of_5 < lost < of_5 | of_3
    assert sum(loader.skipped.values()) == len(lost)
    assert loader.skipped["shard unreadable"] >= len(lost) - 1  # one sample may have lost its picture alone
    assert list(loader.unreadable) == [5]


def test_a_resumed_stream_is_exact_and_of_the_same_sizes(folder: Path, tmp_path: Path) -> None:
    sizes_json(folder)
    whole = seen(lazy(folder), 30)
    first = lazy(folder)
    assert seen(first, 11) == whole[:11]
    state, shards = first.state_dict(), first.shards_read()
    resumed = lazy(folder)
    resumed.expect_shards(shards)
    resumed.load_state_dict([state])
    assert seen(resumed, 19) == whole[11:]

    indexed = StreamLoader(make_stream(index_shards(expand_urls([str(folder)]), cache_dir=None), **SETTINGS))
    indexed.expect_shards(shards)
    indexed.load_state_dict([state])
    assert seen(indexed, 19) == whole[11:]

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    swapped = json.loads((other / "sizes.json").read_text())
    swapped["00000.tar"], swapped["00002.tar"] = swapped["00002.tar"], swapped["00000.tar"]
    (other / "sizes.json").write_text(json.dumps(swapped))
    with pytest.raises(InputError, match="stream state: numbers of samples in the shards was"):
        lazy(other).load_state_dict([state])


@pytest.mark.parametrize("cache", [False, True])
def test_training_from_stated_sizes_is_training_from_an_index(
    write_config: Callable[..., Path], colours: Path, tmp_path: Path, cache: bool
) -> None:
    """With a teacher cache too, whose files belong to the shards' content."""
    from safetensors.torch import load_file

    from clipdistill.cli import main

    shutil.copytree(colours / "train", tmp_path / "train")
    config = str(write_config())
    overrides = [f"data.shards=[{tmp_path}/train]", "evaluation.folders=[]"]
    if cache:
        overrides += ["data.views=2", f"teacher_cache.folder={tmp_path}/embeddings"]
        assert main(["cache", "--config", config, *overrides]) == 0
    students = []
    for name in ("indexed", "stated"):
        assert main(["train", "--config", config, *overrides, f"output={tmp_path}/{name}"]) == 0
        students.append(load_file(tmp_path / name / "student" / "open_clip_model.safetensors"))
        (tmp_path / "train" / "sizes.json").write_text('{"0.tar": 20, "1.tar": 17, "2.tar": 13}')
    assert students[0].keys() == students[1].keys()
    assert all((students[0][key] == students[1][key]).all() for key in students[0])
    identity = json.loads((tmp_path / "stated" / "checkpoints" / "step_00000006" / "identity.json").read_text())
    assert {name for name, content in identity["shards"] if content} == {"0.tar", "1.tar", "2.tar"}
