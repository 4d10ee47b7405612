"""Paths as users write them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import clipdistill
from clipdistill.errors import InputError
from clipdistill.io.paths import expand

STRANGER = 54_321
"""A user id without an entry in the passwd file."""


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/a") == tmp_path / "a"
    assert expand("a/~") == Path("a/~")
    with pytest.raises(InputError, match="~nobody-here/a: no such user; allowed: a path without ~nobody-here"):
        expand("~nobody-here/a")


def others_can_read(path: Path) -> bool:
    return all(each.stat().st_mode & 0o005 for each in (path, *path.parents))


SCRIPT = """
import os, sys
from clipdistill.cli import main
command = ["train", "--config", sys.argv[1]]
assert main([*command, "output=known"]) == 0, "and everything is imported, which may not be readable later"
del os.environ["HOME"]
os.setgid(54321)
os.setuid(54321)
sys.exit(main([*command, "output=unknown"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.getuid() != 0 or not others_can_read(Path(clipdistill.__file__)) or not others_can_read(Path(torch.__file__)),
    reason="needs another user's id, for whom the packages are readable",
)
def test_a_user_without_home_and_name_trains(
    write_config: Callable[..., Path], colours: Path, teacher_folder: Path, tiny_model: Path
) -> None:
    """As in a container with a user id of its own."""
    root = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        for name, source in (("data", colours), ("teacher", teacher_folder)):
            shutil.copytree(source, root / name)
        shutil.copy(tiny_model, root / "tiny.json")
        config = json.loads(write_config().read_text())
        config["data"]["shards"] = [str(root / "data" / "train")]
        del config["data"]["cache"]
        config["prompts"] = str(root / "data" / "prompts")
        config["evaluation"]["folders"] = [str(root / "data" / "set")]
        config["teachers"][0]["model"] = f"local-dir:{root}/teacher"
        config["student"]["model"] = str(root / "tiny.json")
        (root / "config.yaml").write_text(json.dumps(config))
        for path in (root, *root.rglob("*")):
            os.chown(path, STRANGER, STRANGER)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, root / "config.yaml"],
            capture_output=True,
            text=True,
            check=False,
            cwd=root,
            env=os.environ | {"HOME": str(root / "home"), "TMPDIR": str(root)},
        )
        assert done.returncode == 0, done.stderr
        cache = root / f"clipdistill-{STRANGER}"
        assert cache.stat().st_mode & 0o777 == 0o700
        assert list(cache.glob(".cache/clipdistill/shards/*.json"))
        assert not (root / "~").exists()
    finally:
        shutil.rmtree(root)
