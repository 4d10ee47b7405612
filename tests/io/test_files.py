"""What is written: complete or not at all, readable as the umask says, through links, and never over a device."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.io.files import new_file, new_folder, write_text


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def modes(folder: Path) -> dict[str, set[str]]:
    paths = list(folder.rglob("*"))
    return {
        "files": {oct(path.stat().st_mode & 0o777) for path in paths if path.is_file()},
        "folders": {oct(path.stat().st_mode & 0o777) for path in paths if path.is_dir()},
    }


def test_permissions_of_a_run_and_its_caches_are_those_of_the_umask(
    umask: Callable[[int], int], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    umask(0o027)
    config = write_config(train={"steps": 2, "save_every": 1, "ema": 0.9, "trackers": []})
    assert main(["cache", "--config", str(config), f"teacher_cache.folder={tmp_path}/teacher", "data.views=2"]) == 0
    assert main(["train", "--config", str(config)]) == 0
    assert modes(tmp_path) == {"files": {"0o640"}, "folders": {"0o750"}}


@pytest.mark.slow
def test_permissions_of_an_export_are_those_of_the_umask(
    umask: Callable[[int], int], teacher_folder: Path, colours: Path, tmp_path: Path
) -> None:
    umask(0o007)
    output, prompts = str(tmp_path / "export"), str(colours / "prompts")
    assert main(["export", "--checkpoint", str(teacher_folder), "--output", output, "--prompts", prompts]) == 0
    assert modes(tmp_path) == {"files": {"0o660"}, "folders": {"0o770"}}


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, exists in (("old.txt", True), ("new.txt", False)):
        target = tmp_path / "data" / name
        if exists:
            target.write_text("before")
        link = tmp_path / name
        link.symlink_to(target)
        write_text(link, "after")
        assert link.is_symlink()
        assert target.read_text() == "after"
    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / "data" / "folder")
    with new_folder(folder) as temporary:
        (temporary / "a").write_text("a")
    assert folder.is_symlink()
    assert (tmp_path / "data" / "folder" / "a").read_text() == "a"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["folder", "new.txt", "old.txt"]


def test_special_files_are_refused_and_stay(tmp_path: Path) -> None:
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    for path, what in ((fifo, "a special file"), (loop, "a loop of links"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"{path}: {what}; allowed: a file"):
            write_text(path, "text")
    assert fifo.is_fifo()
    assert loop.is_symlink()
    with pytest.raises(InputError, match="/dev/null: a special file"):
        write_text(Path("/dev/null"), "text")


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("a" * 255, "é" * 127):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import os, sys, time
from pathlib import Path
from clipdistill.io.files import new_file, new_folder
with new_folder(Path(sys.argv[1]) / "folder") as folder, new_file(Path(sys.argv[1]) / "file") as file:
    (folder / "part").write_text("part")
    file.write_text("part")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_deleted_by_the_next_writer(tmp_path: Path) -> None:
    def write(folder: Path) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        return process

    other = tmp_path / ".notes.txt.tmp"
    other.write_text("not ours")
    killed, writing = write(tmp_path), write(tmp_path)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        left = {path.name for path in tmp_path.iterdir()}
        assert len(left) == 5
        write_text(tmp_path / "other", "text")
        remaining = {path.name for path in tmp_path.iterdir()}
        assert {name for name in remaining if f"-{killed.pid}-" in name} == set()
        assert len({name for name in remaining if f"-{writing.pid}-" in name}) == 2
        assert other.exists()
    finally:
        writing.kill()
        writing.wait()


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("old")

    def fail() -> None:
        with new_file(path) as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
