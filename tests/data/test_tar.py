"""Walking tar headers, against the standard library and WebDataset, and on damaged archives."""

import io
import tarfile
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from clipdistill.data.tar import Damage, Member, walk
from clipdistill.data.tar_shards import split_name


def make_tar(members, *, tar_format=tarfile.PAX_FORMAT):
    """A tar in memory of (name, content); content None makes a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(content)
                info.mtime = 1.5  # makes PAX_FORMAT write an extension header, as webdataset's writer does
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def walked(data):
    return list(walk(lambda at, size: data[at : at + size], len(data)))


names = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=300).filter(
    lambda name: name.strip("/") == name
)


@settings(deadline=None, max_examples=60)
@given(
    members=st.lists(st.tuples(names, st.none() | st.binary(max_size=1500)), max_size=6),
    tar_format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_agrees_with_tarfile(members, tar_format):
    data = make_tar(members, tar_format=tar_format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size, m.isreg()) for m in tar]
    found = walked(data)
    assert [(m.name.rstrip("/"), m.header, m.start, m.size, m.regular) for m in found] == expected


def test_links_and_devices_are_not_regular():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("a.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        last = tarfile.TarInfo("b.png")
        tar.addfile(last)
    assert [(m.name, m.regular) for m in walked(file.getvalue())] == [("a.png", False)] * 4 + [("b.png", True)]


def test_finds_its_way_back_after_garbage():
    data = bytearray(make_tar([(f"{i}.txt", b"x" * 700) for i in range(5)], tar_format=tarfile.USTAR_FORMAT))
    data[3 * 512 : 4 * 512] = b"\xa5" * 512  # the second header
    found = walked(bytes(data))
    assert [m.name for m in found if isinstance(m, Member)] == ["0.txt", "2.txt", "3.txt", "4.txt"]
    damage = next(m for m in found if isinstance(m, Damage))
    assert damage.at == 3 * 512


def test_reads_on_after_zeros_in_the_middle_and_says_so():
    one = make_tar([("a.txt", b"1")])
    found = walked(one + make_tar([("b.txt", b"2")]))
    assert [m.name for m in found if isinstance(m, Member)] == ["a.txt", "b.txt"]
    assert ["end-of-archive" in m.reason for m in found if isinstance(m, Damage)] == [True]
    assert [m.name for m in walked(one)] == ["a.txt"]


@pytest.mark.parametrize("keep", [0, 100, 512, 1000, 1024 + 300])
def test_a_cut_archive_is_named_as_such(keep):
    data = make_tar([("a.txt", b"x" * 500), ("b.txt", b"y" * 500)], tar_format=tarfile.USTAR_FORMAT)[:keep]
    assert isinstance(walked(data)[-1], Damage)


def test_a_huge_claimed_size_reads_nothing():
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 62
    data = header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024
    (damage,) = walked(data)
    assert damage.name == "a.png"
    assert "cut short" in damage.reason


def test_behind_a_forged_size_the_other_members_are_found():
    data = bytearray(make_tar([(f"{i}.txt", b"x" * 700) for i in range(4)], tar_format=tarfile.USTAR_FORMAT))
    forged = tarfile.TarInfo("1.txt")
    forged.size = 1 << 40
    data[3 * 512 : 4 * 512] = forged.tobuf(tarfile.GNU_FORMAT)
    found = walked(bytes(data))
    assert [m.name for m in found if isinstance(m, Member)] == ["0.txt", "2.txt", "3.txt"]
    (damage,) = [m for m in found if isinstance(m, Damage)]
    assert (damage.at, damage.name) == (3 * 512, "1.txt")


def extended(content, kind=b"x"):
    """An archive of a member behind an extension header with this content, and another member."""
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"%011o\0" % len(content)
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    members = make_tar([("a.txt", b"1"), ("b.txt", b"2")], tar_format=tarfile.USTAR_FORMAT)
    return bytes(header) + content + bytes(-len(content) % 512) + members


@pytest.mark.parametrize(
    "content",
    [
        b"junk",
        b"0 path=x\n",
        b"-9 path=x\n",
        b"99999999999 path=x\n",
        b"9 path=x ",
        b"11 size=\xff\n",
        b"10 size=1e\n",
        b"8 path=x\n9 path=y\n",
        b"7 path\n",
        b"9" * 60_000,
    ],
)
def test_an_extension_header_that_makes_no_sense_is_damage_and_its_member_keeps_its_own_name(content):
    damage, first, second = walked(extended(content))
    assert isinstance(damage, Damage)
    assert "extension" in damage.reason
    assert [(m.name, m.size) for m in (first, second)] == [("a.txt", 1), ("b.txt", 1)]
    assert first.header == 0


@pytest.mark.parametrize(
    "content", [b"", b"20 path=../../x.png\n", b"9 size=1\n", b"22 GNU.sparse.major=1\n", b"8 a=\xff\0\n"]
)
def test_extension_headers_mean_what_they_mean_to_tarfile(content):
    data = extended(content)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, m.offset, m.offset_data) for m in tar]
    assert [(m.name, m.header, m.start) for m in walked(data) if isinstance(m, Member)] == expected


def test_a_shard_of_costly_extension_headers_does_not_stop_the_walk():
    data = extended(b"2 " * 30_000) * 100
    started = time.process_time()
    assert len([m for m in walked(data) if isinstance(m, Member)]) == 200
    assert time.process_time() - started < 3


def test_a_name_of_10_kb_is_found_and_cut_in_messages():
    name = "../" * 3400 + "x.png"
    whole = make_tar([(name, b"1" * 600)], tar_format=tarfile.GNU_FORMAT)
    assert walked(whole)[0].name == name
    (damage,) = walked(whole[: 512 * 23])
    assert damage.name == name
    assert len(damage.reason) < 200


def test_an_archive_inside_an_archive_stays_one_member():
    inner = make_tar([("0.png", b"i"), ("1.png", b"j")])
    found = walked(make_tar([("0.tar", inner), ("2.png", b"k")]))
    assert [m.name for m in found] == ["0.tar", "2.png"]


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (bytes(512), None),
        (bytes(1024 + 10_240 - 512), None),
        (bytes(20_000), "incomplete"),
        (bytes(1024) + b"junk" * 500, "no tar header"),
        (b"junk" * 500 + bytes(10_240), "no tar header"),
    ],
)
def test_an_end_that_may_hide_lost_members_is_damage(tail, reason):
    member = make_tar([("a.txt", b"1")], tar_format=tarfile.USTAR_FORMAT)[:1024]
    damages = [m.reason for m in walked(member + tail) if isinstance(m, Damage)]
    assert len(damages) == (reason is not None)
    assert reason is None or reason in damages[0]


@settings(deadline=None, max_examples=150)
@given(
    edits=st.lists(st.tuples(st.integers(0, 6 * 1024 - 1), st.integers(0, 255)), max_size=40),
    keep=st.integers(0, 10240),
)
def test_never_fails_or_leaves_the_archive_on_mutated_bytes(edits, keep):
    data = bytearray(make_tar([("a/b.png", b"p" * 900), ("ü" * 120 + ".txt", b"t"), ("c.cls", b"7")]))
    for at, value in edits:
        data[at] = value
    data = bytes(data[:keep])
    last = -1
    for entry in walked(data):
        if isinstance(entry, Member):
            assert last < entry.header < entry.start <= entry.start + entry.size <= len(data)
            last = entry.header


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "a.b.png",
        "d.e/f.seg.png",
        "../../x.png",
        "d/.hidden.png",
        "plain",
        "d.e/plain",
        "a.",
        "ü.TXT",
    ],
)
def test_keys_are_cut_where_webdataset_cuts_them(name):
    key, extension = base_plus_ext(name)
    expected = (key, extension.lower()) if key is not None and extension and not key.endswith("/") else None
    assert split_name(name) == expected


@pytest.mark.parametrize("name", ["__meta__", "__index__/x.json", "__a.b__"])
def test_meta_members_belong_to_no_sample(name):
    assert split_name(name) is None
