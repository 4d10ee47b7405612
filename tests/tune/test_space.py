"""Search spaces: what their texts mean, and which texts are refused."""

import math

import optuna
import pytest

from clipdistill.errors import InputError
from clipdistill.tune.space import Space, split_arguments

optuna.logging.set_verbosity(optuna.logging.ERROR)


def samples(items: dict[str, str], count: int = 200) -> list[dict[str, object]]:
    space = Space.parse(items)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask()) for _ in range(count)]


def test_values_lie_in_their_ranges_and_fill_them() -> None:
    found = samples({"a": "log(1e-4, 1e-2)", "b": "uniform(-1, 3)", "c": "int(2, 5)"})
    logs = sorted(math.log10(each["a"]) for each in found)
    assert -4 <= logs[0] < -3.9
    assert -2.1 < logs[-1] <= -2
    assert logs[len(logs) // 2] == pytest.approx(-3, abs=0.2)
    assert {each["c"] for each in found} == {2, 3, 4, 5}
    assert all(-1 <= each["b"] <= 3 for each in found)


def test_choices_are_yaml_values() -> None:
    found = samples({"a": "choice(1, 2.5, 1e-3, kl, true, [1, 2], {loss: gkl, over: prompts})"})
    values = [each["a"] for each in found]
    for expected in (1, 2.5, 0.001, "kl", True, [1, 2], {"loss": "gkl", "over": "prompts"}):
        assert any(type(value) is type(expected) and value == expected for value in values)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("objective.0.temperature ^ 2", 9.0),
        ("objective.0.temperature^2 / 2 + 1e-1", 4.6),
        ("-(x - objective.0.temperature) * 2", 2.0),
        ("2", 2.0),
    ],
)
def test_tied_settings_are_arithmetic_of_others(expression: str, expected: float) -> None:
    space = Space.parse({"objective.0.temperature": "log(0.5, 16)", "x": "uniform(0, 9)", "y": f"tied({expression})"})
    assert space.tied({"objective.0.temperature": 3.0, "x": 2.0})["y"] == pytest.approx(expected)


def test_a_space_read_from_its_own_texts_is_the_same() -> None:
    texts = {"a": "log(0.0001, 0.01)", "b": 'choice(1, "kl", {"loss": "gkl"})', "c": "int(2, 5)", "d": "tied(a * 2)"}
    space = Space.parse(texts)
    assert Space.parse(space.to_dict()) == space


@pytest.mark.parametrize(
    ("settings", "edge"),
    [({"lr": 1e-4}, "0.0001"), ({"lr": 9.5e-3}, "0.01"), ({"lr": 2e-4}, None), ({"lr": 5e-3}, None)],
)
def test_a_value_at_an_edge_is_named(settings: dict[str, float], edge: str | None) -> None:
    lines = Space.parse({"lr": "log(1e-4, 1e-2)"}).edges(settings)
    assert [f"edge {edge} of" in line for line in lines] == ([] if edge is None else [True])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.steps=3"], "^space: empty; allowed: at least one"),
        (["optimizer.lr"], "^argument 'optimizer.lr': no '='"),
        (["a=log(1, 2)", "a=3"], "^a: given twice"),
        (["a=log(0, 1)"], r"^a: log\(0, 1\) is not allowed; allowed: log\(LOW, HIGH\) with 0 < LOW < HIGH"),
        (["a=log(2, 1)"], "0 < LOW < HIGH"),
        (["a=uniform(1)"], "LOW < HIGH"),
        (["a=uniform(1, x)"], "LOW < HIGH"),
        (["a=uniform(1, .inf)"], "LOW < HIGH"),
        (["a=int(1, 2.5)"], "whole numbers"),
        (["a=choice(1)"], "two values or more"),
        (["a=choice([1, 2)"], "two values or more"),
        (["a=log(1, 2)", "b=tied(c^2)"], "^b: .*c is not searched; allowed: a"),
        (["a=log(1, 2)", "b=tied(a +)"], r"^b: tied\(a \+\) is not allowed"),
        (["a=log(1, 2)", "b=tied(__import__('os'))"], "is not allowed"),
        (["a=uniform(0, 2)", "b=tied(1 / a)"], "finite value"),
        (["a=log(1, 2)", "b=tied(a^9999)"], "finite value"),
    ],
)
def test_other_texts_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        [space.corners() for space, _ in [split_arguments(arguments)]]


def test_fixed_settings_are_told_apart() -> None:
    space, fixed = split_arguments(["optimizer.lr=log(1e-4, 1e-2)", "train.steps=3", "output=a=b"])
    assert list(space.dimensions) == ["optimizer.lr"]
    assert fixed == ["train.steps=3", "output=a=b"]
