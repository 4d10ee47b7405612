"""Shards over HTTP, from real local servers: one serves ranges, one whole files."""

from itertools import islice

import pytest
import torch

from clipdistill.data import StreamLoader, expand_urls, index_shards
from clipdistill.errors import InputError
from tests.servers import NoRanges, Ranges, files, serving, write_noise_shards
from tests.streams import make_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_noise_shards(folder)
    return folder


@pytest.fixture
def serve(tmp_path):
    """Serve tmp_path, or another folder, with a handler; gives the base URL."""
    started = []

    def start(handler, folder=tmp_path):
        started.append(serving(files(folder, handler)))
        return started[-1].__enter__()

    yield start
    for server in started:
        server.__exit__(None, None, None)


def load(index, workers):
    stream = make_stream(index, batch_size=4, image_size=8, shuffle=6, num_workers=workers, require_captions=True)
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
def test_the_index_is_that_of_the_disk(folder, serve, handler, tmp_path):
    url = serve(handler, folder)
    local = index_shards(expand_urls([str(folder)]), cache_dir=None)
    remote = index_shards([f"{url}/0.tar", f"{url}/1.tar"], cache_dir=tmp_path / "cache")
    for one, other in zip(remote, local, strict=True):
        assert one.offsets.tolist() == other.offsets.tolist()
        assert (one.stat.size, one.end, one.problems) == (other.stat.size, other.end, ())


@pytest.mark.parametrize("handler", [Ranges, NoRanges])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_are_those_of_the_disk(folder, serve, handler, workers):
    url = serve(handler, folder)
    local = load(index_shards(expand_urls([str(folder)]), cache_dir=None), workers)
    remote = load(index_shards([f"{url}/0.tar", f"{url}/1.tar"], cache_dir=None), workers)
    middle = None
    for step, (one, other) in enumerate(islice(zip(remote, local, strict=False), 9)):
        assert one.keys == other.keys
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        middle = local.state_dict() if step == 4 else middle
    assert remote.skipped == {}
    remote.load_state_dict([middle])
    local.load_state_dict([middle])
    for one, other in islice(zip(remote, local, strict=False), 3):
        assert one.keys == other.keys
