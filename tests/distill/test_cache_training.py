"""``clipdistill cache`` and training from what it writes: against online training, over kills, ranks and machines."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.config import load_config
from clipdistill.data import Augmentation, StreamLoader, expand_urls, index_shards
from clipdistill.io.jsonl import read_jsonl
from clipdistill.models.class_embeddings import class_embeddings, similarity_logits
from clipdistill.models.loading import load_frozen_model
from clipdistill.models.prompts import load_prompts
from clipdistill.training.checkpoint import find_checkpoint
from clipdistill.training.trainer import train
from scripts.compare_runs import TIMINGS
from scripts.jobs import ENVIRONMENT
from tests.conftest import colour_samples, write_tar
from tests.processes import Runs, assert_identical, traced, until
from tests.servers import files, serving
from tests.streams import make_stream

OBJECTIVE = [
    {"loss": "gkl", "gamma": 0.5, "beta": 0.3},
    {"loss": "gkl", "over": "captions", "gamma": 0.3},
    {"loss": "feature"},
]
VIEWS = ["data.views=3", "data.augmentation.crop_scale=[0.3,1.0]", "data.augmentation.flip=0.5"]
ONLINE = [*VIEWS, "evaluation.folders=[]", "train.steps=15", "train.log_every=1", "optimizer.eps=1e-3"]
"""Over two epochs: 50 samples in batches of 8."""


@pytest.fixture
def cached(write_config: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Build a cache for a config; gives what makes a run use it."""

    def build(config: Path, *overrides: str, folder: str = "embeddings") -> list[str]:
        use = [*overrides, f"teacher_cache.folder={tmp_path / folder}"]
        assert main(["cache", "--config", str(config), *use]) == 0
        return use

    return build


