"""Adversarial training in real runs: layouts, kills, the teacher cache, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from clipdistill.cli import main
from clipdistill.io.jsonl import read_jsonl
from clipdistill.training.checkpoint import find_checkpoint
from tests.conftest import colour_samples, write_tar
from tests.processes import Runs, assert_identical, traced, until
from tests.training.test_trainer import assert_same_training, launch

ATTACK = {"eps": "16/255", "steps": 2, "warmup_epochs": 0.5}
TWO_SIDED = [
    {"loss": "clip", "over": "prompts", "clean": True},
    {"loss": "gkl", "gamma": 0.4, "alpha": 4, "beta": 5, "class_prior": True, "two_sided": True},
]
OBJECTIVE = [{"loss": "gkl", "gamma": 0.5, "beta": 0.3, "class_prior": True}, {"loss": "feature", "weight": 2.0}]


@pytest.fixture(scope="module")
def runs(colours: Path, tiny_model: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(
        tmp_path_factory.mktemp("adversarial"),
        colours=colours,
        student=tiny_model,
        teacher=teacher_folder,
        objective=OBJECTIVE,
        adversarial=ATTACK,
    )


@pytest.mark.parametrize(
    ("ranks", "accumulate"), [(1, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 2), (2, 1)))]
)
def test_killed_and_resumed_run_is_bit_identical(runs: Runs, ranks: int, accumulate: int) -> None:
    """With a teacher, and on several ranks the two-sided form without one, and with moved weights."""
    moved = ["adversarial.weight_radius=0.01", "adversarial.weight_from_epoch=0.5"]
    alone = [f"objective={json.dumps(TWO_SIDED)}", "teachers=[]", *moved] if ranks > 1 else []
    layout = [f"train.accumulate={accumulate}", *alone]
    name = f"killed-{ranks}-{accumulate}"
    for step in (5, 11):
        job = runs.start(name, *layout, ranks=ranks)
        until(lambda step=step: traced(runs.folder / name) >= step)
        job.kill()
    job = runs.start(name, *layout, ranks=ranks)
    assert job.wait() == [0] * ranks, job.text()
    assert_identical(runs.folder / name, runs.whole(*layout, ranks=ranks))


def test_accumulation_changes_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Noise, prior and denominators are those of one batch. (A sign that flips in rounding may move a pixel.)"""
    check_layouts(write_config, tmp_path, {"accumulated": (1, ["data.batch_size=8", "train.accumulate=2"])})


@pytest.mark.slow
def test_ranks_change_nothing(write_config: Callable[..., Path], tmp_path: Path) -> None:
    check_layouts(write_config, tmp_path, {"two": (2, ["data.batch_size=8"])})


