"""The trainer on real shards: equivalences across processes and accumulation, exact resume, priors, text modes."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.config import load_config
from clipdistill.data import Augmentation, StreamLoader, expand_urls, index_shards
from clipdistill.errors import InputError
from clipdistill.io.jsonl import read_jsonl
from clipdistill.models.class_embeddings import class_embeddings, similarity_logits
from clipdistill.models.loading import load_frozen_model, load_student
from clipdistill.models.prompts import load_prompts
from clipdistill.training.checkpoint import find_checkpoint
from clipdistill.training.ema import MovingAverage
from clipdistill.training.trainer import train
from scripts.jobs import Job
from tests.conftest import TINY_MODEL, colour_samples, write_tar
from tests.processes import Runs, assert_identical, traced, until
from tests.streams import make_stream

GKL = {"loss": "gkl", "gamma": 0.5, "beta": 0.3}
EVERYTHING = [
    GKL | {"warmup_epochs": 1},
    {"loss": "kl", "temperature": 2.0},
    {"loss": "dist", "weight": 0.5},
    {"loss": "feature", "kind": "mse"},
    {"loss": "clip", "weight": 0.5},
    {"loss": "gkl", "over": "captions", "gamma": 0.3, "beta": 0.1},
]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(run) / "student.safetensors")


def steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


def launch(config: Path, *arguments: str, processes: int = 1) -> None:
    """Train in processes of their own."""
    job = Job("--config", config, *arguments, log=config.with_suffix(".log"), ranks=processes)
    assert job.wait(300) == [0] * processes, job.text()


def assert_same_training(ours: Path, theirs: Path, *, tolerance: float) -> None:
    for mine, other in zip(steps(ours), steps(theirs), strict=True):
        for name in (key for key in mine if key.startswith("loss") or key == "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=1e-6), name
    other_weights = weights(theirs)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, other_weights[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "objective", [pytest.param([GKL], id="gkl"), pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow)]
)
def test_world_size_and_accumulation_change_nothing(
    write_config: Callable[..., Path], tmp_path: Path, objective: list[dict[str, Any]]
) -> None:
    """2 processes x 8 = 1 process x 16 = 1 process x 8 x 2 micro-batches, in real processes.

    The data set is one global batch, so each step sees the same samples in every layout. The large epsilon keeps AdamW
    from magnifying rounding where a gradient is about 0.
    """
    _write_twin_shards(tmp_path / "twin")
    config = write_config(objective=[objective[0] | {"class_prior": True}, *objective[1:]], labels="dataset")
    settings = {
        "whole": (1, ["data.batch_size=16"]),
        "accumulated": (1, ["data.batch_size=8", "train.accumulate=2"]),
        "two": (2, ["data.batch_size=8"]),
    }
    for name, (processes, overrides) in settings.items():
        fixed = ["optimizer.eps=1e-3", "train.steps=4", "train.log_every=1"]
        output = [f"output={tmp_path / name}", f"data.shards=[{tmp_path / 'twin'}]"]
        launch(config, *fixed, *output, *overrides, processes=processes)
    assert_same_training(tmp_path / "accumulated", tmp_path / "whole", tolerance=2e-4)
    assert_same_training(tmp_path / "two", tmp_path / "whole", tolerance=2e-4)
    evaluations = [json.loads((tmp_path / name / "summary.json").read_text())["evaluations"] for name in settings]
    assert evaluations[0]
    assert all(len(evaluation) == len(evaluations[0]) for evaluation in evaluations)


def test_teachers_that_see_several_micro_batches_at_once_say_the_same(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(objective=[GKL, GKL | {"over": "captions"}, {"loss": "feature"}])
    fixed = ["optimizer.eps=1e-3", "train.steps=3", "train.log_every=1", "train.accumulate=3", "data.batch_size=4"]
    for at_once in (1, 2, 3):
        overrides = [f"output={tmp_path / str(at_once)}", f"train.teacher_micro_batches={at_once}"]
        train(load_config(config, [*fixed, *overrides]))
    assert_same_training(tmp_path / "2", tmp_path / "1", tolerance=1e-4)
    assert_same_training(tmp_path / "3", tmp_path / "1", tolerance=1e-4)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_losses_from_features_train_the_same(write_config: Callable[..., Path], tmp_path: Path, processes: int) -> None:
    """With a class prior, captions in both directions, accumulation; prior rows and gathered columns included."""
    objective = [GKL | {"class_prior": True}, {"loss": "kl"}, GKL | {"over": "captions"}]
    config = write_config(objective=objective, labels="dataset")
    fixed = ["optimizer.eps=1e-3", "train.steps=4", "train.log_every=1", "train.accumulate=2", "data.batch_size=8"]
    for name in ("plain", "tiled"):
        launch(config, *fixed, f"output={tmp_path / name}", f"train.loss_implementation={name}", processes=processes)
    assert_same_training(tmp_path / "tiled", tmp_path / "plain", tolerance=2e-4)


@pytest.mark.slow
def test_sharded_teacher_teaches_the_same(write_config: Callable[..., Path], tmp_path: Path) -> None:
    for name, shard in (("sharded", "true"), ("whole", "false")):
        launch(write_config(), f"output={tmp_path / name}", f"teachers.0.shard={shard}", processes=2)
    assert_same_training(tmp_path / "sharded", tmp_path / "whole", tolerance=1e-5)


def _write_twin_shards(folder: Path) -> None:
    """16 samples in all: every step of every layout sees exactly these, as one global batch."""
    write_tar(folder / "0.tar", colour_samples(16))


@pytest.fixture(scope="module")
def runs(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of everything that has a state: class priors, captions, dropped patches, a moving average, evaluations."""
    folder = tmp_path_factory.mktemp("runs")
    student = folder / "drops.json"
    student.write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.3}}))
    return Runs(
        folder,
        colours=colours,
        student=student,
        teacher=teacher_folder,
        objective=[
            GKL | {"class_prior": True, "warmup_epochs": 1},
            {"loss": "clip"},
            {"loss": "gkl", "over": "captions"},
        ],
        evaluation={"folders": [str(colours / "set")]},
        train={"ema": 0.9, "evaluate_every": 4, "keep": 2},
    )


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 0), *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, 2), (2, 0), (2, 2)))],
)
def test_killed_and_resumed_run_is_bit_identical(runs: Runs, ranks: int, workers: int, accumulate: int) -> None:
    """Weights, average, optimizer, priors, positions, metrics, evaluations and samples, after two kills."""
    sampling = ["data.sampling=class"] if accumulate > 1 else []
    layout = [f"data.workers={workers}", f"train.accumulate={accumulate}", *sampling]
    name = f"killed-{ranks}-{workers}-{accumulate}"
    for step in (6, 13):
        job = runs.start(name, *layout, ranks=ranks)
        until(lambda step=step: traced(runs.folder / name) >= step)
        job.kill()
    job = runs.start(name, *layout, ranks=ranks)
    assert job.wait() == [0] * ranks, job.text()
    expected = runs.whole(*layout, ranks=ranks)
    assert_identical(runs.folder / name, expected)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (runs.folder / name, expected)]
    assert [e["metrics"] for e in summaries[0]["evaluations"]] == [e["metrics"] for e in summaries[1]["evaluations"]]
    assert [record["step"] for record in steps(expected)] == [5, 10, 15, 16]
    assert [r["step"] for r in read_jsonl(expected / "metrics.jsonl") if "evaluation/mean" in r] == [
        4,
        8,
        12,
        16,
    ]