def losses(run: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in record.items() if name not in TIMINGS}
        for record in read_jsonl(run / "metrics.jsonl")
        if "loss" in record
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / "student.safetensors")


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], tmp_path: Path
) -> None:
    """With embeddings in float32: the same views of the same samples, losses and weights to rounding."""
    config = write_config(objective=OBJECTIVE)
    use = cached(config, *ONLINE, "teacher_cache.precision=fp32")
    for name, overrides in (("online", ONLINE), ("cached", use)):
        train(load_config(config, [*overrides, f"output={tmp_path / name}"]))
    for ours, theirs in zip(losses(tmp_path / "cached"), losses(tmp_path / "online"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    online = weights(tmp_path / "online")
    for name, tensor in weights(tmp_path / "cached").items():
        torch.testing.assert_close(tensor, online[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_teacher_is_not_asked_again(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], teacher_folder: Path, tmp_path: Path
) -> None:
    """A run of another seed from the same cache: nothing is written anew, and no image is encoded by the teacher."""
    config = write_config()
    use = cached(config, *ONLINE)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").iterdir()}
    assert main(["cache", "--config", str(config), *use, "seed=9"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").iterdir()} == before
    program = f"""
import clipdistill.models.towers
def encode_image(self, image_BCHW):
    raise AssertionError("the teacher was asked")
clipdistill.models.towers.FrozenModel.encode_image = encode_image
from clipdistill.cli import main
raise SystemExit(main(["train", "--config", {str(config)!r}, *{[*use, "seed=9"]!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_class_prior_is_there_before_the_first_step(
    write_config: Callable[..., Path],
    cached: Callable[..., list[str]],
    colours: Path,
    teacher_folder: Path,
    tmp_path: Path,
) -> None:
    """Against the teacher itself, asked for every view of every sample."""
    config = write_config(objective=[{"loss": "gkl", "gamma": 0.5, "class_prior": True}], labels="dataset")
    use = cached(config, *ONLINE, "teacher_cache.precision=fp32")
    train(load_config(config, [*use, "train.steps=1"]))
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    (prior_CC,) = load_file(checkpoint / "priors.safetensors").values()

    teacher, prompts = load_frozen_model(f"local-dir:{teacher_folder}"), load_prompts(str(colours / "prompts"))
    bank_CD = class_embeddings(teacher, prompts, cache=None, device="cpu")
    index = index_shards(expand_urls([str(colours / "train")]), cache_dir=None)
    stream = make_stream(
        index,
        batch_size=50,
        image_size=teacher.image_size,
        augmentation=Augmentation(crop_scale=(0.3, 1.0), flip=0.5),
        views=3,
        view_seed=0,
    )
    expected_CC, count_C = torch.zeros_like(prior_CC), torch.zeros(len(prior_CC))
    for _, batch in zip(range(3), StreamLoader(stream), strict=False):
        logits_BC = similarity_logits(
            teacher.encode_image(batch.image_BCHW), bank_CD, teacher.logit_scale, teacher.bias
        )
        for label, row_C in zip(batch.labels_B.tolist(), logits_BC.softmax(1), strict=True):
            expected_CC[label] += row_C
            count_C[label] += 1
    assert (count_C > 0).all()
    torch.testing.assert_close(prior_CC, expected_CC / count_C[:, None], rtol=1e-4, atol=1e-6)


def test_the_prior_of_the_cache_is_over_samples_with_labels(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], tmp_path: Path
) -> None:
    samples = colour_samples(20)
    del samples[3]["cls"]
    write_tar(tmp_path / "new" / "0.tar", samples)
    config = write_config(objective=[{"loss": "gkl", "class_prior": True}], labels="dataset")
    use = cached(config, *ONLINE, f"data.shards=[{tmp_path / 'new'}]")
    result = train(load_config(config, [*use, "train.steps=4"]))
    assert result.skipped.keys() == {"no label"}


@pytest.mark.slow
def test_a_run_that_goes_on_with_a_cache_takes_its_prior_from_it(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The prior of a run that was stopped in its first epoch is uniform still."""
    config = write_config(objective=[{"loss": "gkl", "class_prior": True}], labels="dataset")
    use = cached(config, *ONLINE, "teacher_cache.precision=fp32")
    settings = [*ONLINE, "teacher_cache.precision=fp32", "train.save_every=1", "train.keep=99"]
    train(load_config(config, settings))
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    (uniform_CC,) = load_file(first / "priors.safetensors").values()
    assert (uniform_CC == uniform_CC[0, 0]).all()
    train(load_config(config, [*settings, use[-1]]), resume=str(first))
    (prior_CC,) = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "priors.safetensors").values()
    assert not torch.allclose(prior_CC, uniform_CC)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_run_from_the_cache_is_bit_identical(
    colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path: Path, ranks: int
) -> None:
    runs = Runs(tmp_path, colours=colours, student=tiny_model, teacher=teacher_folder)
    layout = ["data.workers=2", "data.views=2", f"teacher_cache.folder={tmp_path / 'embeddings'}"]
    assert main(["cache", "--config", str(runs.config), "output=x", *layout]) == 0
    job = runs.start("killed", *layout, ranks=ranks)
    until(lambda: traced(tmp_path / "killed") >= 9)
    job.kill()
    assert runs.start("killed", *layout, ranks=ranks).wait() == [0] * ranks
    assert_identical(tmp_path / "killed", runs.whole(*layout, ranks=ranks))


@pytest.mark.slow
def test_processes_and_machines_share_the_work(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Two parts, the second by two processes, make together what one process makes alone."""
    config = write_config()
    cached(config, *VIEWS, folder="alone")
    command = ["cache", "--config", str(config), *VIEWS, f"teacher_cache.folder={tmp_path / 'parts'}"]
    assert main([*command, "--part", "1/2"]) == 0
    assert len(list((tmp_path / "parts").iterdir())) == 2
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "clipdistill", *command, "--part", "2/2", "--device", "cpu"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 files written" in done.stdout
    alone, parts = ({path.name: load_file(path) for path in (tmp_path / n).iterdir()} for n in ("alone", "parts"))
    assert parts.keys() == alone.keys()
    for name, tensors in alone.items():
        for field, tensor in tensors.items():
            torch.testing.assert_close(parts[name][field], tensor, rtol=0.01, atol=0.01)


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cache", "--config", str(write_config()), *VIEWS, f"teacher_cache.folder={tmp_path / 'embeddings'}"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / "embeddings").exists()
    assert main(command) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "embeddings").iterdir())
    promised = float(said.split(" MB")[0].rsplit(" ", 1)[1]) * 1e6
    headers = 3 * 3000
    assert promised - 1e5 <= written <= promised + 1e5 + headers
    assert "to build: 3 shards, 50 samples of" in said


@pytest.mark.slow
def test_shards_from_a_server_find_the_same_cache(
    write_config: Callable[..., Path], cached: Callable[..., list[str]], colours: Path, tmp_path: Path
) -> None:
    """A cache belongs to the content of the shards, not to their place."""
    config = write_config()
    with serving(files(colours / "train")) as url:
        remote = [*ONLINE, f"data.shards=['{url}/{{0..2}}.tar']"]
        use = cached(config, *remote)
        train(load_config(config, [*use, f"output={tmp_path / 'remote'}"]))
    train(load_config(config, [*ONLINE, use[-1], f"output={tmp_path / 'local'}"]))
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")


def _other_seed(overrides: list[str], folder: Path) -> list[str]:
    return [*overrides, "data.view_seed=1"]


def _missing_file(overrides: list[str], folder: Path) -> list[str]:
    next(folder.iterdir()).unlink()
    return overrides


def _other_shards(overrides: list[str], folder: Path) -> list[str]:
    samples = [{"key": f"n{number}", "png": b"", "txt": "x", "cls": 0} for number in range(20)]
    write_tar(folder.parent / "new" / "0.tar", samples)
    return [*overrides, f"data.shards=[{folder.parent / 'new'}]"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_seed, "stale: seed was 0 and is 1"),
        (_missing_file, "missing"),
        (_other_shards, "missing"),
        (lambda overrides, _: [*overrides, "data.views=0"], "data.views: 0"),
        (lambda overrides, _: [*overrides, "teachers.0.shard=true"], "teachers.shard"),
    ],
)
def test_a_cache_that_does_not_serve_is_named(
    write_config: Callable[..., Path],
    cached: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[str], Path], list[str]],
    named: str,
) -> None:
    config = write_config()
    overrides = change(cached(config, *ONLINE), tmp_path / "embeddings")
    assert main(["train", "--config", str(config), *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clipdistill: ")]
    assert named in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--part", "3/2"], "3/2"), (["--batch-size", "0"], "0"), ([], "teacher_cache.folder: empty")],
)
def test_bad_input(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    try:
        code: Any = main(["cache", "--config", str(write_config()), *arguments, "data.views=2"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_build_goes_on(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """What it had written whole stays; what it was writing is made anew; nothing else is left."""
    for number in range(100):
        write_tar(tmp_path / "many" / f"{number}.tar", colour_samples(12, first=100 * number))
    config, folder = write_config(), tmp_path / "embeddings"
    command = ["--config", str(config), *VIEWS, f"data.shards=[{tmp_path}/many]", f"teacher_cache.folder={folder}"]
    program = [sys.executable, "-m", "clipdistill", "cache", *command]
    process = subprocess.Popen(program, env=os.environ | ENVIRONMENT)
    until(lambda: len(list(folder.glob("*.safetensors"))) >= 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert 5 <= len(before) < 100
    assert main(["cache", *command]) == 0
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) == 100
    assert main(["train", *command, "train.steps=2", "evaluation.folders=[]"]) == 0


def test_a_build_names_a_worker_that_dies(write_config: Callable[..., Path], tmp_path: Path) -> None:
    for number in range(400):
        write_tar(tmp_path / "many" / f"{number}.tar", colour_samples(12, first=100 * number))
    folder = tmp_path / "embeddings"
    command = ["--config", str(write_config()), *VIEWS, f"data.shards=[{tmp_path}/many]", "data.workers=2"]
    program = [sys.executable, "-m", "clipdistill", "cache", *command, f"teacher_cache.folder={folder}"]
    process = subprocess.Popen(program, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    until(lambda: len(list(folder.glob("*.safetensors"))) >= 5)
    victim = psutil.Process(process.pid).children()[0]
    victim.kill()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    line = stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"clipdistill: DataLoader worker .*{victim.pid}.*; the files written so far are complete", line
    )
    assert 5 <= len(list(folder.glob("*.safetensors"))) < 400
