"""Match the classes of a data set with those of a prompt set by their names, never by position alone.

    names of folders, a ClassLabel, a column, a classnames.txt ─ match_classes ─> index of each in the prompt set
    labels of samples: numbers, names ────────────────────────── ClassLabels ───> index in the prompt set

Two names are alike if they differ in case, in Unicode's compatible forms, or in their separators (blanks, ``_``, ``-``,
``/``). Names that are all whole numbers are class indices. Identifiers, such as WordNet's, are not looked up.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from clipdistill.errors import InputError

BY_ORDER_FLAG = "--labels-by-order"
"""The flag of the commands that takes classes in the order of both lists."""

OWN_LIST = "its classnames.txt"
"""A data set's own class list, in messages."""

BOOL_NAMES = ("False", "True")
"""Class names of a label that is a truth value."""

_SEPARATORS = re.compile(r"[\s_/\\|\-\u2010-\u2015\u2212]+")
_WHOLE_NUMBER = re.compile(r"([0-9]{1,18})(?:\.0{1,18})?")
_IDENTIFIER = re.compile(r"[0-9]+|n[0-9]{8}")
_LISTED = 3
_SHOWN = 60

log = logging.getLogger(__name__)


def normalise(name: str) -> str:
    """The form in which names are compared if they are not equal: "Map_Pin" and "map pin" have the same."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return _SEPARATORS.sub(" ", folded).strip() or folded


def whole_number(text: str) -> int | None:
    """The value of a text that is a whole number from 0, such as "7", "007" or "7.0"; None for any other."""
    found = _WHOLE_NUMBER.fullmatch(text.strip())
    return int(found[1]) if found else None


def are_numbers(names: Iterable[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(whole_number(name) is not None for name in names)


def are_identifiers(names: Iterable[str]) -> bool:
    """Whether all names are numbers or WordNet ids, which say nothing to a text tower."""
    return all(_IDENTIFIER.fullmatch(name) for name in names)


def in_class_order(names: Iterable[str]) -> list[str]:
    """The distinct names, sorted: as numbers if all are whole numbers, else as text."""
    distinct = sorted(set(names))
    return sorted(distinct, key=lambda name: whole_number(name) or 0) if are_numbers(distinct) else distinct


def match_classes(
    names: Sequence[str],
    known: Sequence[str],
    *,
    of: str,
    to: str,
    by_order: bool = False,
    flag: str = BY_ORDER_FLAG,
) -> tuple[int, ...]:
    """The index in ``known`` of each name.

    An equal name counts first, then one that is alike (`normalise`) if it is the only one. If none of the names is
    known and all are whole numbers, they are the indices. ``known`` may have more classes.

    Args:
        names: of a data set's classes.
        known: of the prompt set's classes.
        of: the data set, in messages.
        to: the prompt set, in messages.
        by_order: class i is class i of ``known``, whatever the names; one warning names the first that differ.
        flag: what sets ``by_order``, in messages.

    Raises:
        InputError: some names are not known (the differences of both sides are listed), two are one class, a number is
            out of range; or with ``by_order``, other numbers of classes.
    """
    if by_order:
        return _by_order(names, known, of=of, to=to, flag=flag)
    if list(names) == list(known):
        return tuple(range(len(names)))
    index = _NameIndex(known)
    found = [index.find(name) for name in names]
    if all(each is None for each in found) and are_numbers(names):
        found = [whole_number(name) for name in names]
        largest = max((each for each in found if each is not None), default=0)
        if largest >= len(known):
            raise InputError(
                f"{of}: class number {largest}; allowed: 0 to {len(known) - 1}, the classes of {to}"
                f"{_or_by_order(names, known, flag)}"
            )
    matched = [each for each in found if each is not None]
    if len(matched) < len(names):
        raise InputError(_differences(names, known, found, of=of, to=to, flag=flag))
    first: dict[int, str] = {}
    for name, each in zip(names, matched, strict=True):
        if each in first:
            raise InputError(
                f"{of}: classes {_shown(first[each])} and {_shown(name)} are both {_shown(known[each])} of {to}; "
                f"allowed: one class for each{_or_by_order(names, known, flag)}"
            )
        first[each] = name
    return tuple(matched)


def match_through(
    names: Sequence[str],
    own: Sequence[str] | None,
    known: Sequence[str] | None,
    *,
    of: str,
    to: str,
    by_order: bool = False,
    flag: str = BY_ORDER_FLAG,
) -> tuple[int, ...]:
    """The index in ``known`` of each name, which first stands for a class of the data set's own list, if there is one.

    Args:
        names: as for `match_classes`.
        own: class list of the data set; None: it has none.
        known: class names of the prompt set; None: those of the data set itself.
        of: as for `match_classes`.
        to: as for `match_classes`.
        by_order: as for `match_classes`; ``own`` then counts only if there is no ``known``.
        flag: as for `match_classes`.

    Raises:
        InputError: as `match_classes`.
    """
    if own is not None and known is None:
        return match_classes(names, own, of=of, to=OWN_LIST, by_order=by_order, flag=flag)
    if own is not None and not by_order:
        names = [own[number] for number in match_classes(names, own, of=of, to=OWN_LIST, flag=flag)]
    return match_classes(names, names if known is None else known, of=of, to=to, by_order=by_order, flag=flag)


class ClassLabels:
    """Reads labels of a data set: numbers, class names, truth values.

    Args:
        names: the classes of the data set, in the order of its numbers; None: unknown, all labels are numbers.
        indices: index of each class in the prompt set; None: the same list.
        texts_are_names: a text is never a number.

    Attributes:
        names: as above.
        indices: as above.
    """

    def __init__(
        self, names: Sequence[str] | None, indices: Sequence[int] | None = None, *, texts_are_names: bool = False
    ) -> None:
        self.names = None if names is None else tuple(names)
        self.indices = tuple(range(len(names or ())) if indices is None else indices)
        self._texts_are_names = texts_are_names
        self._index = _NameIndex(names or ())

    @property
    def allowed(self) -> str:
        """The labels that it can read, in words."""
        if self.names is None:
            return "an index from 0 (names need a list of the classes)"
        if self._texts_are_names:
            return f"one of {len(self.names)} class names, such as {_shown(self.names[0])}"
        return f"a class name or an index from 0 to {len(self.names) - 1}"

    def index(self, value: Any) -> int | None:
        """Index in the prompt set of a label, None if it is no class.

        A text is a name, or if none is alike, a whole number. A number must be whole; True and False are names.
        """
        if isinstance(value, str) or type(value).__name__ in ("bool", "bool_"):
            named = self.named(str(value).strip())
            if named is not None or self._texts_are_names or not isinstance(value, str):
                return named
            value = whole_number(value)
        elif not isinstance(value, Integral) and isinstance(value, Real) and float(value).is_integer():
            value = int(float(value))
        return self.numbered(int(value)) if isinstance(value, Integral) else None

    def numbered(self, number: int) -> int | None:
        """Index in the prompt set of a class number."""
        if self.names is None:
            return number if number >= 0 else None
        return self.indices[number] if 0 <= number < len(self.names) else None

    def named(self, name: str) -> int | None:
        """Index in the prompt set of a class name."""
        number = self._index.find(name)
        return None if number is None else self.indices[number]


class _NameIndex:
    """Finds a name in a list: equal, or else the only one that is alike."""

    def __init__(self, names: Sequence[str]) -> None:
        self._equal: dict[str, int | None] = {}
        self._alike: dict[str, int | None] = {}
        for number, name in enumerate(names):
            for table, key in ((self._equal, name), (self._alike, normalise(name))):
                table[key] = None if key in table else number

    def find(self, name: str) -> int | None:
        """Number of the name; None if there is none, or more than one."""
        return self._equal[name] if name in self._equal else self._alike.get(normalise(name))


def _by_order(names: Sequence[str], known: Sequence[str], *, of: str, to: str, flag: str) -> tuple[int, ...]:
    if len(names) != len(known):
        raise InputError(f"{of}: {len(names)} classes; allowed with {flag}: {len(known)}, as in {to}")
    pairs = [
        f"{_shown(name)} is {_shown(other)}"
        for name, other in zip(names, known, strict=True)
        if normalise(name) != normalise(other)
    ]
    if pairs and os.environ.get("RANK", "0") == "0":
        log.warning("%s: labels by order, not by name: in %s %s", of, to, _some(pairs))
    return tuple(range(len(names)))


def _differences(
    names: Sequence[str], known: Sequence[str], found: Sequence[int | None], *, of: str, to: str, flag: str
) -> str:
    """The message about names that are not known."""
    missing = [_shown(name) for name, each in zip(names, found, strict=True) if each is None]
    alike = set(map(normalise, known))
    twice = [_shown(name) for name, each in zip(names, found, strict=True) if each is None and normalise(name) in alike]
    several = f" ({_some(twice)}: more than one there)" if twice else ""
    used = {each for each in found if each is not None}
    unused = [_shown(name) for number, name in enumerate(known) if number not in used]
    rest = f"; of {to}, {len(unused)} are not in it: {_some(unused)}" if unused else ""
    return (
        f"{of}: {len(missing)} of its {len(names)} classes are not in {to}: {_some(missing)}{several}{rest}; "
        f"allowed: the same names (apart from case, blanks, _, - and /), numbers from 0 to {len(known) - 1}"
        f"{_or_by_order(names, known, flag)}"
    )


def _or_by_order(names: Sequence[str], known: Sequence[str], flag: str) -> str:
    if len(names) == len(known):
        return f", or {flag}: both lists in one order"
    return f" ({flag} needs equally many classes: {len(names)} and {len(known)})"


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more


def _shown(name: str) -> str:
    return repr(name if len(name) <= _SHOWN else name[: _SHOWN - 3] + "...")
