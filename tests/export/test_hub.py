"""The push, with the real client against a real server: one commit or none, whatever happens on the way."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from clipdistill.errors import InputError
from clipdistill.export.command import add_arguments, run
from clipdistill.export.hub import PushError, check_token, push
from clipdistill.export.parity import smooth_pictures
from clipdistill.io.retries import Retries
from tests.hub_server import TOKEN, Fault, Hub, Repo, serve

QUICK = Retries(attempts=4, first_wait=0.01, longest_wait=0.05, seconds=60)
NAME = "someone/small-clip"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server, and a client that finds it: the constants are what HF_ENDPOINT and others set at import."""
    constants = huggingface_hub.constants
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the kinds that an export has."""
    root = tmp_path / "export"
    (root / ".eval_results").mkdir(parents=True)
    (root / "README.md").write_text("---\nlicense: mit\n---\n# small\n")
    (root / ".eval_results" / "set.yaml").write_text("- value: 0.5\n")
    (root / "open_clip_model.safetensors").write_bytes(os.urandom(300_000))
    (root / "image.onnx").write_bytes(os.urandom(100_000))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_pushed_once(hub: Hub, folder: Path) -> None:
    repo = hub.repos[NAME]
    assert len(repo.commits) == 2  # the Hub's own first commit, and ours
    assert {name: data for name, data in repo.files.items() if name != ".gitattributes"} == content(folder)


@pytest.mark.parametrize("private", [False, True])
def test_push_creates_the_repo_and_makes_one_commit(hub: Hub, folder: Path, private: bool) -> None:
    url = push(folder, NAME, private=private, retries=QUICK)
    assert_pushed_once(hub, folder)
    assert hub.repos[NAME].private == private
    assert url == f"{hub.url}/{NAME}/commit/{hub.repos[NAME].sha}"


FAULTS = {
    "creation cut": Fault("POST", "/repos/create", "cut"),
    "creation cut after": Fault("POST", "/repos/create", "cut after"),
    "card 503": Fault("POST", "/validate-yaml", "503"),
    "listing 503": Fault("GET", "/tree/", "503"),
    "preupload 503": Fault("POST", "/preupload/", "503"),
    "batch cut": Fault("POST", "/lfs/objects/batch", "cut"),
    "upload cut": Fault("PUT", "/objects/", "cut"),
    "upload 503": Fault("PUT", "/objects/", "503"),
    "upload cut after": Fault("PUT", "/objects/", "cut after"),
    "commit cut": Fault("POST", "/commit/", "cut", times=2),
    "commit 503": Fault("POST", "/commit/", "503", times=2),
    "commit cut after": Fault("POST", "/commit/", "cut after"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_push_survives_a_fault_with_one_whole_commit(hub: Hub, folder: Path, name: str) -> None:
    fault = FAULTS[name]
    hub.faults.append(Fault(fault.method, fault.path, fault.kind, fault.times))
    assert push(folder, NAME, retries=QUICK).startswith(hub.url)
    assert hub.faults[0].times == 0
    assert_pushed_once(hub, folder)


def test_push_that_never_comes_through_leaves_the_repo_as_it_was(hub: Hub, folder: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/", "503", times=99))
    with pytest.raises(
        PushError, match=r"not pushed after 4 attempts: HTTP 503.*`hf upload someone/small-clip"
    ) as caught:
        push(folder, NAME, retries=QUICK)
    assert "\n" not in str(caught.value)
    assert list(hub.repos[NAME].files) == [".gitattributes"]
    assert 99 - hub.faults[0].times == 4
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert len(uploads) == 2  # what has arrived is not sent again


def test_second_export_replaces_the_first_and_keeps_what_is_not_an_exports(hub: Hub, folder: Path) -> None:
    push(folder, NAME, retries=QUICK)
    hub.repos[NAME].files["notes.md"] = b"by hand"
    (folder / "image.onnx").unlink()
    (folder / "model.safetensors").write_bytes(b"new")
    push(folder, NAME, retries=QUICK)
    assert len(hub.repos[NAME].commits) == 3
    assert set(hub.repos[NAME].files) == {*content(folder), ".gitattributes", "notes.md"}


def test_pushing_the_same_again_makes_no_commit(hub: Hub, folder: Path) -> None:
    push(folder, NAME, retries=QUICK)
    push(folder, NAME, retries=QUICK)
    assert_pushed_once(hub, folder)


def test_private_export_does_not_go_to_a_public_repo(hub: Hub, folder: Path) -> None:
    hub.repos[NAME] = Repo(private=False)
    with pytest.raises(InputError, match="--private: someone/small-clip exists and is public"):
        push(folder, NAME, private=True, retries=QUICK)
    assert not hub.objects


def test_no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        InputError, match="no token; allowed: a token with write access, in HF_TOKEN or from `hf auth login`"
    ):
        check_token(NAME)
    assert hub.requests == []


def test_unknown_token(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for attempt in (lambda: check_token(NAME), lambda: push(folder, NAME, retries=QUICK)):
        with pytest.raises(InputError, match="the Hub does not know the token; allowed: ") as caught:
            attempt()
        assert "hf_wrong" not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert hub.repos == {}


def test_unknown_token_is_found_before_anything_is_written(
    hub: Hub, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--checkpoint", str(teacher_folder), "--output", str(tmp_path / "out"), "--push-to-hub", NAME]
    with pytest.raises(InputError, match=f"^--push-to-hub {NAME}: the Hub does not know the token"):
        run(parser.parse_args(arguments))
    assert hub.requests == ["GET /api/whoami-v2"]
    assert not (tmp_path / "out").exists()


def test_token_that_may_not_write(hub: Hub, folder: Path) -> None:
    hub.may_write = False
    with pytest.raises(InputError, match="the Hub does not let this token write there"):
        push(folder, NAME, retries=QUICK)


def test_card_that_the_hub_refuses(hub: Hub, folder: Path) -> None:
    hub.bad_card = '"license" must be one of [mit, apache-2.0, ...]'
    with pytest.raises(InputError, match=r'the Hub refuses the card: .*"license" must be one of') as caught:
        push(folder, NAME, retries=QUICK)
    assert "\n" not in str(caught.value)
    assert len(hub.repos[NAME].commits) == 1


COMMAND = """
import argparse, logging, sys
from clipdistill.errors import InputError, RunError
from clipdistill.export.command import add_arguments, run
logging.basicConfig(level=logging.DEBUG)
parser = argparse.ArgumentParser()
add_arguments(parser)
try:
    run(parser.parse_args())
except (InputError, RunError) as error:
    print(f"clipdistill: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def in_a_process(program: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", program, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=cwd,
        env=inherited | {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "home")} | environment,
    )


@pytest.mark.slow
def test_export_push_and_load_from_the_hub(teacher_folder: Path, tmp_path: Path) -> None:
    """The whole way in processes of their own: the card's first example loads what was pushed."""
    with serve() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        arguments = ("--checkpoint", teacher_folder, "--output", "out", "--formats", "open_clip", "--images", 4)
        done = in_a_process(COMMAND, *arguments, "--push-to-hub", NAME, cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.url}/{NAME}/commit/" in done.stdout
        assert TOKEN not in done.stdout + done.stderr
        assert_pushed_once(hub, tmp_path / "out")

        card = hub.repos[NAME].files["README.md"].decode()
        (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert f'name = "hf-hub:{NAME}"' in snippet
        smooth_pictures(1, height=20, width=20)[0].save(tmp_path / "picture.png")
        loaded = in_a_process(snippet, cwd=tmp_path, **environment)
        assert loaded.stdout.splitlines()[-1:] in (["a cat"], ["a dog"], ["a car"]), loaded.stderr
