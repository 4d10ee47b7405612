"""Comparing two records of what something was made of, by content: plain dicts and lists, as in JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_DIGEST = 12
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference between two records.

    Attributes:
        part: its dotted path.
        then: what the earlier record has, as short text.
        now: what the later one has.
    """

    part: str
    then: str
    now: str


def first_difference(then: Any, now: Any, part: str = "") -> Difference | None:
    """The first difference between two records, None if they are equal.

    A key that only one of them has counts as one, unless it is empty (None): a version that adds a setting, empty by
    default, leaves earlier records as they are.
    """
    if then == now:
        return None
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in [*then, *(key for key in now if key not in then)]:
            path = f"{part}.{key}" if part else str(key)
            if then.get(key) is None and now.get(key) is None:
                continue
            if key not in then or key not in now:
                return Difference(part=path, then=_short(then.get(key)), now=_short(now.get(key)))
            if found := first_difference(then[key], now[key], path):
                return found
        return None
    if _is_list(then) and _is_list(now):
        if len(then) != len(now):
            return Difference(part=part, then=_entries(then, now), now=_entries(now, then))
        pairs = enumerate(zip(then, now, strict=True))
        found_items = (first_difference(before, after, f"{part}.{number}") for number, (before, after) in pairs)
        return next((found for found in found_items if found), None)
    return Difference(part=part, then=_short(then), now=_short(now))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _entries(mine: Sequence[Any], others: Sequence[Any]) -> str:
    """A list of another length: its length, and its first item that differs."""
    at = next((at for at, item in enumerate(mine) if at >= len(others) or item != others[at]), None)
    return f"{len(mine)} entries" + (f", number {at} is {_short(mine[at])}" if at is not None else "")


def _short(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) and len(value) >= 2 * _DIGEST and set(value) <= set("0123456789abcdef"):
        return f"digest {value[:_DIGEST]}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
