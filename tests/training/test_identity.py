"""A run resumes with what it was made of, wherever that is, and with nothing else."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.config import Config, load_config
from clipdistill.errors import InputError
from clipdistill.training.trainer import train
from scripts.jobs import Job
from tests.conftest import colour_samples, write_tar
from tests.processes import assert_identical
from tests.servers import Tagged, files, serving

CONFIG: dict[str, Any] = {
    "data": {"batch_size": 8, "workers": 0, "shuffle": 16},
    "labels": "dataset",
    "objective": [{"loss": "gkl", "gamma": 0.5}, {"loss": "gkl", "over": "captions", "gamma": 0.3}],
    "optimizer": {"lr": 0.003},
    "train": {"steps": 4, "log_every": 1, "save_every": 2, "keep": 9, "trace": True, "trackers": []},
}


def config_of(root: Path, *overrides: str, run: str = "run") -> Config:
    """The config of a run all of whose inputs are below a folder."""
    (root / "config.json").write_text(json.dumps(CONFIG))
    places = {
        "output": str(root / run),
        "teachers": [{"model": f"local-dir:{root / 'teacher'}"}],
        "student.model": str(root / "student.json"),
        "data.shards": [str(root / "train")],
        "data.cache": str(root / "cache"),
        "prompts": str(root / "prompts"),
    }
    return load_config(root / "config.json", overrides, values=places)


@pytest.fixture(scope="module")
def finished(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and a finished run of 4 steps, with checkpoints after 2 and 4."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(colours / "prompts", root / "prompts")
    shutil.copytree(teacher_folder, root / "teacher")
    shutil.copy(tiny_model, root / "student.json")
    for number in range(3):
        write_tar(root / "train" / f"{number}.tar", colour_samples(16, first=16 * number))
    train(config_of(root))
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy of these, elsewhere."""
    return Path(shutil.copytree(finished, tmp_path / "root"))


def interrupt(root: Path) -> None:
    """Leave what a run killed after its second step leaves."""
    for path in (root / "run" / "student", root / "run" / "checkpoints" / "step_00000004"):
        shutil.rmtree(path)
    (root / "run" / "summary.json").unlink()


def edit(file: Path, change: Callable[[str], str]) -> None:
    before = file.read_text()
    file.write_text(change(before))
    assert file.read_text() != before


def edit_weights(root: Path, tensor: str) -> None:
    file = root / "teacher" / "open_clip_model.safetensors"
    state = load_file(file)
    state[tensor] = state[tensor] + 0.01
    save_file(state, file)


def swap_pictures(root: Path) -> None:
    """Two pictures of equal size, in a shard of equal headers."""
    file = root / "train" / "1.tar"
    content = bytearray(file.read_bytes())
    first, second = (content.index(b"IDAT", content.index(name)) + 8 for name in (b"s00020.png", b"s00025.png"))
    content[first : first + 60], content[second : second + 60] = (
        content[second : second + 60],
        content[first : first + 60],
    )
    file.write_bytes(content)


def relabel(root: Path) -> None:
    file = root / "train" / "1.tar"
    content = bytearray(file.read_bytes())
    at = content.index(b"s00021.cls") + 512
    assert content[at : at + 1] == b"1"
    content[at : at + 1] = b"3"
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half the classes": (
        lambda root: edit(root / "prompts" / "classnames.txt", lambda text: "\n".join(text.split()[:3]) + "\n"),
        r"^prompts\.classnames: 3 entries, but the run in .*/run has 4 entries, number 3 is 'grey'; allowed: ",
    ),
    "reversed classes": (
        lambda root: edit(root / "prompts" / "classnames.txt", lambda text: "\n".join(text.split()[::-1]) + "\n"),
        r"^prompts\.classnames\.0: 'grey', but the run in .*/run has 'red'; allowed: the same, another output, or --r",
    ),
    "reversed templates": (
        lambda root: (root / "prompts" / "templates.txt").write_text("{c}\na {c} picture\n"),
        r"^prompts\.templates\.0: '\{c\}', but the run",
    ),
    "image weights": (
        lambda root: edit_weights(root, "visual.proj"),
        r"^teachers\.0\.image_weights: digest [0-9a-f]{12}, but the run in .* has digest [0-9a-f]{12};",
    ),
    "text weights": (lambda root: edit_weights(root, "text_projection"), r"^teachers\.0\.text_weights: digest"),
    "logit scale": (lambda root: edit_weights(root, "logit_scale"), r"^teachers\.0\.logit_scale: 20\.2"),
    "student": (
        lambda root: edit(root / "student.json", lambda text: text.replace('"head_width": 16', '"head_width": 8')),
        r"^student\.model_config\.vision_cfg\.head_width: 8, but the run in .* has 16;",
    ),
    "pictures": (swap_pictures, r"^data\.shards: not those of the saved run: '1\.tar' changed; allowed"),
    "label": (relabel, r"^data\.shards: not those of the saved run: '1\.tar' changed; allowed"),
    "caption": (
        lambda root: (root / "train" / "2.tar").write_bytes(
            (root / "train" / "2.tar").read_bytes().replace(b"a red picture", b"a rot picture")
        ),
        r"^data\.shards: not those of the saved run: '2\.tar' changed; allowed",
    ),
    "shard": (
        lambda root: write_tar(root / "train" / "0.tar", colour_samples(16, first=500)),
        r"^data\.shards: not those of the saved run: '0\.tar' changed; allowed",
    ),
    "fewer shards": (
        lambda root: (root / "train" / "2.tar").unlink(),
        r"^data\.shards: not those of the saved run: '2\.tar' is gone; allowed",
    ),
}


