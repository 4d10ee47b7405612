"""Parts of a comparison, joined: on results written by hand."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from clipdistill.cli import main
from clipdistill.compare.combine import Correct, pack, unpack
from clipdistill.compare.statistics import compare_pair, holm

IMAGES, SEEDS = 203, [4, 5, 6, 7, 8, 9, 10]


def runs(accuracy: float, seed: int) -> Correct:
    return np.random.default_rng(seed).random((len(SEEDS), IMAGES)) < accuracy


ARMS = {"kl": runs(0.6, 0), "gkl": runs(0.8, 1), "contrastive": runs(0.3, 2)}


def results(arm: str) -> dict[str, Any]:
    """What a part with one arm leaves; the contrastive one has no teacher."""
    correct_SN = ARMS[arm]
    taught = arm != "contrastive"
    return {
        "command": "clipdistill compare",
        "machine": f"machine of {arm}",
        "versions": {"clipdistill": "0.1.0", "torch": "2.14.1"},
        "test": [{"name": "fonts", "images": 103, "identity": "a"}, {"name": "ri", "images": 100, "identity": "b"}],
        "validation": [{"name": "val", "images": 9, "identity": "c"}],
        "shards": [["0.tar", "d"]],
        "teachers": [{"image_weights": "e"}] if taught else [],
        "shared": {"settings": {"train.steps": 12}, "space": {}, "trials": 2, "views": 8},
        "seeds": SEEDS,
        "trials": 2,
        "against": "",
        "power": {"seeds": 6, "comparisons": 1, "best_p": 0.03, "test_images": 203, "validation_images": 9},
        "teacher": 0.9 if taught else None,
        "arms": {
            arm: {
                "settings": {"optimizer.lr": 0.01},
                "edges": [],
                "validation": 0.5,
                "trials": 2,
                "stopped_trials": 0,
                "accuracy": correct_SN.mean(1).tolist(),
                "mean": float(correct_SN.mean()),
                "standard_deviation": float(correct_SN.mean(1).std(ddof=1)),
                "share_of_teacher": float(correct_SN.mean()) / 0.9 if taught else None,
                "seconds_of_tuning": 1.0,
                "seconds_of_a_run": 1.0,
                "search": "tune",
                "runs": ["runs"],
                "correct": pack(correct_SN),
            }
        },
        "comparisons": [],
    }


@pytest.fixture
def combine(tmp_path: Path) -> Callable[..., int]:
    """Run the command on parts, given as contents."""

    def run(*parts: Any, options: tuple[str, ...] = ()) -> int:
        files = []
        for number, part in enumerate(parts):
            files.append(tmp_path / f"part-{number}.json")
            files[-1].write_text(part if isinstance(part, str) else json.dumps(part))
        return main(["compare", "--combine", str(tmp_path / "whole"), *map(str, files), *options])

    return run


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_packed_bits_come_back(correct_SN: Correct) -> None:
    texts_S = pack(correct_SN)
    assert (unpack(texts_S, correct_SN.shape[1]) == correct_SN).all()
    with pytest.raises(ValueError, match="another number of images"):
        unpack(texts_S, correct_SN.shape[1] + 8)


def test_parts_are_compared_as_one(combine: Callable[..., int], tmp_path: Path) -> None:
    assert combine(results("contrastive"), results("kl"), results("gkl")) == 0
    found = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert found["machine"] == "machine of contrastive, machine of kl, machine of gkl"
    assert found["teacher"] == 0.9
    assert list(found["arms"]) == ["contrastive", "kl", "gkl"]
    pairs = {(pair["arm"], pair["against"]): pair for pair in found["comparisons"]}
    assert list(pairs) == [("kl", "contrastive"), ("gkl", "contrastive"), ("gkl", "kl")]
    expected = [compare_pair(ARMS[one], ARMS[other]) for one, other in pairs]
    adjusted = holm([max(pair.p_seeds, pair.p_images) for pair in expected])
    for pair, by_hand, p_value in zip(pairs.values(), expected, adjusted, strict=True):
        assert pair["difference"] == by_hand.difference
        assert (pair["low"], pair["high"]) == (by_hand.low, by_hand.high)
        assert pair["adjusted"] == p_value
    assert found["power"]["best_p"] == pytest.approx(3 * 2 / 2**7)
    assert "| gkl |" in (tmp_path / "whole" / "table.md").read_text()
    assert (tmp_path / "whole" / "compare.html").exists()


def test_all_against_one(combine: Callable[..., int], tmp_path: Path) -> None:
    parts = [results(arm) for arm in ARMS]
    assert combine(*parts, options=("--against", "gkl")) == 0
    found = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert [(pair["arm"], pair["against"]) for pair in found["comparisons"]] == [("kl", "gkl"), ("contrastive", "gkl")]


def changed(arm: str, path: str, value: Any) -> dict[str, Any]:
    part = copy.deepcopy(results(arm))
    *parents, name = path.split("/")
    place: Any = part
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    if value is None:
        del place[name]
    else:
        place[name] = value
    return part


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (changed("gkl", "test/1/identity", "x"), "test.1.identity is 'x', but 'b' in another file"),
        (changed("gkl", "validation/0/identity", "x"), "validation.0.identity is 'x', but 'c' in another file"),
        (changed("gkl", "shards", [["0.tar", "x"]]), "shards.0.1 is 'x', but 'd' in another file"),
        (changed("gkl", "teachers/0/image_weights", "x"), "teachers.0.image_weights is 'x', but 'e' in another file"),
        (
            changed("gkl", "shared/settings", {"train.steps": 13}),
            "shared.settings.train.steps is 13, but 12 in another",
        ),
        (changed("gkl", "seeds", [1, *SEEDS[1:]]), "seeds.0 is 1, but 4 in another file"),
        (changed("gkl", "seeds", None), "no results of `clipdistill compare` of this version: 'seeds'"),
        (
            changed("gkl", "arms/gkl/correct", ["ff"]),
            "no results of `clipdistill compare` of this version: bits of another",
        ),
        (results("kl"), "arm kl is in another file too; allowed: one result of each arm"),
        ([], "no results of `clipdistill compare` of this version"),
    ],
)
def test_parts_that_do_not_belong_together(
    combine: Callable[..., int], part: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert combine(results("contrastive"), results("kl"), part) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: {tmp_path / 'part-2.json'}: {message}")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize("first", [[], {}, 3, changed("kl", "arms/kl/correct", pack(ARMS["kl"])[1:])])
def test_a_first_file_that_is_none_is_refused(
    combine: Callable[..., int], first: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert combine(first, results("gkl")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clipdistill: {tmp_path / 'part-0.json'}: no results of `clipdistill compare`")


def test_what_is_no_results_file(combine: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert combine("{") == 2
    assert "no JSON" in capsys.readouterr().err
    assert combine() == 2
    assert "allowed: ARMS.yaml, or --combine FOLDER RESULTS.json" in capsys.readouterr().err
    assert combine(results("kl"), results("gkl"), options=("--against", "dkd")) == 2
    assert "against: 'dkd' is not allowed; allowed: kl, gkl" in capsys.readouterr().err