def test_the_two_sided_form_does_not_depend_on_the_layout(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """Without a teacher, at moved weights. The second epoch's prior is the student's own mean prediction."""
    layouts = {"accumulated": (1, ["data.batch_size=8", "train.accumulate=2"])}
    attack = ATTACK | {"weight_radius": 0.01}
    check_layouts(write_config, tmp_path, layouts, objective=TWO_SIDED, teachers=[], adversarial=attack)
    checkpoint = find_checkpoint(tmp_path / "whole" / "checkpoints")
    assert checkpoint is not None
    prior_CC = load_file(checkpoint / "priors.safetensors")["gkl_prompts/0"]
    assert prior_CC.sum(1).tolist() == pytest.approx([1.0] * 4)
    assert (prior_CC - 0.25).abs().max() > 1e-4


def check_layouts(
    write_config: Callable[..., Path], tmp_path: Path, layouts: dict[str, tuple[int, list[str]]], **changes: Any
) -> None:
    write_tar(tmp_path / "twin" / "0.tar", colour_samples(16))
    config = write_config(**{"objective": OBJECTIVE, "labels": "dataset", "adversarial": ATTACK, **changes})
    fixed = ["optimizer.eps=1e-3", "train.steps=4", "train.log_every=1", f"data.shards=[{tmp_path / 'twin'}]"]
    for name, (processes, overrides) in ({"whole": (1, ["data.batch_size=16"])} | layouts).items():
        launch(config, *fixed, f"output={tmp_path / name}", *overrides, processes=processes)
    for name in layouts:
        assert_same_training(tmp_path / name, tmp_path / "whole", tolerance=2e-3)


def test_the_teacher_cache_serves(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The teacher sees clean images: a run from the cache, with or without stored pixels, is the run without it."""
    config = write_config(objective=[{"loss": "gkl", "gamma": 0.5}, {"loss": "feature"}], adversarial=ATTACK)
    views = ["data.views=2", "train.log_every=1"]
    assert main(["train", "--config", str(config), f"output={tmp_path / 'online'}", *views]) == 0
    for pixels in ("false", "true"):
        cache = [
            f"teacher_cache.folder={tmp_path / f'cache-{pixels}'}",
            "teacher_cache.precision=fp32",
            f"teacher_cache.pixels={pixels}",
        ]
        assert main(["cache", "--config", str(config), *views, *cache]) == 0
        output = tmp_path / f"cached-{pixels}"
        assert main(["train", "--config", str(config), f"output={output}", *views, *cache]) == 0
        assert_same_training(output, tmp_path / "online", tolerance=1e-3)


def test_attacks_cost_accuracy_on_attacked_images_only_where_they_are_not_trained_on(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The loss of an attacked run is higher, and its student another one; the config of the run says why."""
    losses = {}
    for name, overrides in {"clean": [], "attacked": ["adversarial.eps=32/255", "adversarial.steps=3"]}.items():
        config = write_config()
        assert (
            main(["train", "--config", str(config), f"output={tmp_path / name}", "train.log_every=1", *overrides]) == 0
        )
        records = [record for record in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in record]
        losses[name] = records[0]["loss"]
    assert losses["attacked"] > losses["clean"]
    students = [find_checkpoint(tmp_path / name / "checkpoints") for name in losses]
    first, second = (load_file(student / "student.safetensors") for student in students if student is not None)
    assert any((first[name] != second[name]).any() for name in first)
    saved = (tmp_path / "attacked" / "identity.json").read_text()
    assert json.loads(saved)["settings"]["adversarial"]["steps"] == 3


def test_accuracy_under_attack_chooses_a_checkpoint(
    write_config: Callable[..., Path], colours: Path, tmp_path: Path
) -> None:
    """The metric of the last step is what ``evaluate --attack`` says of the student."""
    config = write_config(
        adversarial=ATTACK,
        evaluation={"folders": [str(colours / "set")], "attack": {"eps": "12/255", "images": 15, "seed": 3}},
        train={"steps": 6, "evaluate_every": 2, "best_metric": "evaluation/set/robust_acc1", "trackers": []},
    )
    assert main(["train", "--config", str(config)]) == 0
    run = tmp_path / "run"
    values = [
        record["evaluation/set/robust_acc1"]
        for record in read_jsonl(run / "metrics.jsonl")
        if "evaluation/set/acc1" in record
    ]
    assert len(values) == 3
    command = ["evaluate", "--model", str(run), "--data", str(colours / "set"), "--output", str(tmp_path / "r.json")]
    attack = ["--attack", "pgd", "--eps", "12/255", "--attack-images", "15", "--attack-seed", "3"]
    assert main([*command, *attack]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["robust_acc1"] == pytest.approx(values[-1])
    wrong = ["evaluation.attack=null", "output=x"]
    assert main(["train", "--config", str(config), *wrong]) == 2
    assert main(["train", "--config", str(config), "evaluation.attack.eps=2", "output=x"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adversarial": {"eps": "300/255"}},
            "adversarial.eps: '300/255' is not allowed; allowed: in (0, 1], or a quo",
        ),
        ({"adversarial": {"steps": 0}}, "adversarial.steps: 0 is not allowed"),
        (
            {"adversarial": {"against": "kl_prompts"}},
            "adversarial.against: 'kl_prompts' is not allowed; allowed: a term over prompts or images, each sample by "
            "itself: gkl_prompts",
        ),
        (
            {"adversarial": {}, "objective": [{"loss": "gkl", "over": "captions"}]},
            "adversarial: ",
        ),
        (
            {"objective": TWO_SIDED, "labels": "dataset"},
            "adversarial: 'none' is not allowed; allowed: settings of an attack, as clip_prompts compares with clean",
        ),
        (
            {"adversarial": {}, "objective": [*TWO_SIDED, {"loss": "clip"}], "labels": "dataset"},
            "objective: ['clip_captions'] is not allowed; allowed: terms over prompts or images, as clip_prompts comp",
        ),
        (
            {"adversarial": {"start": "clean"}, "objective": TWO_SIDED, "labels": "dataset"},
            "adversarial.start: 'clean' is not allowed; allowed: uniform or normal, as two-sided terms have no g",
        ),
        (
            {"adversarial": {}, "objective": [{"loss": "kl", "two_sided": True, "clean": True}, {"loss": "gkl"}]},
            "objective: ['kl_prompts'] is not allowed; allowed: clean or two_sided",
        ),
        (
            {
                "adversarial": {},
                "objective": [{"loss": "feature", "over": "captions", "clean": True}, {"loss": "gkl"}],
            },
            "objective: ['feature_captions'] is not allowed; allowed: terms over prompts or images",
        ),
        (
            {"adversarial": {"weight_from_epoch": 3}},
            "adversarial.weight_from_epoch: 3 is not allowed; allowed: empty, or a number with weight_radius",
        ),
        ({"objective": [{"loss": "gkl", "two_sided": True}]}, "objective.0.two_sided: True is not allowed; allowed: t"),
        ({"objective": [{"loss": "kl", "over": "captions", "two_sided": True}]}, "objective.0.two_sided: True is not"),
    ],
)
def test_wrong_input_is_one_line(
    write_config: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--config", str(write_config(**changes))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: {message}")
    assert not (tmp_path / "run").exists()
