"""Finding shards and indexing them, on real tar files."""

import os
import re
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import webdataset as wds

from clipdistill.data import expand_urls, index_shards
from clipdistill.errors import InputError
from tests.servers import Ranges, files, serving


def write_shard(path, samples):
    """A shard with one txt and one cls for each key."""
    with wds.TarWriter(str(path)) as tar:
        for key in samples:
            tar.write({"__key__": key, "txt": f"caption of {key}", "cls": 1})
    return path


def test_patterns_expand_in_order(tmp_path):
    for number in (0, 1, 2, 10):
        (tmp_path / f"{number}.tar").touch()
    (tmp_path / "note.txt").touch()
    every = [str(tmp_path / f"{number}.tar") for number in (0, 1, 2, 10)]
    assert expand_urls([str(tmp_path)]) == every
    assert expand_urls([f"{tmp_path}/*.tar"]) == every
    assert expand_urls([f"{tmp_path}/{{2,0}}.tar", every[3]]) == [every[2], every[0], every[3]]
    assert expand_urls([f"{tmp_path}/{{0..2}}.tar"]) == every[:3]
    assert expand_urls(["s3://bucket/{000..002}.tar", "https://host/a.tar?key=1"]) == [
        *(f"s3://bucket/00{number}.tar" for number in range(3)),
        "https://host/a.tar?key=1",
    ]


def test_an_existing_name_is_no_pattern(tmp_path):
    path = tmp_path / "a[1]{x,y}.tar"
    path.touch()
    assert expand_urls([str(path)]) == [str(path)]


def test_a_list_longer_than_a_name_may_be(tmp_path):
    names = [f"{number:02d}-of-a-hundred" for number in range(100)]
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    pattern = f"{tmp_path}/{{{','.join(names)}}}.tar"
    assert expand_urls([pattern]) == [f"{tmp_path}/{name}.tar" for name in names]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{}/none-*.tar", "nothing found"),
        ("{}/" + 300 * "x", "xxx' .* does not exist"),
        ("{}/missing.tar", "missing.tar.* does not exist"),
        ("{}", "nothing found"),
        ("pipe:touch {}/pwned", "shell"),
        ("simplecache::pipe:touch {}/pwned", "shell"),
        ("nonsense://host/a.tar", "nonsense"),
        ("{}/{{a..", "braces"),
    ],
)
def test_patterns_without_shards_are_refused(tmp_path, pattern, message):
    with pytest.raises(InputError, match=message) as caught:
        index_shards(expand_urls([pattern.format(tmp_path)]), cache_dir=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("served", [False, True])
def test_a_folder_holds_as_many_shards_as_it_says(tmp_path, served):
    for number in (0, 1, 3, 10):
        write_shard(tmp_path / f"{number}.tar", ["x"])
    with serving(files(tmp_path)) if served else nullcontext(tmp_path) as place:
        assert len(expand_urls([f"{place}/"])) == 4
        (tmp_path / "nshards.txt").write_text("4\n")
        assert len(expand_urls([f"{place}/"])) == 4
        for text, expected in {
            "11": r" holds 4 shards, its nshards.txt says 11 \(missing: 2.tar, 4.tar, 5.tar, 6.tar, 7.tar, \.\.\.\); ",
            "3": r" holds 4 shards, its nshards.txt says 3 \(missing: 2.tar\); allowed",
            "9" * 18: r" holds 4 shards, its nshards.txt says 9+ \(missing: 2.tar, 4",
            "9" * 5000: r"/nshards.txt: '9+'; allowed: the number of shards",
            "four": r"/nshards.txt: 'four'; allowed: the number of shards",
        }.items():
            (tmp_path / "nshards.txt").write_text(text)
            with pytest.raises(InputError, match=rf"^data\.shards: {place}/?{expected}"):
                expand_urls([f"{place}/"])
            assert len(expand_urls([f"{place}/{{0,1,10}}.tar"])) == 3
    assert len(expand_urls([f"{tmp_path}/*.tar"])) == 4


def test_a_shard_named_twice_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", ["x"])
    with pytest.raises(InputError, match="twice"):
        expand_urls([str(tmp_path), str(path)])


def test_offsets_are_where_tarfile_can_start_to_read(tmp_path):
    keys = [f"folder/sample{number:03d}" for number in range(20)]
    path = write_shard(tmp_path / "a.tar", keys)
    (index,) = index_shards([str(path)], cache_dir=None)
    assert len(index) == 20
    assert index.stat.size == path.stat().st_size
    for key, offset in zip(keys, index.offsets, strict=True):
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r|") as tar:
                first = tar.next()
                assert first.name.startswith(key + ".")


def test_members_that_are_no_sample_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("__index__/x.json", "README", "a.txt", "b.txt"):
            tar.addfile(tarfile.TarInfo(name))
        folder = tarfile.TarInfo("c.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (index,) = index_shards([str(path)], cache_dir=None)
    assert len(index) == 2


def test_a_truncated_shard_keeps_its_whole_samples_and_is_named(tmp_path, caplog):
    whole = write_shard(tmp_path / "whole.tar", [f"s{number}" for number in range(10)])
    (full,) = index_shards([str(whole)], cache_dir=None)
    cut = tmp_path / "cut.tar"
    with whole.open("rb") as file:
        cut.write_bytes(file.read(int(full.offsets[7]) - 512))  # all but the last member's data
    (index,) = index_shards([str(cut)], cache_dir=None)
    assert index.offsets.tolist() == full.offsets[:6].tolist()
    assert "cut short" in index.problems[0]
    assert str(cut) in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no samples"),
        (b"hello " * 1000, "no samples"),
        (b"\x1f\x8b\x08 zipped", "gzip"),
        (b"\0" * 10240, None),
    ],
)
def test_shards_without_samples_are_named_and_do_not_stop(tmp_path, content, problem):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    (index,) = index_shards([str(path)], cache_dir=None)
    assert len(index) == 0
    assert problem is None or any(problem in text for text in index.problems)


