"""Bad data and large data, as the trainer meets them: real runs over real shards."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdistill.config import load_config
from clipdistill.errors import InputError
from clipdistill.training.trainer import train
from tests.conftest import colour_samples, write_tar
from tests.servers import files, serving


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_too_many_bad_samples_stop_the_run_which_can_go_on(write_config: Callable[..., Path], tmp_path: Path) -> None:
    samples = colour_samples(200)
    for number in range(0, 200, 40):
        samples[number]["png"] = b"no image"
    write_tar(tmp_path / "shards" / "0.tar", samples)
    overrides = [f"data.shards=[{tmp_path}/shards]", "data.batch_size=50", "train.steps=40", "evaluation.folders=[]"]
    overrides += ["train.log_every=1", "train.save_every=100"]
    config = load_config(write_config(), overrides)
    with pytest.raises(InputError) as caught:
        train(config)
    seen = [
        record for record in records(tmp_path / "run") if record["step"] * 50 + record["skipped/broken image"] >= 1000
    ]
    assert len(seen) == 1
    (last,) = seen
    bad = last["skipped/broken image"]
    share = bad / (last["step"] * 50 + bad)
    assert 0.02 < share < 0.03
    message = str(caught.value)
    assert message.startswith(f"data.shards: {bad} of {last['step'] * 50 + bad:,} samples were bad, {share:.1%}")
    assert f"{bad} broken image" in message
    assert "data.max_bad_share = 0.01" in message
    result = train(load_config(write_config(), [*overrides, "data.max_bad_share=0.05"]), resume="auto")
    assert result.steps == 40
    assert 46 <= result.skipped["broken image"] <= 54


@pytest.mark.slow
def test_a_resampled_stream_trains_and_resumes(write_config: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["data.samples_per_epoch=24", "train.epochs=2", "evaluation.folders=[]", "train.trace=true"]
    changes = {"train": {"log_every": 1, "save_every": 2, "trackers": []}}
    config = load_config(write_config(**changes), overrides)
    result = train(config)
    assert result.steps == 6
    assert [record["epoch"] for record in records(result.output)] == [0, 0, 0, 1, 1, 1]
    trace = (result.output / "samples" / "rank_00000.jsonl").read_text()
    for path in (result.output / "checkpoints").glob("step_0000000[56]"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (result.output / "summary.json").unlink()
    train(config, resume="auto")
    assert (result.output / "samples" / "rank_00000.jsonl").read_text() == trace


def test_missing_shards_of_a_resampled_stream_stop_the_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """18 of 20: each would be one bad sample."""
    for number in (3, 11):
        write_tar(tmp_path / "shards" / f"{number}.tar", colour_samples(200, first=200 * number))
    overrides = ["data.samples_per_epoch=80", "train.steps=20", "evaluation.folders=[]", "data.shuffle=0"]
    with serving(files(tmp_path / "shards")) as url:
        overrides += [f"data.shards=['{url}/{{0..19}}.tar']"]
        with pytest.raises(InputError) as caught:
            train(load_config(write_config(), overrides))
        assert records(tmp_path / "run")[-1]["step"] < 10
        message = r"data\.shards: (\d+) of (\d+) shards have no samples that can be read \(the first: shard 'http.*\); "
        match = re.match(message, str(caught.value))
        assert match
        assert 0 <= int(match[2]) - int(match[1]) <= 2
        assert train(load_config(write_config(), [*overrides, "data.max_bad_share=1"]), resume="auto").steps == 20


def test_shards_without_a_sample_stop_the_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / "shards" / f"{number}.tar", colour_samples(16, first=16 * number))
    (tmp_path / "shards" / "2.tar").write_bytes(b"<html>" * 1000)
    overrides = [f"data.shards=[{tmp_path}/shards]", "train.steps=2", "evaluation.folders=[]"]
    message = (
        r"^data\.shards: 1 of 4 shards have no samples that can be read \(the first: shard .*/2\.tar: no samples: not a"
    )
    with pytest.raises(InputError, match=message):
        train(load_config(write_config(), overrides))
    assert train(load_config(write_config(), [*overrides, "data.max_bad_share=0.25"])).steps == 2
