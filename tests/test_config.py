"""The configuration: overrides, checks, messages, and every shipped config."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdistill.config import Config, load_config, load_saved_config, save_config
from clipdistill.errors import InputError
from clipdistill.io.resources import resource
from clipdistill.models.prompts import load_prompts
from clipdistill.settings import differences, validate

RUN_CONFIGS = sorted(resource("configs").glob("*.yaml"))


def test_overrides_reach_lists_and_keep_types(write_config: Callable[..., Path]) -> None:
    config = load_config(
        write_config(), ["optimizer.lr=1e-2", "objective.0.gamma=0.25", "data.shards=[a.tar,b.tar]", "seed=3"]
    )
    assert config.optimizer.lr == 0.01
    assert config.objective[0].gamma == 0.25
    assert config.data.shards == ["a.tar", "b.tar"]
    assert config.seed == 3


def test_saved_config_reads_back_equal(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(write_config())
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_saved_config(tmp_path / "saved.yaml") == config


def test_a_saved_config_means_the_same_in_every_folder(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a,b").mkdir()
    (tmp_path / "labels").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(
        write_config(
            teachers=[{"model": "local-dir:a,b"}, {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}],
            student={"model": "ViT-S-32"},
            prompts="labels",
            data={"shards": ["data/{0..2}.tar", "https://host/{0..2}.tar", "s3://bucket/a"], "cache": "../cache"},
            evaluation={"folders": ["set", "hf-hub:owner/name"]},
        ),
        ["output=run", "objective=[{loss: gkl}]"],
    )
    save_config(config, tmp_path / "saved.yaml")
    monkeypatch.chdir("/")
    saved = load_saved_config(tmp_path / "saved.yaml")
    assert [teacher.model for teacher in saved.teachers] == [f"local-dir:{tmp_path}/a,b", "ViT-B-32"]
    assert saved.teachers[1].pretrained == "laion2b_s34b_b79k"
    assert (saved.student.model, saved.prompts, saved.output) == ("ViT-S-32", f"{tmp_path}/labels", f"{tmp_path}/run")
    assert saved.data.shards == [f"{tmp_path}/data/{{0..2}}.tar", "https://host/{0..2}.tar", "s3://bucket/a"]
    assert saved.data.cache == str(tmp_path.parent / "cache")
    assert saved.evaluation.folders == [f"{tmp_path}/set", "hf-hub:owner/name"]


LOOKS_LIKE_ANOTHER_TYPE = ("2024_05_01", "007", "on", "NO", "12:30", "1e3", "0x1F", ".5", "run #1", "true", "1_000.5")


@pytest.mark.parametrize("text", LOOKS_LIKE_ANOTHER_TYPE)
def test_a_text_keeps_its_text(write_config: Callable[..., Path], tmp_path: Path, text: str) -> None:
    """In an override, in a list, in a file, and when a run has saved it."""
    config = load_config(write_config(), [f"prompts={text}", f"data.shards=[{text!r}]", f"data.caption_key={text!r}"])
    assert (config.prompts, config.data.shards, config.data.caption_key) == (text, [text], text)
    save_config(config, tmp_path / "saved.yaml")
    assert load_saved_config(tmp_path / "saved.yaml").data.caption_key == text
    if "#" in text:  # where it begins a comment
        return
    assert load_config(write_config(), [f"data.shards=[{text}]"]).data.shards == [text]
    file = tmp_path / "plain.yaml"
    stated = json.loads(write_config().read_text())
    stated["evaluation"] = {}
    file.write_text(json.dumps(stated).replace('"evaluation": {}', f"evaluation: {{folders: [{text}], split: {text}}}"))
    evaluation = load_config(file).evaluation
    assert (evaluation.folders, evaluation.split) == ([text], text)


def test_numbers_and_switches_are_read_as_ever(write_config: Callable[..., Path]) -> None:
    overrides = ["optimizer.lr=1e-3", "train.trace=on", "data.batch_size=1_6", "train.ema=null", "data.image_size=0x10"]
    config = load_config(write_config(), overrides)
    assert (config.optimizer.lr, config.train.trace, config.data.batch_size, config.train.ema) == (1e-3, True, 16, None)
    assert config.data.image_size == 16


INTERPOLATIONS = (
    "http://host/${oc.env:CLIPDISTILL_SECRET}",
    "${resource:${oc.env:CLIPDISTILL_SECRET}}",
    "${oc.decode:1}",
    "${output}",
)


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_nothing_but_shipped_files_is_interpolated(
    write_config: Callable[..., Path], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDISTILL_SECRET", "hunter2")
    path = write_config(evaluation={"folders": ["data", text]})
    assert load_saved_config(path).evaluation.folders == ["data", text]
    for read in (
        lambda: load_config(path),
        lambda: load_config(write_config(), [f"evaluation.folders=['{text}']"]),
        lambda: load_config(write_config(), values={"prompts": text}),
    ):
        with pytest.raises(
            InputError, match=r"^(evaluation\.folders\.[01]|prompts): .*allowed: \$\{resource:PATH\}"
        ) as caught:
            read()
        assert "hunter2" not in str(caught.value)


def test_shipped_files_are_interpolated(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(), ["prompts=${resource:prompts/icons}"])
    assert config.prompts == str(resource("prompts", "icons"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1", r"^optimzer: unknown config key; nearest valid key: optimizer"),
        ("optimizer.l=1", r"^optimizer\.l: unknown config key; nearest valid key: lr"),
        ("objective.0.gama=1", r"gama: unknown config key; nearest valid key: gamma"),
        ("objective.0.gamma=2", r"^objective\.0\.gamma: 2 is not allowed; allowed: 0 to 1$"),
        ("objective.0.gamma=much", r"^objective\.0\.gamma: 'much' is not allowed; allowed: a finite number, 0 to 1$"),
        (
            "objective.0.loss=mse",
            r"^objective\.0\.loss: 'mse' is not allowed; allowed: gkl, kl, dkd, dist, clip, ",
        ),
        (
            "objective.0.kind=mse",
            r"^objective\.0\.kind: unknown config key; .*allowed here: loss, over, name, ",
        ),
        ("objective=[{over: prompts}]", r"^objective\.0\.loss: no value; it must be stated$"),
        ("objective.0={loss: gkl, over: captions, class_prior: true}", r"^objective\.0\.class_prior: True is not"),
        ("objective.0.name=a b", r"^objective\.0\.name: 'a b' is not allowed; allowed: text that matches"),
        ("objective.0.weight=-1", r"^objective\.0\.weight: -1 is not allowed; allowed: >= 0$"),
        ("objective.0=gkl", r"^objective\.0: 'gkl' is not allowed; allowed: a mapping$"),
        ("objective.9.gamma=1", r"^objective\.9\.gamma: list index out of range$"),
        ("objective=[{loss: gkl}, {loss: gkl}]", r"^objective: 'gkl_prompts' is not allowed; allowed: different names"),
        ("data.batch_size=1.5", r"^data\.batch_size: 1\.5 is not allowed; allowed: a whole number, >= 1$"),
        (
            "data.augmentation.zoom=[2, 1]",
            r"^data\.augmentation\.zoom: \[2, 1\] is not allowed; allowed: \[low, ",
        ),
        ("optimizer.name=adam", r"^optimizer\.name: 'adam' is not allowed; allowed: adamw$"),
        ("optimizer.betas=[0.9, 1]", r"^optimizer\.betas\.1: 1 is not allowed; allowed: in \[0, 1\)$"),
        ("student.logit_scale=200", r"^student\.logit_scale: 200 is not allowed; allowed: in \(0, 100\.0\] or empty$"),
        ("student.model=null", r"^student\.model: None is not allowed; allowed: text$"),
        ("objective.0.weight=0", r"^objective: .* allowed: at least one term of weight > 0"),
        ("train.epochs=3", r"^train\.epochs: 3\.0 with train\.steps: 6"),
        ("student.text=both", r"^student\.text: 'both' is not allowed; allowed: train, freeze, teacher"),
        ("train.keep_best=-1", r"^train\.keep_best: -1 is not allowed; allowed: >= 0"),
        ("train.threads=0", r"^train\.threads: 0 is not allowed; allowed: >= 1"),
        ("seed=4294967296", r"^seed: 4294967296 is not allowed; allowed: 0 to 2147483647"),
        ("data.augmentation.rotate=.inf", r"^data\.augmentation\.rotate: inf is not allowed; allowed: >= 0"),
        ("train.rank_timeout=.inf", r"^train\.rank_timeout: inf is not allowed; allowed: >= 1"),
        ("data.batch_size=0", r"^data\.batch_size: 0 is not allowed; allowed: >= 1"),
        ("data.shards=[]", r"^data\.shards"),
        ("prompts=''", r"^prompts: '' is not allowed; allowed: a prompt set"),
        ("teachers=[]", r"^teachers: \[\] is not allowed; allowed: at least one, as gkl_prompts"),
        ("labels=some", r"^labels: 'some' is not allowed; allowed: none, dataset, teacher"),
        ("objective.0.class_prior=true", r"^labels: 'none' is not allowed; allowed: dataset or teacher"),
        ("seed", r"^override 'seed': no '='"),
    ],
)
def test_bad_overrides_name_field_value_and_what_is_allowed(
    write_config: Callable[..., Path], override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(write_config(), [override])
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="allowed: a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not YAML"):
        load_config(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    header = path.read_text(encoding="utf-8").split("\noutput:")[0]
    for word in ("Launch:", "Hardware:"):
        assert word in header, f"{path.name} does not state {word}"
    if config.prompts:
        load_prompts(config.prompts)


@pytest.mark.parametrize("path", sorted(resource("configs", "models").glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_model_config_builds(path: Path) -> None:
    from clipdistill.models.loading import load_student

    student = load_student(str(path))
    assert student.embed_dim == json.loads(path.read_text())["embed_dim"]


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_its_differences_from_the_defaults(path: Path) -> None:
    config = load_config(path)
    stated = json.loads(json.dumps(differences(config)))
    assert validate(Config, stated) == config
    assert "keep" not in stated["train"]
