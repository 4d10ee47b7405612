"""Wrong inputs of every kind, for every command: one line, exit code 2, and nothing is written."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipdistill.cli import main
from clipdistill.config import load_config, to_dict

SECONDS = 10
"""Longest time until an input is refused."""

PATHS: dict[str, Callable[[Path], str]] = {
    "missing": lambda root: str(root / "missing"),
    "a folder": lambda root: str(root / "folder"),
    "a pipe": lambda root: str(root / "pipe"),
    "a device": lambda _: "/dev/zero",
    "under a file": lambda root: str(root / "file" / "below"),
    "a loop of links": lambda root: str(root / "loop"),
    "a name too long": lambda root: str(root / ("x" * 300)),
    "a path too long": lambda root: str(root) + "/x" * 3000,
    "with NUL": lambda root: f"{root}/a\0b",
    "empty": lambda _: "",
    "not UTF-8": lambda root: str(root / "latin1"),
    "binary": lambda root: str(root / "binary"),
    "an empty file": lambda root: str(root / "empty"),
    "no such user": lambda _: "~nobody-here/a",
}
NUMBERS = ("inf", "nan", "1e300", "-1", "²", "9" * 5000, "x", "", "1,5", "0x", "[1]", "{}")

Row = tuple[str, Callable[[Path], list[str]]]


def reading() -> list[Row]:
    """Every argument that names something to read, with every wrong path."""
    commands: dict[str, Callable[[str], list[str]]] = {
        "train --config": lambda path: ["train", "--config", path],
        "train --resume": lambda path: ["train", "--config", "CONFIG", "--resume", path],
        "train prompts": lambda path: ["train", "--config", "CONFIG", f"prompts={path or '{}'}"],
        "train shards": lambda path: ["train", "--config", "CONFIG", f"data.shards=[{json.dumps(path)}]"],
        "train teacher": lambda path: ["train", "--config", "CONFIG", f"teachers.0.model={json.dumps(path)}"],
        "train student": lambda path: ["train", "--config", "CONFIG", f"student.model={json.dumps(path)}"],
        "estimate --config": lambda path: ["estimate", "--config", path],
        "cache --config": lambda path: ["cache", "--config", path],
        "report": lambda path: ["report", path],
        "evaluate --model": lambda path: ["evaluate", "--model", path, "--data", "SET"],
        "cache-clean --abandoned": lambda path: ["cache-clean", "--cache", "CACHE", "--abandoned", path],
        "evaluate --data": lambda path: ["evaluate", "--model", "TEACHER", "--data", path],
        "evaluate --prompts": lambda path: [
            "evaluate",
            "--model",
            "TEACHER",
            "--data",
            "SET",
            "--prompts",
            path or "{}",
        ],
        "evaluate --class-counts": lambda path: [
            "evaluate",
            "--model",
            "TEACHER",
            "--data",
            "SET",
            "--class-counts",
            path,
        ],
        "export --checkpoint": lambda path: ["export", "--checkpoint", path, "--output", "OUT"],
        "export --prompts": lambda path: [
            "export",
            "--checkpoint",
            "TEACHER",
            "--output",
            "OUT",
            "--prompts",
            path or "{}",
        ],
        "shards folder": lambda path: ["shards", "folder", path, "--output", "OUT"],
        "shards csv": lambda path: ["shards", "csv", path, "--output", "OUT"],
    }
    return [
        (f"{name}: {kind}", lambda root, make=make, path=path: make(path(root)))
        for name, make in commands.items()
        for kind, path in PATHS.items()
    ]


def writing() -> list[Row]:
    """Every argument that names something to write, with every path where that is impossible."""
    commands: dict[str, Callable[[str], list[str]]] = {
        "train output": lambda path: ["train", "--config", "CONFIG", f"output={json.dumps(path)}"],
        "evaluate --output": lambda path: ["evaluate", "--model", "TEACHER", "--data", "SET", "--output", path],
        "export --output": lambda path: ["export", "--checkpoint", "TEACHER", "--output", path],
        "report --output": lambda path: ["report", "RUN", "--output", path],
        "shards icons --output": lambda path: ["shards", "icons", "--output", path],
        "shards folder --output": lambda path: ["shards", "folder", "IMAGES", "--output", path],
        "quickstart --output": lambda path: ["quickstart", "--output", path],
    }
    kinds = ("a pipe", "a device", "under a file", "a loop of links", "a name too long", "with NUL", "empty")
    return [
        (f"{name}: {kind}", lambda root, make=make, kind=kind: make(PATHS[kind](root)))
        for name, make in commands.items()
        for kind in kinds
    ]


def numbers() -> list[Row]:
    """Every number, with every text that is none, or none that is allowed."""
    evaluate = ["evaluate", "--model", "TEACHER", "--data", "SET"]
    export = ["export", "--checkpoint", "TEACHER", "--output", "OUT"]
    arguments = {
        "--batch-size": evaluate,
        "--workers": evaluate,
        "--max-pixels": evaluate,
        "--step": evaluate,
        "--images": export,
        "--parity-bound": export,
        "--examples": ["report", "RUN"],
        "--profile": ["train", "--config", "CONFIG"],
        "--size": ["shards", "icons", "--output", "OUT"],
        "--imbalance": ["shards", "icons", "--output", "OUT"],
        "--samples-per-shard": ["shards", "folder", "IMAGES", "--output", "OUT"],
        "--unused-days": ["cache-clean", "--cache", "CACHE"],
        "--max-gb": ["cache-clean", "--cache", "CACHE"],
    }
    fields = [
        "seed",
        "objective.0.temperature",
        "objective.0.weight",
        "objective.0.gamma",
        "optimizer.lr",
        "optimizer.warmup_steps",
        "optimizer.eps",
        "optimizer.weight_decay",
        "data.batch_size",
        "data.workers",
        "data.image_size",
        "data.max_pixels",
        "data.views",
        "data.max_bad_share",
        "train.steps",
        "train.threads",
        "train.rank_timeout",
        "train.save_every",
        "teachers.0.weight",
        "teachers.0.logit_scale",
        "student.logit_scale",
        "templates_per_step",
        "evaluation.batch_size",
        "data.worker_timeout",
    ]
    rows: list[Row] = []
    for name, command in arguments.items():
        finite = ("--parity-bound", "--unused-days", "--max-gb")
        wrong = [number for number in NUMBERS if name not in finite or number != "1e300"]
        rows += [(f"{name} {n[:9]!r}", lambda _, c=command, a=name, n=n: [*c, f"{a}={n}"]) for n in wrong]
    for name in fields:
        for number in ("inf", ".inf", ".nan", "-1", "²", "x", "[1]", "9" * 5000):
            rows.append(
                (f"{name}={number[:9]}", lambda _, f=name, n=number: ["train", "--config", "CONFIG", f"{f}={n}"])
            )
    return rows


def others() -> list[Row]:
    """Files with the wrong content, and combinations."""
    contents = {"cut": b'{"a": [1,', "a list": b"[1, 2]", "a number": b"7", "not UTF-8": b"\xff\xfe{}", "empty": b""}

    def damaged(root: Path, name: str, content: bytes, command: list[str]) -> list[str]:
        run = root / "damaged"
        shutil.copytree(root / "run", run)
        (run / name).write_bytes(content)
        return [argument.replace("DAMAGED", str(run)) for argument in command]

    rows: list[Row] = [
        (f"report: config.yaml {kind}", lambda root, c=content: damaged(root, "config.yaml", c, ["report", "DAMAGED"]))
        for kind, content in contents.items()
    ]
    plain: dict[str, list[str]] = {
        "a cache that is a file": ["cache-clean", "--cache", "SHARD"],
        "all and some": ["cache-clean", "--all", "--unused-days", "3"],
        "20 million shards": ["train", "--config", "CONFIG", "data.shards=['x{0..20000000}.tar']"],
        "a shard twice by a link": ["train", "--config", "CONFIG", "data.shards=['SHARD', 'LINK']"],
        "unbalanced braces": ["train", "--config", "CONFIG", "data.shards=['{0..']"],
        "no command": [],
        "an unknown command": ["trian"],
        "an unknown argument": ["train", "--config", "CONFIG", "--fast"],
        "no config": ["train"],
        "an unknown key": ["train", "--config", "CONFIG", "optimiser.lr=1"],
        "no equals sign": ["train", "--config", "CONFIG", "seed"],
        "an unknown type of set": ["evaluate", "--model", "TEACHER", "--data", "UNKNOWN"],
        "an unknown task": ["evaluate", "--model", "TEACHER", "--data", "SET", "--task", "guess"],
        "resume and restart": ["train", "--config", "CONFIG", "--resume", "auto", "--restart"],
        "two lines": ["train", "--config", "CONFIG", "labels='a\nb'"],
        "an escape sequence": ["train", "--config", "CONFIG\x1b[31m"],
    }
    return rows + [(name, lambda _, c=command: c) for name, command in plain.items()]


ROWS = dict(reading() + writing() + numbers() + others())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, colours: Path, tiny_model: Path, teacher_folder: Path) -> Path:
    """A folder of things to name."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "folder").mkdir()
    (root / "file").write_text("text")
    (root / "empty").touch()
    (root / "latin1").write_bytes("größe".encode("latin-1"))
    (root / "binary").write_bytes(bytes(range(256)) * 20)
    (root / "loop").symlink_to(root / "loop")
    os.mkfifo(root / "pipe")
    shutil.copy(colours / "train" / "0.tar", root / "0.tar")
    (root / "link.tar").symlink_to(root / "0.tar")
    shutil.copytree(colours / "set", root / "unknown")
    (root / "unknown" / "dataset_type.txt").write_text("sound")
    (root / "images" / "cat").mkdir(parents=True)
    (root / "images" / "cat" / "1.png").write_bytes((Path(__file__).parent / "none").name.encode())
    config: dict[str, Any] = {
        "output": str(root / "out"),
        "teachers": [{"model": f"local-dir:{teacher_folder}"}],
        "student": {"model": str(tiny_model)},
        "data": {"shards": [str(root / "0.tar")], "batch_size": 4, "workers": 0, "cache": str(root / "cache")},
        "prompts": str(colours / "prompts"),
        "objective": [{"loss": "gkl"}],
        "train": {"steps": 1, "trackers": []},
    }
    (root / "config.yaml").write_text(json.dumps(config))
    assert main(["train", "--config", str(root / "config.yaml"), f"output={root}/run"]) == 0
    return root


