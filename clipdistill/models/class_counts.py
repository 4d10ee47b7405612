"""Samples of each class, ``class_counts.json``: ``clipdistill shards`` writes it beside the shards of each split.

    [["airplane", 500], ["bird", 5], ...]     in class order; an object {"airplane": 500, ...} is read too

Counts go to classes by name. Shots are those of Liu et al. 2019 (Large-scale long-tailed recognition in an open world,
arXiv 1904.05160): many, more than 100 training samples; medium, 20 to 100; few, less than 20.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from clipdistill.errors import InputError
from clipdistill.io.paths import read_text
from clipdistill.models.class_matching import match_classes

CLASS_COUNTS_FILE = "class_counts.json"

Shot = Literal["many", "medium", "few"]
SHOTS: Sequence[Shot] = ("many", "medium", "few")

_MOST_FEW, _MOST_MEDIUM = 19, 100
_ALLOWED = 'pairs of a class name and a number of samples, such as [["cat", 12], ["dog", 5]]'


class OtherClassesError(InputError):
    """Class counts are those of other classes."""


def shot_of(samples: int) -> Shot:
    """The group of a class of so many training samples."""
    if samples > _MOST_MEDIUM:
        return "many"
    return "medium" if samples > _MOST_FEW else "few"


def as_json(classnames: Sequence[str], counts: Sequence[int]) -> str:
    """Content of the file; a class a line."""
    pairs = [json.dumps([name, count], ensure_ascii=False) for name, count in zip(classnames, counts, strict=True)]
    return "[\n" + ",\n".join(pairs) + "\n]\n"


def load_class_counts(place: Path, classnames: Sequence[str], *, of: str, by_order: bool = False) -> tuple[int, ...]:
    """Training samples of each class, in the order of ``classnames``.

    Args:
        place: the file, or the folder with it.
        classnames: of the test set or prompts.
        of: what the classes are those of, in messages.
        by_order: match the classes by their order.

    Raises:
        InputError: the file cannot be read, or is malformed.
        OtherClassesError: it has other classes.
    """
    is_folder = os.path.isdir(place)  # noqa: PTH112 (Path.is_dir raises where it may not look)
    file = place / CLASS_COUNTS_FILE if is_folder else place
    text = read_text(file, what="class counts")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"class counts {file}: not JSON: {str(error)[:80]}; allowed: {_ALLOWED}") from error
    names, counts = _pairs(content, file)
    try:
        indices = match_classes(names, classnames, of=f"class counts {file}", to=of, by_order=by_order)
    except InputError as error:
        raise OtherClassesError(str(error)) from error
    if len(indices) < len(classnames):
        missing = sorted(set(range(len(classnames))) - set(indices))
        raise OtherClassesError(
            f"class counts {file}: none for {len(missing)} classes of {of}, such as {classnames[missing[0]]!r}; "
            "allowed: a number for each class, 0 for one without training samples"
        )
    by_class = dict(zip(indices, counts, strict=True))
    return tuple(by_class[number] for number in range(len(classnames)))


def _pairs(content: Any, file: Path) -> tuple[list[str], list[int]]:
    pairs = list(content.items()) if isinstance(content, Mapping) else content
    good = isinstance(pairs, list) and bool(pairs)
    for pair in pairs if good else ():
        two = isinstance(pair, list | tuple) and len(pair) == 2
        if not two or not isinstance(pair[0], str) or type(pair[1]) is not int or pair[1] < 0:
            raise InputError(f"class counts {file}: {pair!r:.60}; allowed: {_ALLOWED}")
    if not good:
        raise InputError(f"class counts {file}: {content!r:.60}; allowed: {_ALLOWED}")
    return [name for name, _ in pairs], [count for _, count in pairs]
