"""A search space: which settings are searched, over which values, and which follow from others.

optimizer.lr=log(1e-4, 1e-2)                              floats, uniform in their logarithm
objective.0.gamma=uniform(0, 1)                           floats
optimizer.warmup_steps=int(10, 200)                       whole numbers
templates_per_step=choice(1, 4, 0)                        any YAML values
objective.0.alpha=tied(objective.0.temperature ^ 2)       arithmetic of searched settings and numbers
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]

from clipdistill.errors import InputError

if TYPE_CHECKING:
    from optuna.trial import Trial

KINDS = ("log", "uniform", "int", "choice", "tied")
_ITEM = re.compile(rf"\s*({'|'.join(KINDS)})\s*\((.*)\)\s*", re.DOTALL)
_KEY = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)*")
_EDGE = 0.05
"""A value is at an edge if it is this share of the range, or less, from it."""

_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two bounds, both included."""

    kind: Literal["log", "uniform", "int"]
    low: float
    high: float

    def suggest(self, key: str, trial: "Trial") -> Any:
        """A value for a trial."""
        if self.kind == "int":
            return trial.suggest_int(key, int(self.low), int(self.high))
        return trial.suggest_float(key, self.low, self.high, log=self.kind == "log")

    def parameter(self, value: Any) -> Any:
        """The parameter of a trial that stands for a value; None if the range lacks it."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return None
        return int(value) if self.kind == "int" else float(value)

    def value(self, parameter: Any) -> Any:
        """The value that a trial's parameter stands for."""
        return parameter

    def examples(self) -> list[Any]:
        """Values that any error of the range would show in."""
        return [int(each) if self.kind == "int" else each for each in (self.low, self.high)]

    def edge(self, value: float) -> float | None:
        """The bound that a value lies at, if any."""
        low, high, at = (math.log(each) if self.kind == "log" else each for each in (self.low, self.high, value))
        share = (at - low) / (high - low)
        return self.low if share <= _EDGE else self.high if share >= 1 - _EDGE else None

    def __str__(self) -> str:
        low, high = (int(bound) if float(bound).is_integer() else bound for bound in (self.low, self.high))
        return f"{self.kind}({low!r}, {high!r})"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Any of some values; a trial's parameter is the value as JSON."""

    values: tuple[str, ...]

    def suggest(self, key: str, trial: "Trial") -> Any:
        """A value for a trial."""
        return json.loads(trial.suggest_categorical(key, self.values))

    def parameter(self, value: Any) -> Any:
        """The parameter of a trial that stands for a value; None if it is none of the choices."""
        text = _as_json(value)
        return text if text in self.values else None

    def value(self, parameter: Any) -> Any:
        """The value that a trial's parameter stands for."""
        return json.loads(parameter)

    def examples(self) -> list[Any]:
        """All values."""
        return [json.loads(value) for value in self.values]

    def edge(self, value: Any) -> float | None:  # noqa: ARG002
        """Choices have no edge."""
        return None

    def __str__(self) -> str:
        return f"choice({', '.join(self.values)})"


Dimension = Range | Choice