def too_long(*_: object) -> None:
    pytest.fail(f"not refused within {SECONDS} seconds")


def contents(root: Path) -> dict[str, bytes | None]:
    """All files below a folder, except the cache's."""
    found: dict[str, bytes | None] = {}
    for path in root.rglob("*"):
        if root / "cache" not in (path, *path.parents):
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_input_is_one_line(
    name: str, root: Path, colours: Path, teacher_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {
        "CONFIG": root / "config.yaml",
        "TEACHER": f"local-dir:{teacher_folder}",
        "SET": colours / "set",
        "RUN": root / "run",
        "OUT": root / "out",
        "IMAGES": root / "images",
        "UNKNOWN": root / "unknown",
        "SHARD": root / "0.tar",
        "LINK": root / "link.tar",
        "CACHE": root / "cache",
    }
    command = ROWS[name](root)
    for short, full in names.items():
        command = [argument.replace(short, str(full)) for argument in command]
    before = contents(root)
    capfd.readouterr()
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        code: Any = main(command)
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
    told = capfd.readouterr()
    after = contents(root)
    shutil.rmtree(root / "damaged", ignore_errors=True)
    assert code == 2, told.err
    assert len(told.err.splitlines()) == 1, told.err
    assert len(told.err) < 3000
    assert after == before


def test_there_are_many_kinds() -> None:
    assert len(ROWS) >= 300


def _keys(value: Any, key: str = "") -> list[str]:
    """Dotted keys of all settings of a config, and of its parts."""
    if not isinstance(value, dict | list):
        return [key]
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        *([key] if key else []),
        *(each for name, part in parts for each in _keys(part, f"{key}.{name}".strip("."))),
    ]