@pytest.mark.parametrize(
    ("before", "stop", "after", "overrides", "expected_steps"),
    [
        pytest.param(2, 3, 1, [], 3 + 6 + 12, id="half-the-batch"),
        pytest.param(2, 3, 1, ["train.accumulate=2"], 3 + 3 + 6, id="same-batch", marks=pytest.mark.slow),
        pytest.param(1, 4, 2, ["data.workers=1"], 4 + 4 + 6, id="twice-the-batch", marks=pytest.mark.slow),
    ],
)
def test_resume_with_another_number_of_ranks(
    colours: Path,
    tiny_model: Path,
    teacher_folder: Path,
    tmp_path: Path,
    before: int,
    stop: int,
    after: int,
    overrides: list[str],
    expected_steps: int,
) -> None:
    """The epoch goes on with what nobody has seen; its class prior is that of the undisturbed run; the learning rate
    does not jump."""
    write_tar(tmp_path / "shards" / "0.tar", colour_samples(48))
    runs = Runs(
        tmp_path,
        colours=colours,
        student=tiny_model,
        teacher=teacher_folder,
        objective=[GKL | {"class_prior": True}],
        train={"steps": None, "epochs": 2, "log_every": 1, "save_every": 1, "keep": 30},
    )
    shards = f"data.shards=[{tmp_path / 'shards'}]"
    whole = runs.whole(shards, ranks=before)
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if path.name > f"step_{stop:08d}":
            shutil.rmtree(path)
    job = runs.start("run", shards, *overrides, ranks=after)
    assert job.wait() == [0] * after, job.text()

    records, expected = steps(tmp_path / "run"), steps(whole)
    assert len(records) == expected_steps
    traces = [read_jsonl(path) for path in sorted((tmp_path / "run" / "samples").iterdir())]
    epochs = {record["step"]: record["epoch"] for record in records}
    for epoch in (0, 1):
        keys = [key for trace in traces for line in trace if epochs[line["step"]] == epoch for key in line["keys"]]
        assert sorted(keys) == [sample["key"] for sample in colour_samples(48)]
    assert records[:stop] == expected[:stop]
    assert records[stop]["lr"] == pytest.approx(expected[stop]["lr"])
    assert records[-1]["lr"] < 0.1 * records[0]["lr"]
    priors = [load_file(newest(run) / "priors.safetensors")["gkl_prompts/0"] for run in (tmp_path / "run", whole)]
    torch.testing.assert_close(priors[0], priors[1])


