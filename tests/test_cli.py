"""The command line: each bad input gives one line and exit code 2, and leaves nothing behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipdistill.cli import main
from tests.conftest import TINY_MODEL, colour_samples, write_tar

DUPLICATE = "red\nblue\nred\n"
EMPTY_LINE = "red\n\nblue\n"
NO_PLACE = "a picture\n"
TWO_CLASSES = "red\nblue\n"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def clipdistill(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command line in this process, which has torch loaded already."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def assert_refused(result: Result, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("clipdistill:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]


def prompts(folder: Path, classnames: str, templates: str = "a {c}\n") -> Path:
    folder.mkdir()
    (folder / "classnames.txt").write_text(classnames)
    (folder / "templates.txt").write_text(templates)
    return folder


def bad_shard_labels(root: Path) -> list[str]:
    write_tar(root / "labels" / "0.tar", [{**sample, "cls": 9} for sample in colour_samples(16)])
    return [f"data.shards=[{root / 'labels'}]", "labels=dataset"]


def other_architecture(root: Path) -> list[str]:
    (root / "deep.json").write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 3}}))
    return [f"student.model={root / 'deep.json'}"]


BAD_TRAINING: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "unknown key": (
        lambda _: ["optimizer.weightdecay=1"],
        ("optimizer.weightdecay", "nearest valid key: weight_decay"),
    ),
    "missing shard": (lambda root: [f"data.shards=[{root}/none/0.tar]"], ("none/0.tar",)),
    "empty pattern": (lambda root: [f"data.shards=['{root}/none-*.tar']"], ("none-*.tar",)),
    "duplicate class": (lambda root: [f"prompts={prompts(root / 'p', DUPLICATE)}"], ("red", "classnames.txt")),
    "empty class": (lambda root: [f"prompts={prompts(root / 'p', EMPTY_LINE)}"], ("classnames.txt:2", "empty line")),
    "template without {c}": (
        lambda root: [f"prompts={prompts(root / 'p', TWO_CLASSES, NO_PLACE)}"],
        ("templates.txt", "{c}"),
    ),
    "label outside": (bad_shard_labels, ("9", "0 to 3")),
    "labels of no classes": (lambda _: ["labels=teacher", "prompts=''", "objective=[{loss: feature}]"], ("prompts",)),
    "tracker": (lambda _: ["train.trackers=[paper]"], ("train.trackers", "paper")),
    "endless": (lambda _: ["train.steps=null", "train.epochs=.inf"], ("train.epochs", "inf")),
    "too few samples": (lambda _: ["data.batch_size=51"], ("51", "50")),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_training_input(
    clipdistill: Callable[..., Result], write_config: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    make, words = BAD_TRAINING[name]
    config = write_config()
    result = clipdistill("train", "--config", config, *make(tmp_path))
    assert_refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_architecture(
    clipdistill: Callable[..., Result], write_config: Callable[..., Path], tmp_path: Path, teacher_folder: Path
) -> None:
    overrides = other_architecture(tmp_path)
    weights = f"student.pretrained={teacher_folder / 'open_clip_model.safetensors'}"
    result = clipdistill("train", "--config", write_config(), *overrides, weights)
    assert_refused(result, "deep.json", "weights do not match the architecture")
    assert not (tmp_path / "run").exists()


def test_output_of_another_run(
    clipdistill: Callable[..., Result], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(train={"steps": 2, "trackers": []}, evaluation={})
    done = clipdistill("train", "--config", config)
    assert done.returncode == 0, done.stderr
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    assert_refused(clipdistill("train", "--config", config), "output", "holds another run")
    other = clipdistill("train", "--config", config, "--resume", "auto", "optimizer.lr=0.5")
    assert_refused(other, "optimizer.lr: 0.5", "has 0.003")
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")) == before


def test_evaluate_writes_clip_benchmarks_json(
    clipdistill: Callable[..., Result], colours: Path, teacher_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    result = clipdistill(
        "evaluate",
        "--model",
        teacher_folder,
        "--data",
        colours / "set",
        "--teacher",
        teacher_folder,
        "--output",
        output,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(output.read_text())
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert record["metrics"]["acc5"] is None
    assert record["metrics"]["teacher_agreement"] == 1.0
    assert record["metrics"]["teacher_kl"] == pytest.approx(0.0, abs=1e-12)


def _set(root: Path, samples: list[dict[str, Any]], classnames: str = "red\ngreen\nblue\ngrey\n") -> Path:
    write_tar(root / "bad" / "test" / "0.tar", samples)
    (root / "bad" / "test" / "nshards.txt").write_text("1")
    (root / "bad" / "classnames.txt").write_text(classnames)
    (root / "bad" / "zeroshot_classification_templates.txt").write_text("{c}\n")
    return root / "bad"


def _truncated_set(root: Path) -> Path:
    folder = _set(root, colour_samples(4))
    shard = folder / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    return folder


BAD_SETS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "no folder": (lambda root: root / "none", ("none", "no such folder")),
    "no shards": (lambda root: root, ("test/nshards.txt",)),
    "label": (lambda root: _set(root, [{**colour_samples(1)[0], "cls": 7}]), ("label 7", "0 to 3", "s00000")),
    "image": (lambda root: _set(root, [{**colour_samples(1)[0], "png": b"no picture"}]), ("unreadable", "s00000")),
    "classes": (lambda root: _set(root, colour_samples(4), "red\nred\nblue\ngrey\n"), ("red", "classnames.txt")),
    "empty": (lambda root: _set(root, []), ("no sample",)),
    "truncated": (_truncated_set, ("0.tar",)),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_bad_evaluation_set(
    clipdistill: Callable[..., Result], teacher_folder: Path, tmp_path: Path, name: str
) -> None:
    make, words = BAD_SETS[name]
    output = tmp_path / "result.json"
    result = clipdistill("evaluate", "--model", teacher_folder, "--data", make(tmp_path), "--output", output)
    assert_refused(result, *words)
    assert not output.exists()


@pytest.mark.slow
def test_export_reloads_and_refuses_an_existing_folder(
    clipdistill: Callable[..., Result], teacher_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "export"
    result = clipdistill("export", "--checkpoint", teacher_folder, "--output", target, "--half")
    assert result.returncode == 0, result.stderr
    size = {f: (f / "open_clip_model.safetensors").stat().st_size for f in (target, teacher_folder)}
    assert size[target] < 0.6 * size[teacher_folder]
    assert_refused(clipdistill("export", "--checkpoint", teacher_folder, "--output", target), "exists")


def test_bad_input_in_a_real_process(tmp_path: Path) -> None:
    """No traceback, no warning of a library, code 2: what a shell script sees."""
    command = [sys.executable, "-m", "clipdistill", "train", "--config", str(tmp_path / "none.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [f"clipdistill: config {tmp_path / 'none.yaml'}: no such file"]
