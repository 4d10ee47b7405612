"""A finished run, its export in every format, and the oracle of both."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clipdistill.config import load_config
from clipdistill.export.parity import smooth_pictures
from clipdistill.training.trainer import train
from tests.export.helpers import Result, command


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``clipdistill export`` in this process, with the command line's exit codes."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = command(*arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_folder(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: a tiny vision transformer, distilled from another for four steps."""
    root = tmp_path_factory.mktemp("exported-run")
    config = {
        "output": str(root / "colours-student"),
        "teachers": [{"model": f"local-dir:{teacher_folder}"}],
        "student": {"model": str(tiny_model)},
        "data": {
            "shards": [str(colours / "train")],
            "batch_size": 8,
            "workers": 0,
            "cache": str(root / "cache"),
        },
        "prompts": str(colours / "prompts"),
        "objective": [{"loss": "gkl", "gamma": 0.5}, {"loss": "feature", "weight": 2}],
        "train": {"steps": 4, "log_every": 2, "trackers": []},
        "evaluation": {"folders": [str(colours / "set")]},
    }
    (root / "config.yaml").write_text(json.dumps(config))
    return train(load_config(root / "config.yaml")).output


@pytest.fixture(scope="session")
def exported(run_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of that run, in every format, checked on real images."""
    folder = tmp_path_factory.mktemp("exports") / "all"
    arguments = ("--checkpoint", run_folder, "--output", folder, "--int8", "--data", colours / "set")
    metadata = (
        "--license",
        "mit",
        "--datasets",
        "someone/colours",
        "--benchmark",
        "set=someone/colours-benchmark:main",
    )
    cache = ("--cache", folder.parent / "cache")
    assert command(*arguments, *metadata, *cache) == 0
    return folder


@pytest.fixture(scope="session")
def model(run_folder: Path) -> Any:
    """The run's student as open_clip loads it: the oracle of every format."""
    return open_clip.create_model_from_pretrained(f"local-dir:{run_folder / 'student'}")[0].eval()


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def beside_a_picture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Go to a folder and put a ``picture.png`` there, as a reader of the card would."""
    pictures = []

    def go(folder: Path) -> None:
        monkeypatch.chdir(folder)
        pictures.append(folder / "picture.png")
        smooth_pictures(1, height=48, width=144)[0].save(pictures[-1])

    yield go
    for picture in pictures:
        picture.unlink()