def newest(run: Path) -> Path:
    found = find_checkpoint(run / "checkpoints")
    assert found is not None
    return found


def test_trace_holds_what_the_stream_gives_out(write_config: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["train.trace=true", "train.steps=2", "train.accumulate=2", "evaluation.folders=[]"]
    config = load_config(write_config(), overrides)
    train(config)
    augmentation = Augmentation(crop_scale=(0.9, 1.0), crop_ratio=(0.75, 4 / 3))
    index = index_shards(expand_urls(config.data.shards), cache_dir=None)
    stream = make_stream(index, batch_size=8, image_size=16, augmentation=augmentation, shuffle=16)
    batches = list(itertools.islice(StreamLoader(stream), 4))
    records = read_jsonl(tmp_path / "run" / "samples" / "rank_00000.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    for record, pair in zip(records, (batches[:2], batches[2:]), strict=True):
        assert record["keys"] == pair[0].keys + pair[1].keys
        pixels = b"".join(batch.image_BCHW.numpy().tobytes() for batch in pair)
        assert record["pixels"] == hashlib.blake2b(pixels, digest_size=16).hexdigest()


def test_other_global_batch_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    train(load_config(write_config(), ["evaluation.folders=[]"]))
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match=r"^data\.batch_size: 4, but the run has 8; allowed: the same, or"):
        train(load_config(write_config(), ["evaluation.folders=[]", "data.batch_size=4"]), resume="auto")


def test_prior_is_the_teachers_mean_prediction_of_the_epoch_before(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """An oracle from the teacher itself: one epoch of fixed views of all samples, in one batch."""
    _write_twin_shards(tmp_path / "twin")
    changes = {
        "objective": [GKL | {"class_prior": True, "weight_temperature": 2.0}],
        "labels": "dataset",
        "train": {"steps": 2, "save_every": 1, "trackers": []},
    }
    overrides = [f"data.shards=[{tmp_path / 'twin'}]", "data.batch_size=16", "evaluation.folders=[]"]
    config = load_config(write_config(**changes), overrides)
    train(config)
    priors = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "priors.safetensors")

    stream = make_stream(
        index_shards(expand_urls([str(tmp_path / "twin")]), cache_dir=None),
        batch_size=16,
        image_size=16,
        shuffle=16,
    )
    batch = next(iter(StreamLoader(stream)))
    teacher = load_frozen_model(config.teachers[0].model)
    bank_CD = class_embeddings(teacher, load_prompts(config.prompts))
    logits_BC = similarity_logits(teacher.encode_image(batch.image_BCHW), bank_CD, teacher.logit_scale, None)
    for label in range(4):
        expected = (logits_BC[batch.labels_B == label] / 2.0).softmax(dim=1).mean(dim=0)
        torch.testing.assert_close(priors["gkl_prompts/0"][label], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["train", "freeze", "teacher"])
def test_text_modes_learn_and_train_what_they_say(write_config: Callable[..., Path], tmp_path: Path, text: str) -> None:
    config = load_config(write_config(), [f"student.text={text}", "train.steps=12", "optimizer.lr=0.01"])
    result = train(config)
    losses = [record["loss"] for record in steps(result.output)]
    assert losses[-1] < losses[0]
    exported = load_file(result.student / "open_clip_model.safetensors")
    torch.manual_seed(0)
    start = load_student(config.student.model).clip.state_dict()
    assert not torch.equal(exported["visual.conv1.weight"], start["visual.conv1.weight"])
    if text != "teacher":
        moved = not torch.equal(exported["token_embedding.weight"], start["token_embedding.weight"])
        assert moved == (text == "train")
    else:
        teacher = load_file(Path(config.teachers[0].model.removeprefix("local-dir:")) / "open_clip_model.safetensors")
        assert torch.equal(exported["token_embedding.weight"], teacher["token_embedding.weight"])


def test_term_of_weight_zero_costs_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Not even its captions: a data set without any trains all the same."""
    write_tar(
        tmp_path / "bare" / "0.tar",
        [{k: v for k, v in sample.items() if k != "txt"} for sample in colour_samples(16)],
    )
    objective = [GKL, {"loss": "clip", "weight": 0.0}]
    config = load_config(
        write_config(objective=objective),
        [f"data.shards=[{tmp_path / 'bare'}]", "evaluation.folders=[]", "train.steps=2"],
    )
    result = train(config)
    assert set(result.skipped) == set()
    assert not any("clip" in key for key in steps(result.output)[0])


def test_two_teachers_are_the_weighted_mean_of_each(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads(write_config().read_text())
    teacher = config["teachers"][0]

    def first_loss(name: str, teachers: list[dict[str, Any]]) -> float:
        overrides = [
            f"output={tmp_path / name}",
            "train.steps=1",
            "train.log_every=1",
            "evaluation.folders=[]",
        ]
        train(load_config(write_config(teachers=teachers), overrides))
        return float(steps(tmp_path / name)[0]["loss"])

    warm, cold = teacher | {"logit_scale": 30.0}, teacher | {"logit_scale": 5.0}
    alone = [first_loss("warm", [warm]), first_loss("cold", [cold])]
    both = first_loss("both", [warm | {"weight": 3.0}, cold | {"weight": 1.0}])
    assert both == pytest.approx(0.75 * alone[0] + 0.25 * alone[1], rel=1e-5)


def test_step_with_a_loss_that_is_not_finite_is_named(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config(), ["optimizer.lr=1e30", "optimizer.clip_norm=null", "train.steps=6"])
    with pytest.raises(FloatingPointError, match=r"^step [234]: the loss or its gradient is not finite"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints" / "step_00000006").exists()


@pytest.mark.slow
def test_both_passes_over_a_micro_batch_meet_the_same_dropout(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """An in-batch term of no weight to speak of switches the two-pass gradient on; the weights must not notice."""
    path = tmp_path / "drops.json"
    path.write_text(json.dumps({**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.5}}))
    overrides = [f"student.model={path}", "train.accumulate=2", "train.steps=3", "evaluation.folders=[]"]
    overrides += ["optimizer.eps=1e-3", "student.text=freeze", "train.log_every=1"]
    for name, objective in (("apart", [GKL]), ("together", [GKL, {"loss": "clip", "weight": 1e-12}])):
        train(load_config(write_config(objective=objective), [*overrides, f"output={tmp_path / name}"]))
    first = [record["loss/gkl_prompts/soft_ce"] for record in steps(tmp_path / "apart")]
    assert first == pytest.approx([r["loss/gkl_prompts/soft_ce"] for r in steps(tmp_path / "together")], rel=1e-4)
    other = weights(tmp_path / "together")
    for name, tensor in weights(tmp_path / "apart").items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_towers_learn_the_same(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(train={"steps": 2, "log_every": 1, "trackers": []}, evaluation={"folders": []})
    compiled = ["student.compile=true", "teachers.0.compile=true"]
    stable = "optimizer.eps=1e-3"  # where a gradient is zero but for rounding, AdamW would take a full step
    for name, more in (("eager", []), ("compiled", compiled)):
        train(load_config(config, [*more, stable, f"output={tmp_path / name}"]))
    eager, other = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert eager.keys() == other.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_moving_average_equals_the_formula(tiny_model: Path) -> None:
    student = load_student(str(tiny_model))
    average = MovingAverage(student, decay=0.5)
    oracle = student.clip.visual.proj.detach().clone()
    for number in range(4):
        with torch.no_grad():
            student.clip.visual.proj.add_(1.0)
        average.update(number)
        decay = min(0.5, (1 + number) / (10 + number))
        oracle = decay * oracle + (1 - decay) * student.clip.visual.proj.detach()
    torch.testing.assert_close(average.average.clip.visual.proj, oracle)
    assert not any(parameter.requires_grad for parameter in average.average.parameters())


def test_finished_run_is_reused_only_with_the_same_settings(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config(), ["train.steps=2"])
    first = train(config, resume="auto")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    assert train(config, resume="auto") == first
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(InputError, match=r"^train\.steps: 3, but the run"):
        train(load_config(write_config(), ["train.steps=3"]), resume="auto")


def test_what_a_killed_run_was_writing_is_cleared_away(write_config: Callable[..., Path], tmp_path: Path) -> None:
    half = tmp_path / "run" / ".student.99.tmp"
    half.mkdir(parents=True)
    (half / "open_clip_model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / ".config.yaml.99.tmp").write_text("output: ")
    train(load_config(write_config(), ["train.steps=1", "evaluation.folders=[]"]), resume="auto")
    assert not list((tmp_path / "run").glob(".*"))


def test_locked_text_learns_from_captions_alone(write_config: Callable[..., Path]) -> None:
    """student.text: teacher with no term but clip: the teacher lends its caption features and nothing else."""
    config = load_config(write_config(objective=[{"loss": "clip"}], prompts=""), ["student.text=teacher"])
    assert len(steps(train(config).output)) == 3


def test_checkpoints_of_a_branch_that_was_left_are_set_aside(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config(), ["evaluation.folders=[]", "train.save_every=1", "train.keep=3"])
    train(config)
    root = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step_00000004", "step_00000005", "step_00000006"]
    for step in (5, 6):
        (root / f"step_0000000{step}" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "run" / "summary.json").unlink()
    train(config, resume="auto")
    names = sorted(path.name for path in root.iterdir())
    steps_kept = ["step_00000004", "step_00000005", "step_00000006"]
    assert names == ["abandoned_step_00000005", "abandoned_step_00000006", *steps_kept]
    assert find_checkpoint(root) == root / "step_00000006"


def test_of_branches_that_were_left_the_last_checkpoints_stay(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = load_config(write_config(), ["evaluation.folders=[]", "train.save_every=1", "train.keep=2"])
    root = tmp_path / "run" / "checkpoints"
    train(config)
    for _ in range(3):
        (tmp_path / "run" / "summary.json").unlink()
        shutil.copytree(root / "step_00000005", tmp_path / "earlier", dirs_exist_ok=True)
        train(config, resume=str(root / "step_00000005"))
        (root / "step_00000005").exists() or shutil.copytree(tmp_path / "earlier", root / "step_00000005")
    assert len(list(root.glob("abandoned_*"))) <= 2


@pytest.mark.parametrize("text", ["teacher", "freeze", "train"])
def test_frozen_weights_are_saved_once(write_config: Callable[..., Path], tmp_path: Path, text: str) -> None:
    changes = [f"student.text={text}", "evaluation.folders=[]", "train.save_every=1", "train.keep=9", "train.ema=0.5"]
    config = load_config(write_config(), changes)
    train(config)
    root = tmp_path / "run" / "checkpoints"
    files = [path / "frozen.safetensors" for path in sorted(root.iterdir())]
    assert [file.exists() for file in files] == [text != "train"] * 6
    if text == "train":
        return
    assert len({file.stat().st_ino for file in files}) == 1
    last = files[-1].parent
    parts = [load_file(last / f"{name}.safetensors").keys() for name in ("student", "ema", "frozen")]
    assert parts[0] == parts[1]
    assert not parts[0] & parts[2]
    expected = weights(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    train(config, resume=str(root / "step_00000003"))
    assert weights(tmp_path / "run").keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())