def bytes_read() -> int:
    """By this process so far, as the kernel counts them."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_the_cache_serves_an_unchanged_shard_and_only_that(tmp_path):
    """Not one of equal size and time with other content."""
    path = write_shard(tmp_path / "a.tar", [f"s{number}" for number in range(1000)])
    cache = tmp_path / "cache"
    time.sleep(0.1)
    indexes, read = [], []
    for _ in range(2):
        before = bytes_read()
        indexes += index_shards([str(path)], cache_dir=cache)
        read.append(bytes_read() - before)
    assert read[1] < read[0] / 10
    assert indexes[1].offsets.tolist() == indexes[0].offsets.tolist()
    assert indexes[1].content == indexes[0].content

    stat = path.stat()
    content = path.read_bytes()
    path.write_bytes(content.replace(b"s123.", b"t123."))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (changed,) = index_shards([str(path)], cache_dir=cache)
    assert changed.content != indexes[0].content


def test_the_content_of_a_shard_is_known(tmp_path):
    """Labels, captions and pictures, under the same headers; of a large shard some of the pictures."""
    noise = {f"s{number:03d}": os.urandom(1 << 17) for number in range(100)}
    path = tmp_path / "a.tar"

    def digests():
        (index,) = index_shards([str(path)], cache_dir=None)
        return index.digest, index.content

    for count, changed in ((9, ["s007"]), (100, list(noise))):
        with wds.TarWriter(str(path), mtime=0.0) as tar:
            for key, picture in list(noise.items())[:count]:
                tar.write({"__key__": key, "jpg": picture, "txt": f"caption of {key}", "cls": 1})
        before = digests()
        content = path.read_bytes()
        path.write_bytes(content.replace(b"caption of s004", b"caption 0f s004"))
        captions = digests()
        pictures = bytearray(content)
        for key in changed:
            pictures[content.index(noise[key]) + 60000] ^= 1
        path.write_bytes(pictures)
        assert len({before, captions, digests()}) == 3
        assert before[0] == captions[0] == digests()[0]
        path.write_bytes(content)
        path = path.rename(tmp_path / f"moved-{count}.tar")
        assert digests() == before


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    path = write_shard(tmp_path / "a.tar", ["x", "y", "z"])
    cache = tmp_path / "cache"
    time.sleep(0.1)
    index_shards([str(path)], cache_dir=cache)
    (saved,) = [file for file in cache.rglob("*") if file.is_file()]
    good = saved.read_text()
    saved.write_text(good[: len(good) // 2])
    (index,) = index_shards([str(path)], cache_dir=cache)
    assert len(index) == 3
    assert saved.read_text() == good


def test_an_edited_cache_file_is_made_anew(tmp_path, caplog):
    write_shard(tmp_path / "0.tar", ["a", "b"])
    cache = tmp_path / "cache"
    time.sleep(0.1)
    (first,) = index_shards([str(tmp_path / "0.tar")], cache_dir=cache)
    (file,) = (cache / "shards").iterdir()
    file.write_text(file.read_text().replace(f'"end": {first.end}', f'"end": {first.end - 512}'))
    (again,) = index_shards([str(tmp_path / "0.tar")], cache_dir=cache)
    assert again.end == first.end
    assert f"index {file} is damaged" in caplog.text


def test_a_shard_that_a_server_gives_no_version_of_is_indexed_anew(tmp_path):
    """With neither ETag nor time, a rewritten shard of equal size looks the same."""

    class Nameless(Ranges):
        def send_header(self, keyword, value):
            if keyword != "Last-Modified":
                super().send_header(keyword, value)

    with serving(files(tmp_path, Nameless)) as url:
        contents = []
        for key in "ab":
            write_shard(tmp_path / "0.tar", [key])
            (index,) = index_shards([f"{url}/0.tar"], cache_dir=tmp_path / "cache")
            contents.append(index.content)
    assert contents[0] != contents[1]


def test_order_and_progress_with_many_threads(tmp_path):
    paths = [str(write_shard(tmp_path / f"{n}.tar", [f"k{i}" for i in range(n)])) for n in range(12)]
    seen = []
    index = index_shards(paths, cache_dir=None, threads=5, progress=lambda done, total: seen.append((done, total)))
    assert [len(shard) for shard in index] == list(range(12))
    assert seen == [(done, 12) for done in range(1, 13)]
