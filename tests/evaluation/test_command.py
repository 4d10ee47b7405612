"""``clipdistill evaluate``: files that other tools read, going on after a kill, several processes, bad input."""

import argparse
import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from clipdistill.errors import InputError, RunError
from clipdistill.evaluation import EvaluationSet, evaluate_sets, load_for_evaluation, open_set, session
from clipdistill.evaluation.command import add_arguments, run
from clipdistill.evaluation.results import slug
from clipdistill.io.resources import resource
from tests.conftest import CLASSES, colour_samples
from tests.evaluation.test_sets import npy, shard_set

ICONS_TEACHER = f"local-dir:{resource('weights', 'icons-teacher')}"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["clipdistill.training.trainer", "clipdistill.cli", "clipdistill.evaluation.session"])


def evaluate(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of sets: ``labels`` (26 samples in 2 shards, one unreadable), ``marks``, ``texts``, ``shift``."""
    root = tmp_path_factory.mktemp("sets")
    samples = colour_samples(26)
    samples[11]["png"] = b"no picture"
    shard_set(root / "labels", samples)
    shutil.copytree(root / "labels" / "test", root / "labels" / "train")
    shutil.copytree(root / "labels", root / "again" / "labels")
    marks = [npy([int(c <= sample["cls"]) for c in range(4)]) for sample in samples]
    both = list(zip(samples, marks, strict=True))
    shard_set(root / "marks", [{"key": s["key"], "png": s["png"], "npy": m} for s, m in both], kind="multilabel")
    captions = [f"{sample['txt']} {number}\nnumber {number}" for number, sample in enumerate(samples)]
    texts = [{"key": s["key"], "png": s["png"], "txt": c} for s, c in zip(samples, captions, strict=True)]
    shard_set(root / "texts", texts, kind="retrieval")
    shard_set(root / "shift", colour_samples(9, first=200))
    return root


@pytest.fixture(scope="module")
def models(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Two exports with different weights."""
    other = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(teacher_folder, other)
    _change_weights(other, seed=1)
    return teacher_folder, other


def _change_weights(model: Path, *, seed: int) -> None:
    state = load_file(model / "open_clip_model.safetensors")
    noise = torch.randn(state["visual.proj"].shape, generator=torch.Generator().manual_seed(seed))
    state["visual.proj"] += 0.2 * noise
    save_file(state, model / "open_clip_model.safetensors", metadata={"format": "pt"})


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _values(name: str, content: bytes) -> list[tuple[str, Any]]:
    """What a file of results says, as (place, value) pairs; text in lines."""
    if name.endswith(".md"):
        return [(f"/{number}", line) for number, line in enumerate(content.decode().splitlines())]
    lines = content.splitlines() if name.endswith(".jsonl") else [content]
    return list(_leaves("", [json.loads(line) for line in lines]))


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{place}/{key}", part)
    elif not place.endswith(("/processes", "/sha256")):
        yield place, value


def assert_same_results(ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    """Counts, keys and accuracies alike; what is a real number alike to rounding, which depends on threads; less so
    what was fitted."""
    assert ours.keys() == theirs.keys()
    for name in theirs:
        found, expected = _values(name, ours[name]), _values(name, theirs[name])
        assert [place for place, _ in found] == [place for place, _ in expected]
        for (place, value), (_, other) in zip(found, expected, strict=True):
            loose = 0.01 if place.endswith(("/temperature", "/ece_tempered")) else 1e-4
            near = pytest.approx(other, rel=loose) if isinstance(other, float) else other
            assert value == near, f"{name}{place}"


def _stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("*/details/*.json")}


def test_a_folder_of_results_that_other_tools_read(
    sets: Path,
    models: Sequence[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pets = tmp_path / "data" / "wds_vtab-pets_test"
    shutil.copytree(sets / "labels", pets)
    output = tmp_path / "results"
    evaluate(
        "--model", *models, "--data", pets, sets / "marks", sets / "texts", "--teacher", models[0], "--output", output
    )
    printed = capsys.readouterr().out
    assert "6 new results, 0 already there" in printed
    folders = sorted(path for path in output.iterdir() if path.is_dir())
    assert [re.split("[_-]", folder.name)[-2] for folder in folders] == ["other", "tiny"]
    for folder in folders:
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        assert sorted(record["dataset"] for record in records) == ["marks", "texts", "wds_vtab-pets_test"]
        lines = [json.loads(line) for line in (folder / "eval_results.jsonl").read_text().splitlines()]
        assert all(set(line) == {"key", "dataset", "metrics"} for line in lines)
        by_key = {line["key"]: line for line in lines}
        assert by_key.keys() == {"vtab/pets", "marks", "texts"}
        found = by_key["vtab/pets"]
        assert found["dataset"] == "Oxford-IIIT Pet"
        assert found["metrics"]["main_metric"] == found["metrics"]["mean_per_class_recall"]
        assert by_key["marks"]["metrics"]["main_metric"] == by_key["marks"]["metrics"]["mean_average_precision"]
        assert by_key["texts"]["metrics"]["main_metric"] == by_key["texts"]["metrics"]["mean_recall@1"]
    details = json.loads(next(folders[0].glob("details/*pets*")).read_text())
    assert details["samples"] == 26
    assert details["record"]["metrics"]["unreadable"] == 1
    assert "s00011" in details["unreadable"][0]
    assert {each["name"] for each in details["classes"]} == set(CLASSES)
    assert sum(each["samples"] for each in details["reliability"]) == 25
    assert len(json.loads((output / "summary.json").read_text())["results"]) == 6
    assert (output / "summary.md").read_text().count("\n") == 2 + 3 + 1

    cli = pytest.importorskip("clip_benchmark.cli")
    table = tmp_path / "benchmark.csv"
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", "build", *map(str, folders), "--output", str(table)])
    cli.main()
    rows = table.read_text().splitlines()
    assert len(rows) == 7
    assert "share_of_teacher" in rows[0]


def test_only_what_is_new_is_evaluated(
    sets: Path, models: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "labels"
    shutil.copytree(models[0], model)
    shutil.copytree(sets / "labels", data)
    command = ("--model", model, models[1], "--data", data, sets / "texts", "--output", tmp_path / "results")

    def counts() -> tuple[str, str]:
        evaluate(*command)
        found = re.search(r"(\d) new results, (\d) already there", capsys.readouterr().out)
        assert found
        return found.groups()  # type: ignore[return-value]

    assert counts() == ("4", "0")
    first = _tree(tmp_path / "results")
    assert counts() == ("0", "4")
    assert _tree(tmp_path / "results") == first
    _change_weights(model, seed=2)
    assert counts() == ("2", "2")
    (data / "zeroshot_classification_templates.txt").write_text("a {c} thing\n")
    assert counts() == ("2", "2")
    shard_set(data, colour_samples(7))
    assert counts() == ("2", "2")
    assert _tree(tmp_path / "results").keys() == first.keys()


def swap_in_place(path: Path, old: bytes, new: bytes) -> None:
    """Change a file's content, and keep its size and time."""
    before, content = path.stat(), path.read_bytes()
    assert len(old) == len(new)
    assert old in content
    path.write_bytes(content.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_set_is_known_by_its_content(
    sets: Path,
    models: Sequence[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by the sizes and times of its files, in any layout."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "tables-cache")
    shard, folder = tmp_path / "labels", tmp_path / "folders"
    shutil.copytree(sets / "labels", shard)
    for sample in colour_samples(12):
        path = folder / CLASSES[sample["cls"]] / f"{sample['key']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample["png"])
    rows = {"image": [{"bytes": sample["png"], "path": None} for sample in colour_samples(12)]}
    rows["label"] = [sample["cls"] for sample in colour_samples(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "tables").mkdir()
    pyarrow.parquet.write_table(table.data.table, tmp_path / "tables" / "test.parquet", compression="none")
    command = ("--model", models[0], "--output", tmp_path / "results", "--cache", tmp_path / "cache", "--data")
    locations = (shard, folder, tmp_path / "saved", tmp_path / "tables")

    def counts() -> tuple[str, ...]:
        evaluate(*command, *locations)
        found = re.search(r"(\d) new results, (\d) already there", capsys.readouterr().out)
        assert found
        return found.groups()

    assert counts() == ("4", "0")
    assert counts() == ("0", "4")
    pictures = [sample["png"] for sample in colour_samples(12)]
    one, other = next((a, b) for a in pictures for b in pictures if len(a) == len(b) and a != b)
    with tarfile.open(shard / "test" / "0.tar") as tar:
        label = next(member for member in tar if member.name.endswith(".cls"))
    content = bytearray((shard / "test" / "0.tar").read_bytes())
    stat = (shard / "test" / "0.tar").stat()
    content[label.offset_data] = ord("0") + (content[label.offset_data] - ord("0") + 1) % len(CLASSES)
    (shard / "test" / "0.tar").write_bytes(content)
    os.utime(shard / "test" / "0.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    swap_in_place(next(path for path in folder.rglob("*.png") if path.read_bytes() == one), one, other)
    swap_in_place(next((tmp_path / "saved").glob("*.arrow")), one, other)
    swap_in_place(tmp_path / "tables" / "test.parquet", one, other)
    assert counts() == ("4", "0")


def test_rebuild_measures_again_and_uses_no_cache(
    sets: Path, models: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, cache = tmp_path / "results", tmp_path / "cache"
    command = ("--model", models[0], "--data", sets / "labels", "--output", output, "--cache", cache)
    evaluate(*command)
    first, kept = _tree(output), _tree(cache)
    (file,) = (cache / "class_embeddings").iterdir()
    features = load_file(file)["embeddings"].flip(0).contiguous()
    digest = hashlib.sha256(f"{features.dtype}".encode() + features.numpy().tobytes()).hexdigest()
    save_file({"embeddings": features}, file, metadata={"key": file.stem, "digest": digest})
    evaluate(*command, "--rebuild")
    assert "1 new results, 0 already there" in capsys.readouterr().out.split("\n")[-2]
    assert_same_results(_tree(output), first)
    assert _tree(cache).keys() == kept.keys()


@pytest.mark.parametrize("damage", ["accuracy", "record", "cut"])
def test_an_edited_result_is_measured_again(
    sets: Path,
    models: Sequence[Path],
    tmp_path: Path,
    damage: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ("--model", models[0], "--data", sets / "labels", "--output", tmp_path / "results")
    evaluate(*command)
    whole = _tree(tmp_path / "results")
    (file,) = (tmp_path / "results").glob("*/details/*.json")
    details = json.loads(file.read_text())
    if damage == "accuracy":
        details["record"]["metrics"]["acc1"] = 0.999
    elif damage == "record":
        del details["record"]
    file.write_text(json.dumps(details)[: 40 if damage == "cut" else None])
    evaluate(*command)
    assert "1 new results, 0 already there" in capsys.readouterr().out
    assert f"{file} is not what was saved" in caplog.text
    assert_same_results(_tree(tmp_path / "results"), whole)


def test_a_set_of_another_kind_under_a_name_of_datacomps(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    for name, kind in (("wds_vtab-pets_test", "texts"), ("caltech101", "marks")):
        shutil.copytree(sets / kind, tmp_path / name)
    data = [tmp_path / "wds_vtab-pets_test", tmp_path / "caltech101"]
    evaluate("--model", models[0], "--data", *data, "--output", tmp_path / "results")
    (file,) = (tmp_path / "results").glob("*/eval_results.jsonl")
    found = {line["key"]: line["metrics"] for line in map(json.loads, file.read_text().splitlines())}
    assert found["vtab/pets"]["main_metric"] == found["vtab/pets"]["mean_recall@1"]
    assert found["vtab/caltech101"]["main_metric"] == found["vtab/caltech101"]["mean_average_precision"]


def test_a_summary_that_a_kill_left_stale_is_made_anew(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    output = tmp_path / "results"
    command = ("--model", models[0], "--data", sets / "marks", "--output", output)
    evaluate(*command)
    whole = _tree(output)
    (output / "summary.md").unlink()
    (output / "summary.json").write_text('{"results": []}')
    next(output.glob("*/eval_results.jsonl")).write_text("")
    evaluate(*command)
    assert _tree(output) == whole


def test_what_was_measured_before_bad_data_is_in_the_summary(
    sets: Path, models: Sequence[Path], tmp_path: Path
) -> None:
    shard_set(tmp_path / "bad", [sample | {"cls": 9} for sample in colour_samples(4)])
    for order, count in (("bad first", 0), ("bad last", 1)):
        data = [tmp_path / "bad", sets / "marks"][:: -1 if count else 1]
        with pytest.raises(InputError, match="label 9"):
            evaluate("--model", models[0], "--data", *data, "--output", tmp_path / order)
        assert len(list((tmp_path / order).glob("summary.json"))) == count


@pytest.mark.parametrize("output", ["results", "result.json"])
def test_a_result_that_cannot_be_written_is_one_line(
    sets: Path, models: Sequence[Path], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"could not be written: No space left on device \(.* MiB free") as caught:
        evaluate("--model", models[0], "--data", sets / "marks", "--output", tmp_path / output)
    assert "\n" not in str(caught.value)


def test_samples_and_weights_have_digests_only_where_results_are_kept(
    sets: Path, models: Sequence[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def noted(what: str, call: Callable[..., str]) -> Callable[..., str]:
        def told(*of: Any) -> str:
            made.append(what)
            return call(*of)

        return told

    monkeypatch.setattr(session, "fingerprint", noted("model", session.fingerprint))
    monkeypatch.setattr(EvaluationSet, "identity", noted("data", EvaluationSet.identity))
    command = ("--model", models[0], "--data", sets / "marks")
    evaluate(*command, "--output", tmp_path / "result.json")
    assert made == []
    evaluate(*command, "--output", tmp_path / "results")
    assert made == ["model", "data"]


def _rank(arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    try:
        evaluate(*arguments)
    except InputError as error:
        print(f"clipdistill: {error}", flush=True)
        os._exit(2)


def start(arguments: Sequence[object], logs: Path, *, ranks: int = 1) -> list[ForkServerProcess]:
    """The command in processes of its own, with the environment that torchrun gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs.mkdir(exist_ok=True)
    processes = []
    for number in range(ranks):
        environment = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        words = [str(argument) for argument in arguments]
        processes.append(_context.Process(target=_rank, args=(words, environment, str(logs / f"{number}.log"))))
        processes[-1].start()
    return processes


def codes(processes: Sequence[ForkServerProcess]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    command = ["--model", *models, "--data", sets / "labels", sets / "marks", sets / "texts", "--batch-size", 1]
    evaluate(*command, "--output", tmp_path / "whole")
    (process,) = start([*command, "--output", tmp_path / "cut"], tmp_path / "logs")
    deadline = time.monotonic() + 120
    while len(_stamps(tmp_path / "cut")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    done = _stamps(tmp_path / "cut")
    assert 2 <= len(done) < 6
    for path in (tmp_path / "cut").rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text())
    evaluate(*command, "--output", tmp_path / "cut")
    assert done.items() <= _stamps(tmp_path / "cut").items()
    left, expected = _tree(tmp_path / "cut"), _tree(tmp_path / "whole")
    assert_same_results({name: left[name] for name in expected}, expected)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_set_out(sets: Path, models: Sequence[Path], tmp_path: Path, ranks: int) -> None:
    """26 samples in 7 batches: the same results, each sample counted once."""
    data = [sets / name for name in ("labels", "marks", "texts")]
    command = ["--model", models[1], "--data", *data, "--teacher", models[0], "--batch-size", 4, "--device", "cpu"]
    evaluate(*command, "--output", tmp_path / "one")
    processes = start([*command, "--output", tmp_path / "shared"], tmp_path / "logs", ranks=ranks)
    assert codes(processes) == [0] * ranks, (tmp_path / "logs" / "0.log").read_text()
    assert_same_results(_tree(tmp_path / "shared"), _tree(tmp_path / "one"))
    assert (tmp_path / "logs" / "0.log").read_text().count("cannot be read, and count as wrong") == 6
    said = (tmp_path / "logs" / "1.log").read_text().splitlines()
    assert [line for line in said if not line.startswith("[Gloo]")] == []  # which some releases of torch print


def _evaluate_sets(rank: int, ranks: int, port: int, data: str, output: str) -> None:
    """What a trainer does, on one rank whose batch statistics are its own."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    tower = load_for_evaluation(ICONS_TEACHER).train(rank % 2 == 0)
    mode = tower.training
    if rank:
        for name, buffer in tower.clip.named_buffers():
            if name.endswith("running_mean"):
                buffer += rank
    (record,) = evaluate_sets(tower, [open_set(data)], model="x", batch_size=4)
    assert tower.training == mode
    Path(output).write_text(json.dumps(record))
    if ranks > 1:
        torch.distributed.destroy_process_group()


def test_ranks_of_a_trainer_agree(sets: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / f"{number}.json" for number in range(3)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = [(0, 2, port), (1, 2, port)]
    processes = []
    for arguments, output in zip([*shared, (0, 1, port)], outputs, strict=True):
        processes.append(_context.Process(target=_evaluate_sets, args=(*arguments, str(sets / "labels"), str(output))))
        processes[-1].start()
    assert codes(processes) == [0, 0, 0]
    assert len({output.read_text() for output in outputs}) == 1


def test_every_process_tells_what_one_has_met(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    """The bad label is in the last batch, which only the last rank reads."""
    samples = colour_samples(24)
    samples[-1]["cls"] = 9
    shard_set(tmp_path / "bad", samples)
    command = ["--model", models[0], "--data", tmp_path / "bad", "--batch-size", 4, "--output", tmp_path / "out.json"]
    assert codes(start(command, tmp_path / "logs", ranks=2)) == [2, 2]
    for log in (tmp_path / "logs").iterdir():
        assert "sample s00023: label 9; allowed: 0 to 3" in log.read_text()
    assert not (tmp_path / "out.json").exists()


def test_every_process_tells_that_a_result_cannot_be_written(
    sets: Path, models: Sequence[Path], tmp_path: Path
) -> None:
    output = tmp_path / "results"
    output.mkdir()
    (output / slug(str(models[0]))).write_text("where the model's folder would be")
    command = ["--model", models[0], "--data", sets / "marks", "--batch-size", 4, "--output", output]
    assert codes(start(command, tmp_path / "logs", ranks=2)) == [1, 1]
    for log in (tmp_path / "logs").iterdir():
        assert re.search(r"RunError: result .*could not be written: Not a directory \(", log.read_text())


@pytest.mark.slow
def test_under_torchrun(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    command = ["scripts/evaluate.py", "--model", models[0], "--data", sets / "labels", "--batch-size", 4]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    found = []
    for number, prefix in enumerate(([], launcher)):
        output = tmp_path / f"{number}.json"
        words = [sys.executable, *prefix, *command, "--output", output, "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(word) for word in words], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(output.read_bytes())
    assert found[0] == found[1]


def test_linear_probe_and_robustness(sets: Path, models: Sequence[Path], tmp_path: Path) -> None:
    common = ["--data", sets / "labels", "--model", *models, "--teacher", models[0]]
    evaluate(*common, "--task", "linear_probe", "--output", tmp_path / "probe")
    records = json.loads((tmp_path / "probe" / "summary.json").read_text())["results"]
    assert [record["task"] for record in records] == ["linear_probe"] * 2
    for record in records:
        assert record["metrics"]["lp_acc1"] == 25 / 26  # fitted on the same pictures, one of which cannot be read
        assert record["metrics"]["share_of_teacher"] == 1.0
    shifted = [*common[:2], sets / "shift", *common[2:], "--task", "robustness"]
    evaluate(*shifted, "--output", tmp_path / "baseline")
    found = json.loads((tmp_path / "baseline" / "summary.json").read_text())["results"]
    assert len(found) == 2
    for record in found:
        metrics = record["metrics"]
        assert metrics["shift/drop"] == metrics["base_acc1"] - metrics["shift/acc1"] == metrics["mean_drop"]
        assert "mean_effective_robustness" not in metrics


def _robust(base: float, shift: float) -> dict[str, Any]:
    metrics = {"base_acc1": base, "shift/acc1": shift, "shift/base_acc1": base, "shift/drop": base - shift}
    return {"dataset": "labels", "model": str(base), "pretrained": "", "task": "robustness", "metrics": metrics}


def test_effective_robustness_is_measured_from_given_models(
    sets: Path, models: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (base, shift) in enumerate(((0.2, 0.2), (0.6, 0.6))):  # the line y = x
        (tmp_path / f"{number}.json").write_text(json.dumps(_robust(base, shift)))
    evaluate(
        *("--model", models[0], "--data", sets / "labels", sets / "shift", "--task", "robustness"),
        *("--baseline", tmp_path / "0.json", tmp_path / "1.json"),
    )
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["shift/effective_robustness"] == pytest.approx(-metrics["shift/drop"])


def test_one_result_goes_into_one_file(
    sets: Path, models: Sequence[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    common = ("--model", models[1], "--data", sets / "labels", "--teacher", models[0])
    evaluate(*common, "--output", output)
    assert capsys.readouterr().out.startswith(f"{output}: acc1 0.")
    record = json.loads(output.read_text())
    assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert list(tmp_path.iterdir()) == [output]
    evaluate(*common)
    assert json.loads(capsys.readouterr().out) == record


BAD: dict[str, tuple[list[str], str]] = {
    "one file for two": (
        ["{labels}", "{marks}", "--output", "{root}/x.json"],
        "one file for 2 results; allowed: a folder",
    ),
    "no folder": (["{labels}", "--output", "{root}/none/x.json"], "no folder .*none; allowed: a file in an existing"),
    "a file": (["{labels}", "--output", "{root}/file"], "a file; allowed: a folder, or a file with a name in .json"),
    "below a file": (
        ["{labels}", "--output", "{root}/file/a/b"],
        "file/a/b: .*file is a file; allowed: a folder, or a",
    ),
    "no shift": (["{labels}", "--task", "robustness"], "--data has 1 set; allowed: a base set and one or more shifts"),
    "same names": (
        ["{labels}", "{again}", "--task", "robustness"],
        "two sets named labels; allowed: a base set and shifts with different names",
    ),
    "no baseline": (
        ["{labels}", "--baseline", "{root}"],
        "--baseline: given with --task auto; allowed: only with --task robustness",
    ),
    "another kind": (
        ["{labels}", "--task", "zeroshot_retrieval"],
        "is a classification set; allowed: zeroshot_classif",
    ),
    "a probe of marks": (
        ["{marks}", "--task", "linear_probe", "--train-split", "test"],
        "a multilabel set; allowed for this task: a class",
    ),
    "a probe without training": (["{shift}", "--task", "linear_probe"], "shift: no train/nshards.txt"),
    "no such device": (["{labels}", "--device", "abacus"], "--device abacus: not available here"),
    "a set twice": (
        ["{labels}", "{labels}", "--output", "{root}/out"],
        "--data: .*labels given twice; allowed: each once",
    ),
    "step of an export": (["{labels}", "--step", "3"], "no checkpoint of step 3; allowed: none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(sets: Path, models: Sequence[Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    arguments, message = BAD[name]
    places = {path.name: path for path in sets.iterdir()} | {"again": sets / "again" / "labels", "root": tmp_path}
    words = [word.format(**places) for word in arguments]
    with pytest.raises(InputError, match=message) as caught:
        evaluate("--model", models[0], "--data", *words)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import argparse, sys; from clipdistill.evaluation.command import add_arguments;"
        "add_arguments(argparse.ArgumentParser());"
        "print([name for name in ('torch', 'open_clip', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_different_names_have_different_files() -> None:
    names = [
        "a",
        "A",
        "a/b",
        "a_b",
        "a b",
        "猫",
        "犬",
        "é",
        "runs/猫",
        "x" * 300,
        "x" * 299 + "y",
        "..",
        ".",
        "a.",
        "a:b",
    ]
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    for found in slugs:
        assert re.fullmatch(r"[A-Za-z0-9@-][A-Za-z0-9.@_-]{0,200}", found), found
    assert slug("ViT-B-32") == "ViT-B-32"


def test_a_comma_in_a_path_is_no_tag(teacher_folder: Path, colours: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a,b [1] #x=%20" / "é,c"
    shutil.copytree(teacher_folder, folder)
    data = tmp_path / "set,1 [2]"
    shutil.copytree(colours / "set", data)
    for model in (folder, f"local-dir:{folder}"):
        evaluate("--model", model, "--data", data)
