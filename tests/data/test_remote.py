"""Remote shards from real local servers that fail: every byte and sample comes, once, or an error says why not."""

import contextlib
import gc
import logging
import multiprocessing
import os
import threading
import time
from itertools import islice

import fsspec
import huggingface_hub.constants
import pytest
from moto.server import ThreadedMotoServer

from clipdistill.data import StreamLoader, expand_urls, index_shards
from clipdistill.errors import InputError
from clipdistill.io.retries import Retries
from clipdistill.io.urls import ShardChangedError, ShardFile, one_line, shown, stat
from tests.servers import (
    Faulty,
    Hub,
    NoRanges,
    Ranges,
    Tagged,
    cut,
    dawdle,
    digests,
    end_early,
    files,
    hang_up,
    refuse,
    serving,
    shift,
    silence,
    stall,
    write_noise_shards,
)
from tests.streams import make_stream

QUICK = Retries(first_wait=0.02, connect_timeout=1.0, read_timeout=0.6)
PATIENT = Retries(first_wait=0.02)
"""For tests in which no answer may count as lost, however busy the machine."""

UNAVAILABLE = [refuse(503), refuse(503)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_noise_shards(folder)
    return folder


@pytest.fixture(scope="module", params=[0, 2])
def workers(request):
    return request.param


@pytest.fixture
def web(folder):
    """A server with ranges behind a proxy."""
    with proxied(folder, Ranges) as server:
        yield server


@pytest.fixture(scope="module")
def s3_proxy(folder):
    """S3 behind a proxy, named to clients by the environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    proxy = Faulty(f"http://{host}:{port}")
    with serving(proxy) as url, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", url)
        environment.setenv("AWS_ACCESS_KEY_ID", "someone")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "hidden-word")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        direct = fsspec.filesystem("s3", endpoint_url=f"http://{host}:{port}")
        direct.mkdir("bucket")
        direct.put(str(folder) + "/", "bucket/train/", recursive=True)
        proxy.url, proxy.direct = "s3://bucket/train", direct
        yield proxy
    moto.stop()


@pytest.fixture
def s3(s3_proxy):
    s3_proxy.faults.clear()
    s3_proxy.asked.clear()
    return s3_proxy


@contextlib.contextmanager
def proxied(folder, handler):
    with serving(files(folder, handler)) as backend, serving(proxy := Faulty(backend)) as url:
        proxy.url = url
        yield proxy


def index_of(base, **settings):
    return index_shards([f"{base}/0.tar", f"{base}/1.tar"], cache_dir=None, **settings)


def read(url, retries=QUICK, step=300_000):
    """A whole shard."""
    file = ShardFile(url, retries=retries)
    data = b""
    while piece := file.read_at(len(data), step):
        data += piece
    file.close()
    return data


@pytest.fixture(scope="module")
def expected(folder, workers):
    return digests(index_of(folder), workers)


@pytest.mark.parametrize(
    "faults",
    [
        [cut(100_000), cut(0), None, cut(2_000_000)],
        [end_early(1000), None, end_early(0)],
        [refuse(500), refuse(502), refuse(504), None, refuse(429)],
        [hang_up, hang_up, hang_up, None],
        [stall(70_000), None, silence],
        [dawdle],
    ],
    ids=["cut", "early end", "refused", "no answer", "stalled", "slow"],
)
def test_every_byte_comes_once_whatever_fails(folder, s3, faults):
    content = (folder / "1.tar").read_bytes()
    for handler in (Ranges, NoRanges, Tagged):
        with proxied(folder, handler) as web:
            web.faults["GET"].extend(faults)
            assert read(f"{web.url}/1.tar") == content
            assert not web.faults["GET"]
    s3.faults["GET"].extend(faults)
    assert read("s3://bucket/train/1.tar") == content
    assert not s3.faults["GET"]


def test_connections_that_never_last_bring_the_shard_home(folder, web):
    web.faults["GET"].extend([cut(100_000)] * 1000)
    file = ShardFile(f"{web.url}/0.tar", retries=QUICK)
    assert file.read_at(0, 1_000_000) == (folder / "0.tar").read_bytes()[:1_000_000]


def test_another_part_than_asked_for_is_not_taken(folder, web):
    web.faults["GET"].extend([None, shift])
    assert read(f"{web.url}/1.tar") == (folder / "1.tar").read_bytes()
    assert web.asked["GET"] > 2


@pytest.mark.parametrize("handler", [Ranges, NoRanges])
def test_batches_over_http_are_those_of_the_disk(folder, handler, workers, expected):
    with proxied(folder, handler) as web:
        index = index_of(web.url)
        web.faults["GET"].extend([cut(90_000), None, *UNAVAILABLE, end_early(5000), dawdle, None, hang_up])
        assert digests(index, workers) == expected
        assert not web.faults["GET"]
    assert expected[1] == {}


def test_batches_from_s3_are_those_of_the_disk(s3, workers, expected):
    index = index_shards(expand_urls(["s3://bucket/train/*.tar"]), cache_dir=None)
    s3.faults["GET"].extend([cut(90_000), None, *UNAVAILABLE, end_early(5000), dawdle, None, hang_up])
    s3.faults["HEAD"].extend([*UNAVAILABLE, None, hang_up])
    assert digests(index, workers) == expected
    assert not s3.faults["GET"]


def test_batches_from_memory_are_those_of_the_disk(folder, workers, expected):
    memory = fsspec.filesystem("memory")
    for name in ("0.tar", "1.tar"):
        memory.pipe(f"/train/{name}", (folder / name).read_bytes())
    assert digests(index_shards(expand_urls(["memory://train/*.tar"]), cache_dir=None), workers) == expected


def test_batches_from_the_hub_are_those_of_the_disk(folder, workers, expected, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with proxied(folder, Hub) as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": "hf_word"})
        index = index_shards(expand_urls(["hf://datasets/owner/name/*.tar"]), cache_dir=None)
        hub.faults["GET"].extend([None, cut(100_000)])
        assert digests(index, workers) == expected
        assert not hub.faults["GET"]


def test_listing_and_lookups_are_tried_again_too(web):
    web.faults["GET"].extend([hang_up, None, silence, *UNAVAILABLE])
    urls = expand_urls([f"{web.url}/*.tar"], retries=QUICK)
    assert urls == [f"{web.url}/0.tar", f"{web.url}/1.tar"]
    looked_up = stat(urls[0])
    for faults in (UNAVAILABLE, [hang_up, hang_up], [silence]):
        web.faults["HEAD"].extend(faults)
        web.faults["GET"].extend(faults)
        assert stat(urls[0], retries=QUICK) == looked_up
        web.faults.clear()


def test_indexing_is_tried_again_too(web):
    urls = [f"{web.url}/0.tar", f"{web.url}/1.tar"]
    web.faults["HEAD"].extend([refuse(503), hang_up])
    web.faults["GET"].extend([refuse(503), hang_up, cut(10)])
    assert [len(shard) for shard in index_shards(urls, cache_dir=None)] == [10, 14]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_what_lasts_is_not_tried_again(web, s3, status, caplog):
    for server in (web, s3):
        server.faults["GET"].extend([refuse(status)] * 9)
        file = ShardFile(f"{server.url}/0.tar", retries=PATIENT)
        with pytest.raises(Exception, match=r"Forbidden|Not Found|Gone"):
            file.read_at(0, 10)
        assert server.asked["GET"] == 1
    assert not caplog.records


def test_missing_shards_and_wrong_keys_are_said_at_once(web, s3, caplog):
    for base in (web.url, "s3://bucket/train"):
        with pytest.raises(InputError, match=r"gone\.tar.*(404|FileNotFoundError)"):
            index_shards([f"{base}/gone.tar"], cache_dir=None)
    s3.faults["HEAD"].append(refuse(403))
    with pytest.raises(InputError, match=r"locked\.tar.*(Forbidden|PermissionError)"):
        index_shards(["s3://bucket/locked.tar"], cache_dir=None)
    assert not caplog.records


def test_attempts_are_bounded(web, s3):
    for server in (web, s3):
        for fault in (refuse(503), cut(10)):
            file = ShardFile(f"{server.url}/0.tar", retries=Retries(attempts=3, first_wait=0.01))
            server.asked.clear()
            server.faults["GET"].extend([fault] * 3)
            with pytest.raises(Exception, match=r"503|Service Unavailable|[Pp]ayload"):
                file.read_at(0, 10)
            assert server.asked["GET"] == 3


def test_seconds_are_bounded(web):
    file = ShardFile(f"{web.url}/0.tar", retries=Retries(attempts=10**6, seconds=0.5, longest_wait=0.1))
    web.faults["GET"].extend([refuse(503)] * 10**5)
    began = time.monotonic()
    with pytest.raises(Exception, match="503"):
        file.read_at(0, 10)
    assert 0.3 < time.monotonic() - began < 5


def test_a_server_that_stalls_for_good_is_left(web, s3):
    for server in (web, s3):
        file = ShardFile(f"{server.url}/0.tar", retries=Retries(attempts=2, first_wait=0.01, read_timeout=0.2))
        server.faults["GET"].extend([stall(1000), stall(0)])
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            file.read_at(0, 10)
        assert time.monotonic() - began < 5
        assert server.asked["GET"] == 2


def test_a_server_that_names_a_time_is_given_it(web):
    file = ShardFile(f"{web.url}/0.tar", retries=QUICK)
    web.faults["GET"].append(refuse(429, Retry_After="1"))
    began = time.monotonic()
    assert len(file.read_at(0, 10)) == 10
    assert time.monotonic() - began >= 1


def test_each_repetition_is_logged_once_and_no_secret(folder, web, caplog):
    web.faults["HEAD"].append(refuse(503))
    web.faults["GET"].extend([refuse(503), None, cut(5000), refuse(503)])
    secret = web.url.replace("http://", "http://user:pass@word@") + "/1.tar?signature=a%2Fb"
    assert read(secret) == (folder / "1.tar").read_bytes()
    lines = [record.getMessage() for record in caplog.records]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert lines[0].startswith(f"shard {web.url}/1.tar: ClientResponseError: 503")
    assert all(line.startswith(f"shard {web.url}/1.tar: byte 4,194,304: ") for line in lines[1:])
    assert "ContentLengthError" in lines[1]
    assert "ClientResponseError: 503" in lines[2]
    for word in ("user", "pass", "word", "signature", "a/b", "a%2Fb"):
        assert word not in caplog.text


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://user:p@ss@host/a.tar?X-Amz-Signature=5#6", "https://host/a.tar"),
        ("s3://key:word@bucket/a.tar", "s3://bucket/a.tar"),
        ("simplecache::https://user:word@host/a@b.tar?x", "simplecache::https://host/a@b.tar"),
        ("/disk/what?.tar", "/disk/what?.tar"),
    ],
)
def test_urls_are_shown_without_credentials(url, safe):
    assert shown(url) == safe
    assert one_line(OSError(f"no {url!r} here")) == f"OSError: no {safe!r} here"


def overwrite(path, content, *, later):
    """Write a file anew in one go, with a time of its own."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.utime(fresh, (later, later))
    fresh.replace(path)


@pytest.mark.parametrize("fault", [None, cut(100_000)], ids=["between answers", "after a cut"])
@pytest.mark.parametrize("handler", [Ranges, NoRanges, Tagged])
def test_two_versions_over_http_are_never_stitched(folder, tmp_path, handler, fault):
    content = (folder / "1.tar").read_bytes()
    overwrite(tmp_path / "1.tar", content, later=1_000_000_000)
    with proxied(tmp_path, handler) as web:
        looked_up = stat(f"{web.url}/1.tar")
        file = ShardFile(f"{web.url}/1.tar", retries=QUICK)
        assert file.read_at(0, 1000) == content[:1000]
        overwrite(tmp_path / "1.tar", content[::-1], later=1_500_000_000)
        web.faults["GET"].append(fault)
        with pytest.raises(ShardChangedError, match="overwritten"):
            file.read_at(len(content) - 9, 9)
        with pytest.raises(ShardChangedError, match="overwritten"):
            ShardFile(f"{web.url}/1.tar", stat=looked_up).read_at(0, 9)


@pytest.mark.parametrize("fault", [None, cut(100_000)], ids=["between answers", "after a cut"])
def test_two_versions_in_s3_are_never_stitched(folder, s3, fault):
    content = (folder / "1.tar").read_bytes()
    s3.direct.pipe("bucket/other/1.tar", content)
    looked_up = stat("s3://bucket/other/1.tar")
    file = ShardFile("s3://bucket/other/1.tar", retries=QUICK)
    assert file.read_at(0, 1000) == content[:1000]
    s3.direct.pipe("bucket/other/1.tar", content[::-1])
    s3.faults["GET"].append(fault)
    with pytest.raises(ShardChangedError, match="overwritten"):
        file.read_at(len(content) - 9, 9)
    with pytest.raises(ShardChangedError, match="overwritten"):
        ShardFile("s3://bucket/other/1.tar", stat=looked_up)


def test_a_shard_that_shrank_or_grew_is_another(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(5 << 20))
    looked_up = stat(str(tmp_path / "a.tar"))
    os.utime(tmp_path / "a.tar", (5, 5))
    assert len(ShardFile(str(tmp_path / "a.tar"), stat=looked_up).read_at(100, 10)) == 10
    (tmp_path / "a.tar").write_bytes(bytes(6 << 20))
    with pytest.raises(ShardChangedError, match="overwritten"):
        ShardFile(str(tmp_path / "a.tar"), stat=looked_up)


def test_a_run_does_not_go_on_with_another_version(folder, tmp_path):
    overwrite(tmp_path / "1.tar", (folder / "1.tar").read_bytes(), later=1_000_000_000)
    with proxied(tmp_path, Tagged) as web:
        index = index_shards([f"{web.url}/1.tar"], cache_dir=None)
        steps = iter(StreamLoader(make_stream(index, batch_size=2, image_size=8, shuffle=0)))
        next(steps)
        overwrite(tmp_path / "1.tar", (folder / "1.tar").read_bytes(), later=1_500_000_000)
        with pytest.raises(InputError, match="overwritten"):
            list(islice(steps, 20))


def read_in_a_worker(url):
    file = ShardFile(url)
    gc.collect()
    assert len(file.read_at(0, 10)) == 10


def test_the_parent_still_reads_after_its_forked_workers_did(folder, web, s3, caplog):
    own = Retries(read_timeout=4.5)  # and so connections that no other test holds on to
    for base in (web.url, s3.url):
        url = f"{base}/0.tar"
        assert read(url, own) == (folder / "0.tar").read_bytes()
        worker = multiprocessing.get_context("fork").Process(target=read_in_a_worker, args=(url,))
        worker.start()
        worker.join(20)
        assert worker.exitcode == 0
        assert read(url, own) == (folder / "0.tar").read_bytes()
    assert not caplog.records


def test_many_threads_read_at_once(folder, web, s3):
    content = (folder / "0.tar").read_bytes()
    web.faults["GET"].extend([cut(1000), None] * 6)
    s3.faults["GET"].extend([cut(1000), None] * 6)
    right = []
    threads = [
        threading.Thread(target=lambda url=url: right.append(read(f"{url}/0.tar") == content))
        for url in [web.url, "s3://bucket/train"] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8
