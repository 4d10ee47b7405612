"""Shards over HTTP, from real local servers: one serves ranges, one whole files."""

import functools
import http.server
import re
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from clipdistill.data import ImageTextStream, StreamLoader, expand_urls, index_shards
from clipdistill.errors import InputError


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files with single byte ranges."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            return super().do_GET()
        data = path.read_bytes()
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1])
        return None

    def log_message(self, *args):
        pass


class NoRanges(http.server.SimpleHTTPRequestHandler):
    """Python's own server: it answers a range with the whole file."""

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tmp_path):
    """Serve tmp_path with a handler; gives the base URL."""
    servers = []

    def start(handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def shards(tmp_path):
    """Two shards of 7 and 5 MB: larger than what the reader fetches at once."""
    noise = np.random.default_rng(0)
    for shard, size in enumerate((14, 10)):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in range(size):
                image = Image.fromarray(noise.integers(0, 256, (410, 410, 3), np.uint8))
                tar.write({"__key__": f"{shard}-{number:02d}", "png": image, "txt": f"{number}"})
    return expand_urls([str(tmp_path)])


def load(index, workers):
    stream = ImageTextStream(index, batch_size=4, image_size=8, shuffle=6, num_workers=workers, require_captions=True)
    return StreamLoader(stream)


def test_remote_wildcards_and_folders_are_listed(tmp_path, serve):
    for number in (2, 10):
        (tmp_path / f"{number}.tar").touch()
    url = serve(NoRanges)
    assert expand_urls([f"{url}/*.tar"]) == [f"{url}/2.tar", f"{url}/10.tar"]
    assert expand_urls([f"{url}/"]) == [f"{url}/2.tar", f"{url}/10.tar"]
    with pytest.raises(InputError, match="nothing found"):
        expand_urls([f"{url}/a*.tar"])


def test_a_missing_shard_is_an_input_error_without_the_secret_of_its_url(serve):
    with pytest.raises(InputError, match=r"gone\.tar") as caught:
        index_shards([f"{serve(NoRanges)}/gone.tar?signature=secret"], cache_dir=None)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("handler", [Ranges, NoRanges])
def test_the_index_is_that_of_the_disk(shards, serve, handler, tmp_path):
    url = serve(handler)
    local = index_shards(shards, cache_dir=None)
    remote = index_shards([f"{url}/0.tar", f"{url}/1.tar"], cache_dir=tmp_path / "cache")
    for one, other in zip(remote, local, strict=True):
        assert one.offsets.tolist() == other.offsets.tolist()
        assert (one.size, one.end, one.problems) == (other.size, other.end, ())


@pytest.mark.parametrize("handler", [Ranges, NoRanges])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_the_disk(shards, serve, handler, workers):
    url = serve(handler)
    local = load(index_shards(shards, cache_dir=None), workers)
    remote = load(index_shards([f"{url}/0.tar", f"{url}/1.tar"], cache_dir=None), workers)
    middle = None
    for step, (one, other) in enumerate(islice(zip(remote, local, strict=False), 9)):
        assert one.keys == other.keys
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        middle = local.state_dict() if step == 4 else middle
    assert remote.skipped == {}
    remote.load_state_dict(middle)
    local.load_state_dict(middle)
    for one, other in islice(zip(remote, local, strict=False), 3):
        assert one.keys == other.keys
