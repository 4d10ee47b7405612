"""URLs as people see them: no user, password, key or signature leaves the process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipdistill.cli import main
from clipdistill.io.urls import is_remote, shown, shown_text
from tests.servers import files, serving


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://user:pass@host/a.tar", "https://host/a.tar"),
        ("https://token@host:8080/a.tar", "https://host:8080/a.tar"),
        ("https://user:p@ss@host/a.tar", "https://host/a.tar"),
        ("https://user:pa/ss@host", "https://host"),
        ("https://user:p#s?s@host/a", "https://host/a"),
        ("https://host/{000..012}.tar?X-Amz-Signature=abc&x=1#part", "https://host/{000..012}.tar"),
        ("simplecache::https://user:pass@host/a.tar?sig=1", "simplecache::https://host/a.tar"),
        ("zip://a.tar::simplecache::https://u:p@host/b.zip?sig=1", "zip://a.tar::simplecache::https://host/b.zip"),
        ("zip://a?b::https://host/b.zip?sig=1", "zip://a::https://host/b.zip"),
        ("s3://KEY:SEC/RET@bucket/a.tar", "s3://bucket/a.tar"),
        ("HTTPS://user:pass@host/a", "HTTPS://host/a"),
        ("http://[::1]:80/a?sig=1", "http://[::1]:80/a"),
        ("https://host:8080/a@b.tar", "https://host:8080/a@b.tar"),
        ("hf://datasets/owner/name@revision/a.tar", "hf://datasets/owner/name@revision/a.tar"),
        ("folder/user:a@b?c#d.tar", "folder/user:a@b?c#d.tar"),
    ],
)
def test_what_is_shown_of_a_url(url: str, public: str) -> None:
    assert shown(url) == public
    message = f"shard {url!r}: cannot be read (from '{url}', \"{url}\")"
    assert shown_text(message) == f"shard {public!r}: cannot be read (from '{public}', \"{public}\")"


def test_a_message_keeps_its_lines_and_shows_control_characters() -> None:
    assert shown_text("a\x1b[31mred\x00\u202e\n\tb é 猫") == "a\\x1b[31mred\\x00\\u202e\n\tb é 猫"


@pytest.mark.parametrize("local", ["data", "/data/a@b", "file:///data", "C:\\data", "local-dir:data"])
def test_what_is_local(local: str) -> None:
    assert not is_remote(local)


@pytest.mark.parametrize("remote", ["http://h/a", "S3://b", "hf-hub:o/n", "hf://datasets/o/n", "simplecache::http://h"])
def test_what_is_remote(remote: str) -> None:
    assert is_remote(remote)


def test_no_secret_of_a_url_is_written_or_printed(
    write_config: Callable[..., Path], colours: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run over shards behind a password and a signature: its folder, its caches, its logs, its report, its errors."""
    secrets = ("hunter2", "s1gnature")

    def check(what: str) -> None:
        for secret in secrets:
            assert secret not in what

    with serving(files(colours)) as address:
        host = address.removeprefix("http://")
        urls = [f"http://user:{secrets[0]}@{host}/train/{number}.tar?sig={secrets[1]}" for number in range(3)]
        data: dict[str, Any] = {"batch_size": 8, "workers": 0, "cache": str(tmp_path / "cache")}
        config = write_config(
            data=data | {"shards": urls}, evaluation={"folders": [f"http://user:{secrets[0]}@{host}/set"]}
        )
        assert main(["-v", "train", "--config", str(config)]) == 0
        assert main(["train", "--config", str(config), "--resume", "auto", "train.steps=6"]) == 0
        assert main(["report", str(tmp_path / "run"), "--no-teacher"]) == 0
        missing = urls[0].replace("0.tar", "9.tar")
        assert main(["train", "--config", str(config), f"data.shards=['{missing}']", f"output={tmp_path}/other"]) == 2
        assert main(["train", "--config", str(config), f"prompts={urls[0]}"]) == 2
        results = str(tmp_path / "results")
        shard_set = f"http://user:{secrets[0]}@{host}/set"
        run = str(tmp_path / "run")
        assert main(["evaluate", "--model", run, "--data", shard_set, "--output", results]) == 0
        assert main(["evaluate", "--model", run, "--data", f"{shard_set}?{secrets[1]}"]) == 2
    check("".join(capfd.readouterr()))
    config.unlink()
    for path in tmp_path.rglob("*"):
        check(str(path))
        if path.is_file():
            check(path.read_bytes().decode("latin-1"))