@dataclass(frozen=True, kw_only=True)
class Space:
    """The searched settings, and those tied to them, by dotted key."""

    dimensions: Mapping[str, Dimension]
    ties: Mapping[str, str]

    @classmethod
    def parse(cls, items: Mapping[str, str]) -> "Space":
        """A space from its texts, by dotted key.

        Raises:
            InputError: a text is none of those above.
        """
        dimensions: dict[str, Dimension] = {}
        ties = {}
        for key, text in items.items():
            found = _ITEM.fullmatch(text)
            if found is None:
                raise InputError(
                    f"{key}: {text!r} is not allowed; allowed: {', '.join(f'{kind}(...)' for kind in KINDS)}"
                )
            kind, inside = found.groups()
            if kind == "tied":
                ties[key] = inside.strip()
            else:
                dimensions[key] = _dimension(key, kind, inside)
        if not dimensions:
            raise InputError("space: empty; allowed: at least one setting, such as optimizer.lr=log(1e-4, 1e-2)")
        space = cls(dimensions=dimensions, ties=ties)
        space.tied({key: dimension.examples()[0] for key, dimension in dimensions.items()})
        return space

    def suggest(self, trial: "Trial") -> dict[str, Any]:
        """The settings of a trial, tied ones included."""
        values = {key: dimension.suggest(key, trial) for key, dimension in self.dimensions.items()}
        return values | self.tied(values)

    def settings(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a trial's parameters stand for, tied ones included."""
        values = {key: dimension.value(parameters[key]) for key, dimension in self.dimensions.items()}
        return values | self.tied(values)

    def tied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The tied settings, given the searched ones.

        Raises:
            InputError: an expression is no arithmetic of searched settings and numbers, or has no finite value.
        """
        return {key: _evaluate(key, text, values) for key, text in self.ties.items()}

    def corners(self) -> list[dict[str, Any]]:
        """Settings among which each value of ``examples`` of each dimension occurs."""
        most = max(len(dimension.examples()) for dimension in self.dimensions.values())
        found = []
        for number in range(most):
            values = {
                key: dimension.examples()[min(number, len(dimension.examples()) - 1)]
                for key, dimension in self.dimensions.items()
            }
            found.append(values | self.tied(values))
        return found

    def edges(self, settings: Mapping[str, Any]) -> list[str]:
        """A line for each setting that lies at an edge of its range."""
        lines = []
        for key, dimension in self.dimensions.items():
            bound = dimension.edge(settings[key])
            if bound is not None:
                lines.append(f"{key} = {settings[key]:g} lies at the edge {bound:g} of {dimension}: widen the range")
        return lines

    def to_dict(self) -> dict[str, str]:
        """The space as texts, by dotted key."""
        ties = {key: f"tied({text})" for key, text in self.ties.items()}
        return {key: str(dimension) for key, dimension in self.dimensions.items()} | ties


def split_arguments(arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """The space, and the overrides of fixed settings, among a command's ``KEY=VALUE`` arguments.

    Raises:
        InputError: an argument without ``=``, a setting given twice, or as ``Space.parse``.
    """
    items: dict[str, str] = {}
    fixed = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise InputError(f"argument {argument!r}: no '='; allowed: KEY=VALUE, or KEY=log(LOW, HIGH) and its like")
        if key in items or key in fixed:
            raise InputError(f"{key}: given twice; allowed: once")
        if _ITEM.fullmatch(text):
            items[key] = text
        else:
            fixed[key] = argument
    return Space.parse(items), list(fixed.values())


def _dimension(key: str, kind: str, inside: str) -> Dimension:
    try:
        values = yaml.safe_load(f"[{inside}]")
    except yaml.YAMLError:
        values = None
    if kind == "choice":
        choices = tuple(dict.fromkeys(map(_as_json, values))) if isinstance(values, list) else ()
        if len(choices) < 2:
            raise InputError(f"{key}: choice({inside}) is not allowed; allowed: two values or more, as in YAML")
        return Choice(values=choices)
    bounds = [_number(value) for value in values] if isinstance(values, list) else []
    least = 0 if kind == "log" else -math.inf
    good = len(bounds) == 2 and None not in bounds and least < bounds[0] < bounds[1] < math.inf  # type: ignore[operator]
    if good and kind == "int":
        good = all(float(bound).is_integer() for bound in bounds)  # type: ignore[arg-type]
    if not good:
        numbers = {"log": "0 < LOW < HIGH", "uniform": "LOW < HIGH", "int": "whole numbers LOW < HIGH"}[kind]
        raise InputError(f"{key}: {kind}({inside}) is not allowed; allowed: {kind}(LOW, HIGH) with {numbers}")
    return Range(kind=kind, low=bounds[0], high=bounds[1])  # type: ignore[arg-type]


def _number(value: Any) -> float | None:
    """A number; YAML reads 1e-4 as a text."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _as_json(value: Any) -> str:
    number = _number(value) if isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value) else None
    return json.dumps(value if number is None else number, sort_keys=True)


def _evaluate(key: str, text: str, values: Mapping[str, Any]) -> float:
    """The value of an expression of dotted keys and numbers."""
    names: dict[str, str] = {}

    def rename(found: re.Match[str]) -> str:
        return names.setdefault(found.group(), f"_{len(names)}")

    def value_of(node: ast.AST) -> float:
        match node:
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
                return _OPERATORS[type(operation)](value_of(left), value_of(right))
            case ast.UnaryOp(operation, operand) if type(operation) in _OPERATORS:
                return _OPERATORS[type(operation)](value_of(operand))
            case ast.Constant(int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(name):
                known = keys[name]
                found = values.get(known)
                if isinstance(found, bool) or not isinstance(found, int | float):
                    raise InputError(f"{key}: tied({text}): {known} is not searched; allowed: {', '.join(values)}")
                return found
        raise ValueError(ast.dump(node))

    renamed = _KEY.sub(rename, text).replace("^", "**")
    keys = {placeholder: name for name, placeholder in names.items()}
    try:
        result = value_of(ast.parse(renamed, mode="eval").body)
        if isinstance(result, complex) or not math.isfinite(result):
            raise ValueError(result)
    except InputError:
        raise
    except (SyntaxError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{key}: tied({text}) is not allowed; allowed: + - * / ^ of searched settings and numbers, with a finite "
            "value"
        ) from error
    return result