FAST = ("reversed classes", "image weights", "student", "pictures", "label")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHANGES]
)
def test_other_content_under_the_same_path_is_refused(root: Path, name: str) -> None:
    """While the run is under way, and when it has finished; what it has written stays."""
    change, message = CHANGES[name]
    change(root)
    for prepare in (lambda _: None, interrupt):
        prepare(root)
        before = {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=message) as caught:
            train(config_of(root), resume="auto")
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()} == before


def test_the_same_content_elsewhere_resumes(finished: Path, root: Path) -> None:
    """Everything was moved, and the folders renamed."""
    assert train(config_of(root), resume="auto").steps == 4
    interrupt(root)
    for old, new in {"teacher": "large", "prompts": "labels", "train": "data", "student.json": "small.json"}.items():
        (root / old).rename(root / new)
    edit(root / "run" / "config.yaml", lambda text: text.replace("train", "nowhere"))
    config = config_of(root, f"student.model={root}/small.json", f"prompts={root}/labels")
    moved = config.model_copy(
        update={
            "teachers": [config.teachers[0].model_copy(update={"model": f"local-dir:{root / 'large'}"})],
            "data": config.data.model_copy(update={"shards": [f"{root}/data/{{0..2}}.tar"]}),
        }
    )
    train(moved, resume="auto")
    assert_identical(root / "run", finished / "run")


@pytest.mark.slow
def test_another_signature_is_the_same_shard(root: Path) -> None:
    with serving(files(root / "train", Tagged)) as url:
        signed = [f"{url}/{{0..2}}.tar?signature={name}" for name in ("one", "two")]
        train(config_of(root, f"data.shards=['{signed[0]}']", run="web"))
        (root / "run").rename(root / "local")
        (root / "web").rename(root / "run")
        interrupt(root)
        train(config_of(root, f"data.shards=['{signed[1]}']"), resume="auto")
        assert_identical(root / "run", root / "local")


def test_a_checkpoint_knows_its_own_settings(root: Path, tmp_path: Path) -> None:
    """Copied out of its run, beside another config."""
    copy = shutil.copytree(root / "run" / "checkpoints" / "step_00000002", tmp_path / "elsewhere" / "step_00000002")
    shutil.rmtree(root / "run")
    with pytest.raises(InputError, match=r"^optimizer\.lr: 0\.01, but the run in .* has 0\.003; allowed: the same, an"):
        train(config_of(root, "optimizer.lr=0.01"), resume=str(copy))
    assert not (root / "run").exists()
    with pytest.raises(InputError, match=r"^objective\.1\.gamma: 0\.5, but the run in .* has 0\.3;"):
        train(config_of(root, "objective.1.gamma=0.5"), resume=str(copy))
    assert train(config_of(root), resume=str(copy)).steps == 4


