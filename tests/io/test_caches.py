"""``clipdistill cache-clean``: what it deletes, and that what it deleted is made again."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdistill.cli import main
from clipdistill.evaluation.sets.open import open_set
from tests.conftest import colour_samples
from tests.evaluation.test_sets import shard_set
from tests.servers import age, files, serving


def leave(path: Path, days: float) -> None:
    """Let a file look as if it was last used so many days ago."""
    then = time.time() - days * 24 * 60 * 60
    os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path: Path, teacher_folder: Path) -> Path:
    """A cache with files of all kinds, and others that are none of its own."""
    folder = tmp_path / "cache"
    shard_set(tmp_path / "site", colour_samples(6))
    age(tmp_path / "site")
    with serving(files(tmp_path / "site")) as url:
        command = ["evaluate", "--model", str(teacher_folder), "--data", url, "--cache", str(folder)]
        for _ in range(2):  # files that have just been written have no index
            assert main([*command, "--output", str(tmp_path / "result.json")]) == 0
            time.sleep(0.1)
    for name in ("shards/notes.json", "copies/mine.tar", "other.tar", "class_embeddings/" + 64 * "0" + ".txt"):
        (folder / name).write_text("mine")
    return folder


def own(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.read_bytes() != b"mine")


def test_files_that_nobody_has_used_are_deleted(
    cache: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kinds = [path.parent.name for path in own(cache)]
    assert kinds == ["class_embeddings", *2 * ["copies"], *2 * ["shards"]]
    old = [path for path in own(cache) if path.parent.name != "copies"]
    for path in old:
        leave(path, 31)
    capsys.readouterr()
    assert main(["cache-clean", "--cache", str(cache), "--dry-run"]) == 0
    assert f"{cache / 'shards'}: 2 of 2 files would be deleted" in capsys.readouterr().out
    assert len(own(cache)) == 5
    assert main(["cache-clean", "--cache", str(cache)]) == 0
    assert f"{cache / 'copies'}: 0 of 2 files deleted" in capsys.readouterr().out
    assert [path.parent.name for path in own(cache)] == ["copies", "copies"]
    assert main(["cache-clean", "--cache", str(cache), "--all"]) == 0
    assert own(cache) == []
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 4
    assert main(["cache-clean", "--cache", str(tmp_path / "none")]) == 0


def test_a_file_in_use_is_none_that_nobody_has_used(cache: Path, teacher_folder: Path, tmp_path: Path) -> None:
    for path in own(cache):
        leave(path, 31)
    local = ["--data", str(tmp_path / "site"), "--cache", str(cache), "--output", str(tmp_path / "result.json")]
    assert main(["evaluate", "--model", str(teacher_folder), *local]) == 0
    assert main(["cache-clean", "--cache", str(cache)]) == 0
    assert [path.parent.name for path in own(cache)] == ["class_embeddings", *2 * ["shards"]]


def test_the_least_recently_used_go_first(cache: Path) -> None:
    copies = [path for path in own(cache) if path.parent.name == "copies"]
    for days, path in enumerate([*copies, *(path for path in own(cache) if path not in copies)]):
        leave(path, days)
    size = copies[0].stat().st_size
    assert main(["cache-clean", "--cache", str(cache), "--max-gb", str(1.5 * size / 1e9)]) == 0
    left = own(cache)
    assert copies[0] in left
    assert copies[1] not in left
    assert sum(path.stat().st_size for path in left) <= 1.5 * size


def test_what_was_deleted_is_made_again(cache: Path, tmp_path: Path) -> None:
    with serving(files(tmp_path / "site")) as url:
        data = open_set(url, cache=cache)
        identity = data.identity()
        assert main(["cache-clean", "--cache", str(cache), "--all"]) == 0
        assert data.identity() == identity
        assert open_set(url, cache=cache).identity() == identity


def test_what_a_run_has_set_aside(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = str(write_config(evaluation={"folders": []})), tmp_path / "run"
    assert main(["train", "--config", config]) == 0
    assert main(["train", "--config", config, "--restart"]) == 0
    (run / "checkpoints" / "abandoned_step_00000001").mkdir()
    before = sorted(path for path in run.rglob("*") if "abandoned_" not in str(path))
    clean = ["cache-clean", "--cache", str(tmp_path / "cache"), "--abandoned"]
    assert main([*clean, str(tmp_path / "cache")]) == 2
    assert "no config.yaml in it" in capsys.readouterr().err
    assert main([*clean, str(run), "--dry-run"]) == 0
    assert (run / "abandoned_001").is_dir()
    assert main([*clean, str(run)]) == 0
    assert sorted(run.rglob("*")) == before
