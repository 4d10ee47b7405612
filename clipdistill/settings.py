"""Base of all settings: typed, immutable, validated on construction, with one-line error messages.

A component declares its settings in a subclass of ``Settings`` in the same file or folder: defaults, bounds as field
types, a docstring with units under each field. ``clipdistill.config`` composes them into the configuration of a run.
"""

import difflib
from collections.abc import Iterator, Sequence
from fractions import Fraction as Quotient
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic_core import ErrorDetails

from clipdistill.errors import InputError
from clipdistill.io.paths import local_path

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


def _quotient(value: Any) -> Any:
    """A number, of a text such as ``2/255``; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return float(Quotient(value.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return value


Radius = Annotated[Positive, BeforeValidator(_quotient)]
"""Radius of a ball around an image with pixels from 0 to 1; also as a quotient: 4/255."""


def check_radius(value: float, info: ValidationInfo) -> float:
    """Validator of a radius beside a field ``norm``: in the L-inf norm, at most the range of a pixel."""
    if info.data.get("norm") == "linf" and value > 1:
        raise ValueError("in (0, 1], or a quotient such as 4/255")
    return value


def _expanded(text: str) -> str:
    try:
        return str(local_path(text)) if text else text
    except InputError as error:
        raise ValueError("a path of names that a file system takes") from error


LocalPath = Annotated[str, AfterValidator(_expanded)]
"""A path on this machine, with ``~`` replaced by the home folder; or empty."""

_MOST_SHOWN = 80

T = TypeVar("T", bound="Settings")


class Settings(BaseModel):
    """Immutable settings: unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def union_of(models: tuple[type[Settings], ...], tag: str, *, default: str | None = None) -> Any:
    """The type of a field that holds one of several settings, discriminated by their field ``tag``.

    Args:
        models: each with a Literal field ``tag``.
        tag: the field's name.
        default: the field's value if it is not given.
    """
    union: Any = Annotated[Union[models], Field(discriminator=tag)] if len(models) > 1 else models[0]  # noqa: UP007
    if default is None:
        return union
    add_default = BeforeValidator(lambda value: {tag: default, **value} if isinstance(value, dict) else value)
    return Annotated[union, add_default]


def attributes_of(model: type[Settings]) -> dict[Any, str]:
    """The attributes of settings, by their names in a config."""
    return {field.alias or name: name for name, field in model.model_fields.items()}