NUMBERS_DRAWN = st.one_of(st.floats(), st.integers(), st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS_DRAWN, st.text(max_size=20), st.binary(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
)
SETTINGS = settings(deadline=10_000, max_examples=150, suppress_health_check=list(HealthCheck))


def end_of(command: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit code of a command, and what it wrote to standard error."""
    capfd.readouterr()
    try:
        code: Any = main(command)
    except SystemExit as stop:
        code = stop.code
    return code, capfd.readouterr().err


@SETTINGS
@given(data=st.data())
def test_any_value_of_any_setting_ends_in_one_line(
    data: st.DataObject, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beside a setting that is certainly wrong, so that no drawn value can start a run."""
    keys = _keys(to_dict(load_config(root / "config.yaml")))
    key = data.draw(st.one_of(st.sampled_from(keys), st.text(max_size=10)))
    value = data.draw(VALUES)
    text = data.draw(st.sampled_from([repr(value), str(value), yaml.safe_dump(value).strip()]))
    before = contents(root)
    command = ["train", "--config", str(root / "config.yaml"), f"{key}={text}", f"evaluation.folders=[{root}/missing]"]
    code, error = end_of(command, capfd)
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    assert contents(root) == before


@pytest.mark.slow
@settings(SETTINGS, max_examples=60)
@given(
    name=st.sampled_from(["config.yaml", "metrics.jsonl", "summary.json", "identity.json"]),
    content=st.one_of(st.binary(max_size=40), VALUES.map(lambda value: repr(value).encode(errors="replace"))),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_any_content_of_a_runs_files_ends_in_one_line(
    name: str, content: bytes, cut: float | None, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Drawn bytes, or what was there up to some byte: a command does its work in spite of them, or refuses them."""
    run = root / "drawn"
    for command in (
        ["report", str(run), "--no-teacher", "--examples", "0"],
        ["evaluate", "--model", str(run), "--data", str(root / "missing")],
        ["train", "--config", str(root / "config.yaml"), f"output={run}", "--resume", "auto"],
    ):
        shutil.copytree(root / "run", run)
        try:
            whole = (run / name).read_bytes()
            (run / name).write_bytes(content if cut is None else whole[: int(cut * len(whole))])
            before = contents(run)
            code, error = end_of(command, capfd)
            assert code in (0, 2), error
            assert "Traceback" not in error
            if code == 2:
                assert len([line for line in error.splitlines() if line.startswith("clipdistill: ")]) == 1, error
                assert contents(run) == before
        finally:
            shutil.rmtree(run)
