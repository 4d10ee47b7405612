"""Bad and hostile samples, from real shards through the index, the reader and the stream."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest

from clipdistill.data import StreamLoader, index_shards
from tests.conftest import png
from tests.streams import make_stream

GOOD = png((200, 30, 30))


def write(path, members, *, tar_format=tarfile.PAX_FORMAT):
    """A shard of (name, content); a number for content is the size of a file of zeros, which takes no disk space."""
    with path.open("wb") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = content if isinstance(content, int) else len(content)
            file.write(info.tobuf(tar_format, "utf-8", "surrogateescape"))
            if isinstance(content, int):
                file.seek(info.size, io.SEEK_CUR)
            else:
                file.write(content)
            file.seek(-file.tell() % 512, io.SEEK_CUR)
        file.write(bytes(1024))
    return str(path)


def sample(key, *, image=GOOD, caption=b"a caption", label=b"3"):
    return [(f"{key}.png", image), (f"{key}.txt", caption), (f"{key}.cls", label)]


def read(urls, **settings):
    """(key: (caption, label)) of the good samples, and the counts of the bad."""
    index = index_shards(urls, cache_dir=None)
    loader = StreamLoader(make_stream(index, batch_size=1, image_size=8, shuffle=0, **settings))
    batches = iter(loader)
    found = [next(batches) for _ in range(sum(map(len, index)))]
    assert len({batch.keys[0] for batch in found}) + sum(loader.skipped.values()) == len(found)
    return {batch.keys[0]: (batch.captions[0], int(batch.labels_B[0])) for batch in found}, loader.skipped


def test_a_forged_size_costs_its_own_sample_alone(tmp_path):
    path = tmp_path / "0.tar"
    write(path, [*sample("a"), *sample("b"), *sample("c"), *sample("d")], tar_format=tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    header = data.index(b"b.txt\0")
    forged = tarfile.TarInfo("b.txt")
    forged.size = 1 << 50
    data[header : header + 512] = forged.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    found, _ = read([str(path)], require_captions=True, require_labels=True)
    assert found.keys() == {"a", "c", "d"}


def test_members_on_both_sides_of_damage_are_never_one_sample(tmp_path):
    one = write(tmp_path / "one.tar", [("0.png", GOOD)])
    other = write(tmp_path / "other.tar", [("0.txt", b"of another picture"), *sample("1")])
    both = tmp_path / "both.tar"
    both.write_bytes(b"".join(Path(url).read_bytes() for url in (one, other)))
    found, skipped = read([str(both)])
    assert found == {"0": ("", -1), "1": ("a caption", 3)}
    assert skipped == {}


def test_a_hostile_name_is_a_name(tmp_path):
    keys = [
        "../../x",
        "/etc/passwd",
        "C:\\x",
        "a\nb\x1b[31m",
        "%s%n",
        "x" * 10_000,
        "\udcff\udcfe",
        " ",
        "写" * 90,
        "-rf",
    ]
    url = write(tmp_path / "0.tar", [member for key in keys for member in sample(key)])
    before = sorted(path.name for path in tmp_path.iterdir())
    found, skipped = read([url])
    assert found.keys() == set(keys)
    assert skipped == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_log_lines_stay_lines_whatever_the_names(tmp_path, caplog):
    hostile = [("k\n1.png", GOOD), ("k\n1.te\nxt", b""), ("k\n1.te\nxt", b""), ("k\n2.txt", b"\n")]
    url = write(tmp_path / "0.tar", [*sample("a"), *hostile, ("k\n3.png\n", 3000)])
    read([url])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert not any("\n" in message for message in messages)


def test_a_sample_of_more_than_256_mib_is_refused_and_one_before_much_else_is_not(tmp_path):
    large = [("large.png", 257 << 20), ("large.txt", b"t")]
    url = write(
        tmp_path / "0.tar", [*sample("a"), ("README", 300 << 20), *large, *sample("b")], tar_format=tarfile.GNU_FORMAT
    )
    found, skipped = read([url])
    assert found.keys() == {"a", "b"}
    assert skipped == {"sample too large": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "broken json"),
        (b'{"text": "t"', "broken json"),
        (b'{"text": "t"} x', "broken json"),
        (b'{"text": "caf\xe9"}', "broken json"),
        (b"[" * 100_000, "broken json"),
        (b'{"text":' * 100_000, "broken json"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "broken json"),
        (pickle.dumps({"text": "t"}), "broken json"),
        (b"[" + b"[]," * (6 << 20) + b"0]", "json too large"),
        (b"[]", "no caption"),
        (b'{"text": null}', "no caption"),
        (b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}", "caption not text"),
        (b'{"text": ["t", 3]}', "caption not text"),
        (b'{"text": []}', "no caption"),
        (b'{"text": ["", " "]}', "empty caption"),
        (json.dumps({"text": ["y" * 40_000] * 2}).encode(), "caption too long"),
        (b'{"text": "\\ud800"}', "caption not UTF-8"),
        (json.dumps({"text": "y" * (1 << 20)}).encode(), "caption too long"),
    ],
)
def test_bad_json_is_skipped_under_its_reason(tmp_path, content, reason):
    members = [("a.png", GOOD), ("a.json", b'{"text": "fine"}'), ("b.png", GOOD), ("b.json", content)]
    found, skipped = read([write(tmp_path / "0.tar", members)], caption_key="text", require_captions=True)
    assert found == {"a": ("fine", -1)}
    assert skipped == {reason: 1}


@pytest.mark.parametrize(
    "label",
    [b"", b"cat", b"1.0", b"1_0", b"0x1", b"1e2", b"1 2", b"\0", b"\xff", "٣".encode(), b"9" * 9999, b"-1", b"9" * 19],
)
def test_what_is_no_class_number_is_skipped(tmp_path, label):
    url = write(tmp_path / "0.tar", [*sample("a", label=b" 007\n"), *sample("b", label=label)])
    found, skipped = read([url], require_labels=True)
    assert found == {"a": ("a caption", 7)}
    assert skipped == {"label not a class number": 1}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (b"x" * (1 << 20), "caption too long"),
        (b"x" * 65_537, "caption too long"),
        (b"\xff\xfea\0", "caption not UTF-8"),
        (b"caf\xe9", "caption not UTF-8"),
        (b"\xed\xa0\x80", "caption not UTF-8"),
        (b"", "empty caption"),
        (b"\xef\xbb\xbf \t\r\n", "empty caption"),
    ],
)
def test_a_bad_caption_is_skipped_where_captions_are_required_and_empty_where_not(tmp_path, caption, expected):
    members = [*sample("a", caption=b"\xef\xbb\xbfcaf\xc3\xa9\n"), *sample("b", caption=caption)]
    url = write(tmp_path / "0.tar", members)
    assert read([url], require_captions=True) == ({"a": ("café", 3)}, {expected: 1})
    assert read([url]) == ({"a": ("café", 3), "b": ("", 3)}, {})


def test_one_member_twice_is_bad_wherever_and_in_whatever_case(tmp_path):
    members = [
        *sample("a"),
        *sample("b"),
        ("b.PNG", GOOD),
        *sample("c"),
        *sample("c"),
        ("d.png", GOOD),
        ("d.seg.png", b""),
    ]
    found, skipped = read([write(tmp_path / "0.tar", members)])
    assert found.keys() == {"a", "d"}
    assert skipped == {"duplicate member": 2}