def differences(settings: Settings) -> dict[str, Any]:
    """What differs from the defaults, as plain values from which the settings can be built again."""
    stated: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        is_tag = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        default = field.default if field.default_factory is None else field.default_factory()  # type: ignore[call-arg]
        if is_tag or field.is_required() or value != default:
            stated[field.alias or name] = _plain(value)
    return stated


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return differences(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raise InputError with field, value and what is allowed, unless ``ok``."""
    if not ok:
        raise InputError(f"{name}: {value!r} is not allowed; allowed: {allowed}")


def validate(settings: type[T], values: Any, *, at: str = "", source: Any = None) -> T:
    """Build settings from plain values.

    Args:
        settings: their type, or a ``union_of`` types.
        values: a mapping.
        at: their path, for messages.
        source: the same values as texts, as the user wrote them. A field that is a text takes its text from there: YAML
            reads ``2024_05_01``, ``007``, ``on`` and ``12:30`` as something else.

    Raises:
        InputError: names, in one line, the first invalid value: an unknown key (with the nearest valid one), a missing
            one, a wrong type, a value out of range.
    """
    adapter = TypeAdapter(settings)
    try:
        try:
            return adapter.validate_python(values)
        except ValidationError as error:
            places = [_resolve(settings, each["loc"])[2] for each in error.errors() if each["type"] == "string_type"]
            texts = {tuple(place): text for place in places if (text := _find_text(source, place)) is not None}
            if not texts:
                raise
            return adapter.validate_python(_replace(values, texts))
    except ValidationError as error:
        message = _describe(settings, error.errors(include_url=False)[0])
        raise InputError(_join(at, message)) from error


def _find_text(source: Any, path: Sequence[str | int]) -> str | None:
    """The text at a path, if there is one."""
    for part in path:
        if isinstance(source, dict):
            source = source.get(part)
        else:
            source = source[part] if isinstance(source, list) and isinstance(part, int) and part < len(source) else None
    return source if isinstance(source, str) else None


def _replace(values: Any, texts: dict[tuple[str | int, ...], str], path: tuple[str | int, ...] = ()) -> Any:
    """The values, with those at some paths replaced."""
    if path in texts and isinstance(values, bool | int | float):
        return texts[path]
    if isinstance(values, dict):
        return {name: _replace(value, texts, (*path, name)) for name, value in values.items()}
    if isinstance(values, list):
        return [_replace(value, texts, (*path, number)) for number, value in enumerate(values)]
    return values


def _describe(settings: type[Settings], error: ErrorDetails) -> str:
    """One-line message of a pydantic error."""
    model, field, path = _resolve(settings, error["loc"])
    name = ".".join(map(str, path))
    value = _Shown(error["input"])
    match error["type"]:
        case "extra_forbidden":
            valid = list(attributes_of(model))
            key = str(error["loc"][-1])
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
            hint = f"nearest valid key: {near[0]}; " if near else ""
            return f"{name}: unknown config key; {hint}allowed here: {', '.join(valid)}"
        case "missing":
            return f"{name}: no value; it must be stated"
        case "union_tag_not_found":
            return f"{_join(name, _tag_name(error))}: no value; it must be stated"
        case "union_tag_invalid":
            tag = _tag_name(error)
            allowed = error["ctx"]["expected_tags"].replace("'", "")
            return f"{_join(name, tag)}: {_Shown(error['input'][tag])!r} is not allowed; allowed: {allowed}"
        case "value_error":
            cause = error["ctx"]["error"]
            return (
                str(cause) if isinstance(cause, InputError) else f"{name}: {value!r} is not allowed; allowed: {cause}"
            )
        case "string_pattern_mismatch":
            return f"{name}: {value!r} is not allowed; allowed: text that matches {error['ctx']['pattern']}"
    return f"{name}: {value!r} is not allowed; allowed: {describe_type(field, error)}"


class _Shown:
    """A value, whose representation is short."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        try:
            text = repr(self._value)
        except ValueError:  # thousands of digits
            text = "a number of thousands of digits"
        return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _join(path: str, rest: str) -> str:
    return f"{path}.{rest}" if path else rest


def _tag_name(error: ErrorDetails) -> str:
    return str(error["ctx"]["discriminator"]).strip("'")


def _resolve(settings: type[Settings], loc: Sequence[str | int]) -> tuple[type[Settings], Any, list[str | int]]:
    """The model and the type of the field with an error, and the field's path without the tags of unions."""
    model: type[Settings] = settings
    annotation: Any = settings
    path: list[str | int] = []
    for part in loc:
        options = list(_models(annotation))
        tagged = next((option for option in options if part in _tags(option)), None)
        if len(options) > 1 and tagged is not None:
            annotation = tagged
            continue
        path.append(part)
        if isinstance(part, int):
            arguments = [each for each in get_args(_strip(annotation)) if each is not Ellipsis]
            annotation = arguments[min(part, len(arguments) - 1)] if arguments else Any
        elif options and part in (attributes := attributes_of(options[0])):
            model = options[0]
            field = model.model_fields[attributes[part]]
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        elif options:
            model, annotation = options[0], Any
    return model, annotation, path


def _models(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes that a type allows."""
    annotation = _strip(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    elif get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        for option in get_args(annotation):
            yield from _models(option)


def _tags(model: type[Settings]) -> list[Any]:
    return [
        value for field in model.model_fields.values() if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
    ]  # fmt: skip


def _strip(annotation: Any) -> Any:
    """A type without its metadata, and without ``| None``."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    options = [option for option in get_args(annotation) if option is not type(None)]
    if type(None) in get_args(annotation) and len(options) == 1:
        return _strip(options[0])
    return annotation


_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list"}


def describe_type(annotation: Any, error: ErrorDetails | None = None) -> str:
    """Description of the values that a field allows."""
    empty = " or empty" if type(None) in get_args(_outer(annotation)) else ""
    stripped = _strip(annotation)
    if get_origin(stripped) is Literal:
        return ", ".join(map(str, get_args(stripped))) + empty
    bounds = _bounds(annotation)
    if bounds and (error is None or not error["type"].endswith(("_parsing", "_type", "_from_float"))):
        return bounds + empty
    kind = get_origin(stripped) or stripped
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with {', '.join(kind.model_fields)}"
    if list(_models(annotation)):
        return "a mapping"
    if kind is tuple:
        return f"a list of {len(get_args(stripped))} numbers{empty}"
    words = _KINDS.get(kind, error["msg"] if error else str(kind))
    return f"{words}{', ' + bounds if bounds else ''}{empty}"


def _outer(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _bounds(annotation: Any) -> str:
    """The range of a number, such as ``> 0`` or ``0 to 1``; empty if there is none."""
    low: tuple[str, Any] | None = None
    high: tuple[str, Any] | None = None
    for part in _metadata(annotation):
        match part:
            case Gt(gt=value):
                low = (">", value)
            case Ge(ge=value):
                low = (">=", value)
            case Lt(lt=value):
                high = ("<", value)
            case Le(le=value):
                high = ("<=", value)
    if low and high:
        if (low[0], high[0]) == (">=", "<="):
            return f"{low[1]} to {high[1]}"
        return f"in {'(' if low[0] == '>' else '['}{low[1]}, {high[1]}{')' if high[0] == '<' else ']'}"
    return " ".join(str(part) for bound in (low, high) if bound for part in bound)


def _metadata(annotation: Any) -> Iterator[Any]:
    """All annotations of a type, including those inside ``| None``."""
    for part in getattr(annotation, "__metadata__", ()):
        yield from getattr(part, "metadata", None) or [part]
    for inner in get_args(annotation):
        if get_origin(inner) is Annotated or get_origin(annotation) is Annotated:
            yield from _metadata(inner)
