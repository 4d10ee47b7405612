"""Class lists beside shards, local and remote: which is found, and what the stream's labels then are."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest

from clipdistill.data import StreamLoader, expand_urls, index_shards
from clipdistill.data.class_lists import find_class_lists
from clipdistill.errors import InputError
from clipdistill.models.prompts import PromptSet
from tests.conftest import png, write_tar
from tests.servers import Hub, Ranges, files, serving
from tests.streams import make_stream

PROMPTS = PromptSet(name="p", classnames=("map pin", "zebra", "apple", "kiwi"), templates=("{c}",))


def shard(path: Path, labels: Sequence[Any], *, key: str = "cls") -> str:
    samples = [{"key": f"{path.stem}-{label}", "png": png((9, 9, 9)), key: label} for label in labels]
    write_tar(path, samples)
    return str(path)


def read(urls: Sequence[str], **settings: Any) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Label of each good sample by its key, and the counts of the bad."""
    lists = find_class_lists(urls, PROMPTS)
    index = index_shards(urls, cache_dir=None)
    settings = {"batch_size": 1, "image_size": 8, "seed": 0, "shuffle": 0, "require_labels": True} | settings
    loader = StreamLoader(make_stream(index, class_lists=lists, **settings))
    batches = iter(loader)
    found = [next(batches) for _ in range(sum(map(len, index)))]
    return {batch.keys[0]: int(batch.labels_B[0]) for batch in found}, loader.skipped


def test_each_folders_list_says_what_its_labels_are(tmp_path: Path) -> None:
    """In the shards' folder, above it, and none: then labels are the prompts' own."""
    (tmp_path / "a" / "train").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "classnames.txt").write_text("Apple\nmap_pin\n")
    (tmp_path / "b" / "classnames.txt").write_text("zebra\napple\n")
    urls = [
        shard(tmp_path / "a" / "train" / "a.tar", [0, 1]),
        shard(tmp_path / "b" / "b.tar", [0, 1, "ZEBRA"]),
        shard(tmp_path / "none" / "c" / "c.tar", [0, 3, "Map-Pin"]),
    ]
    expected = {"a-0": 2, "a-1": 0, "b-0": 1, "b-1": 2, "b-ZEBRA": 1, "c-0": 0, "c-3": 3, "c-Map-Pin": 0}
    assert read(urls) == (expected, {})
    assert read(urls, num_workers=2) == (expected, {})


def test_labels_in_json_may_be_names_numbers_and_whole_floats(tmp_path: Path) -> None:
    values = {'"apple"': 2, '"3"': 3, "1": 1, "2.0": 2, '"map pin"': 0}
    samples = [
        {"key": f"s{n}", "png": png((9, 9, 9)), "json": f'{{"class": {value}}}'}
        for n, value in enumerate([*values, "1.5", "null", "[1]", "true", "NaN"])
    ]
    write_tar(tmp_path / "0.tar", samples)
    with pytest.raises(InputError, match=r"sample 's8' has class True, allowed: 0 to 3 .*, or one of the names"):
        read([str(tmp_path / "0.tar")], label_key="class")
    write_tar(tmp_path / "0.tar", samples[:8] + samples[9:])
    found, skipped = read([str(tmp_path / "0.tar")], label_key="class")
    assert found == {f"s{n}": label for n, label in enumerate(values.values())}
    assert skipped == {"label not a class number": 3, "no label": 1}


@pytest.mark.parametrize("label", ["plum", "4", "-1", "2"])
def test_a_label_that_is_no_class_is_the_users_error(tmp_path: Path, label: str) -> None:
    if label == "2":
        (tmp_path / "classnames.txt").write_text("kiwi\nzebra\n")
    with pytest.raises(InputError, match=rf"0.tar: sample '0-{label}' has cls {label}, allowed: 0 to \d \(") as caught:
        read([shard(tmp_path / "0.tar", [label])])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [b"\xff", b"", b"1.0", b"a\nb", b"1 2"])
def test_a_broken_label_is_a_bad_sample(tmp_path: Path, label: bytes) -> None:
    write_tar(tmp_path / "0.tar", [{"key": "a", "png": png((9, 9, 9)), "cls": label}])
    good = shard(tmp_path / "1.tar", [1])
    assert read([str(tmp_path / "0.tar"), good]) == ({"1-1": 1}, {"label not a class number": 1})


def test_a_list_of_other_classes_is_refused(tmp_path: Path) -> None:
    url = shard(tmp_path / "0.tar", [0])
    (tmp_path / "classnames.txt").write_text("kiwi\nzebra\nmappin\nplum\n")
    with pytest.raises(
        InputError,
        match=r"data.shards: .*/classnames.txt: 2 of its 4 classes are not in prompts p: 'mappin', 'plum'; of "
        r"prompts p, 2 are not in it: 'map pin', 'apple'; .* or data.labels_by_order=true: both lists in one order$",
    ):
        find_class_lists([url], PROMPTS)
    lists = find_class_lists([url], PROMPTS, by_order=True)
    assert [lists.of(url).numbered(number) for number in range(4)] == [0, 1, 2, 3]
    (tmp_path / "classnames.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match=r"classnames.txt:1: not UTF-8"):
        find_class_lists([url], PROMPTS)


def test_remote_lists_are_found_and_signed_urls_left_alone(tmp_path: Path) -> None:
    shard(tmp_path / "data" / "train" / "0.tar", [0, 1])
    (tmp_path / "data" / "classnames.txt").write_text("kiwi\nzebra\n")
    with serving(files(tmp_path)) as url:
        assert read(expand_urls([f"{url}/data/train/0.tar"])) == ({"0-0": 3, "0-1": 1}, {})
        assert read([f"{url}/data/train/0.tar?signature=x"]) == ({"0-0": 0, "0-1": 1}, {})
        shard(tmp_path / "0.tar", [0])
        assert read([f"{url}/0.tar"]) == ({"0-0": 0}, {})


class Private(Ranges):
    """Forbids what is not there, as buckets do that may not be listed."""

    def do_HEAD(self) -> None:
        if self.path.endswith(".txt"):
            self.send_error(403)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        if self.path.endswith(".txt"):
            self.send_error(403)
        else:
            super().do_GET()


def test_a_server_that_does_not_answer_for_the_list_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard(tmp_path / "0.tar", [0])
    with serving(files(tmp_path, Private)) as url:
        assert read([f"{url}/0.tar"]) == ({"0-0": 0}, {})
        assert f"{url}/classnames.txt: no answer, so labels are not compared with class names" in caplog.text


def test_lists_in_a_bucket_and_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards at the root of either have nothing above them."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/classnames.txt", b"kiwi\nzebra\n")
    for url in ("memory://bucket/0.tar", "memory://bucket/train/0.tar"):
        assert find_class_lists([url], PROMPTS).of(url).numbered(0) == 3
    assert find_class_lists(["memory://0.tar"], PROMPTS).of_folders == {}
    shard(tmp_path / "train" / "0.tar", [0])
    (tmp_path / "classnames.txt").write_text("kiwi\nzebra\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(files(tmp_path, Hub)) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server, "token": False})
        root = "hf://datasets/owner/name@main"
        for url in (f"{root}/0.tar", f"{root}/train/0.tar"):
            assert find_class_lists([url], PROMPTS).of(url).numbered(0) == 3