def test_the_record_is_in_the_checkpoint(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = root / "run" / "checkpoints" / "step_00000002"
    record = json.loads((checkpoint / "identity.json").read_text())
    assert record["prompts"]["classnames"] == ["red", "green", "blue", "grey"]
    assert [name for name, _ in record["shards"]] == ["0.tar", "1.tar", "2.tar"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "identity.json" in json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert str(root.parent) not in json.dumps(record)


def test_other_versions_are_only_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupt(root)
    (root / "run" / "checkpoints" / "step_00000002").rename(root / "aside")
    edit(root / "run" / "identity.json", lambda text: text.replace('"torch": "', '"torch": "1.'))
    (root / "run" / "metrics.jsonl").write_text("")
    with caplog.at_level(logging.WARNING):
        train(config_of(root), resume="auto")
    assert "the run was made with torch 1." in caplog.text


def test_a_finished_run_without_its_student_is_not_finished(finished: Path, root: Path) -> None:
    weights = Path("run", "student", "open_clip_model.safetensors")
    for damage in (lambda: shutil.rmtree(root / "run" / "student"), lambda: (root / weights).write_bytes(b"cut")):
        damage()
        result = train(config_of(root), resume="auto")
        assert (result.student, result.steps) == (root / "run" / "student", 4)
        assert (root / weights).read_bytes() == (finished / weights).read_bytes()
    shutil.rmtree(root / "run" / "checkpoints")
    assert train(config_of(root), resume="auto").steps == 4
    (root / weights).unlink()
    with pytest.raises(
        InputError, match=r"^--resume auto: metrics\.jsonl in .* reaches step 4, but there is no checkp"
    ):
        train(config_of(root), resume="auto")


def left_in(folder: Path) -> dict[Path, tuple[int, ...]]:
    """The files of a folder, by their path in it."""
    status = {path.relative_to(folder): path.lstat() for path in folder.rglob("*")}
    return {path: (each.st_ino, each.st_size, each.st_mtime_ns) for path, each in status.items()}


def damage_all(root: Path) -> None:
    for path in (root / "run" / "checkpoints").iterdir():
        (path / "optimizer.pt").write_bytes(b"")


def rewrite_newest_as_newer(root: Path) -> None:
    """As a later version of this program might."""
    from hashlib import sha256

    path = root / "run" / "checkpoints" / "step_00000002" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format": 999}
    del manifest["sha256"]
    digest = sha256(json.dumps(manifest).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": digest}, indent=2) + "\n")


def hide_newest(root: Path) -> None:
    """A file that cannot be opened, whoever asks."""
    path = root / "run" / "checkpoints" / "step_00000002" / "optimizer.pt"
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            damage_all,
            r"^--resume auto: no checkpoint in .* is complete \(step_00000002: optimizer\.pt has 0 bytes, .*\)",
        ),
        (rewrite_newest_as_newer, r"^checkpoint .*step_00000002: format 999, this version reads \d; allowed: "),
        pytest.param(
            hide_newest,
            r"^checkpoint .*step_00000002: optimizer\.pt cannot be read: Too many levels of symbolic links; ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda root: shutil.rmtree(root / "run" / "checkpoints"),
            r"^--resume auto: metrics\.jsonl in .* reaches step 4",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_run_starts_over_unasked(root: Path, spoil: Callable[[Path], None], message: str) -> None:
    """And if asked, it keeps what was there."""
    interrupt(root)
    spoil(root)
    before = left_in(root / "run")
    with pytest.raises(InputError, match=message) as caught:
        train(config_of(root), resume="auto")
    assert "--restart" in str(caught.value)
    assert left_in(root / "run") == before
    result = train(config_of(root, "optimizer.lr=0.01"), restart=True)
    assert result.steps == 4
    assert left_in(root / "run" / "abandoned_001") == before
    assert train(config_of(root, "optimizer.lr=0.01"), resume="auto") == result


def test_restart_needs_a_run_and_no_checkpoint(root: Path) -> None:
    with pytest.raises(InputError, match=r"^--restart: given with --resume auto; allowed: one of the two"):
        train(config_of(root), resume="auto", restart=True)
    assert train(config_of(root, run="new"), restart=True).steps == 4
    (root / "other").mkdir()
    (root / "other" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"^output: .*/other holds other files"):
        train(config_of(root, run="other"), restart=True)
    assert [path.name for path in (root / "other").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_weights_to_start_from_are_part_of_a_run(root: Path) -> None:
    start = root / "start.safetensors"
    shutil.copy(root / "teacher" / "open_clip_model.safetensors", start)
    config = config_of(root, f"student.pretrained={start}", run="tuned")
    train(config)
    shutil.copy(root / "run" / "student" / "open_clip_model.safetensors", start)
    with pytest.raises(InputError, match=r"^student\.image_weights: digest"):
        train(config, resume="auto")


@pytest.mark.slow
def test_ranks_share_the_comparison(root: Path) -> None:
    """Two ranks refuse and accept as one does, whatever number of them began the run."""
    config_of(root)
    saved = ["--config", root / "run" / "config.yaml", "--resume", "auto", f"output={root / 'run'}"]
    places = [f"teachers.0.model=local-dir:{root / 'teacher'}", f"student.model={root / 'student.json'}"]
    places += [f"prompts={root / 'prompts'}", f"data.shards=[{root / 'train'}]", "data.batch_size=4"]
    job = Job(*saved, *places, log=root / "same.log", ranks=2)
    assert job.wait(60) == [0, 0], job.text()
    interrupt(root)
    edit_weights(root, "visual.proj")
    job = Job(*saved, *places, log=root / "other.log", ranks=2)
    assert job.wait(60) == [2, 2], job.text()
    (line,) = job.lines()
    assert line.startswith("clipdistill: teachers.0.image_weights: digest")
