"""Results of a comparison from which images each run got right; and one comparison from the results of its parts.

The arms of a file may run in parts, on several machines or one after the other (``clipdistill compare ARMS.yaml --only
ARM,...``). What each part leaves in ``results.json`` suffices to compare all arms, pair by pair.

Shapes: S seeds, N test images.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipdistill.compare.arms import check_seeds, pairs_of
from clipdistill.compare.statistics import Comparison, best_p, compare_pair, holm
from clipdistill.errors import InputError
from clipdistill.io.identity import first_difference

Correct = NDArray[np.bool_]
Images = NDArray[np.bool_]

PLAIN_MEASURE = "zero-shot top-1"
"""What is compared, unless the evaluation attacks the images."""

_COMMON = ("test", "validation", "shards", "shared", "seeds")
"""What parts have to agree in; those with teachers in these, too."""


def compare_arms(
    correct: Mapping[str, Correct], pairs: Sequence[tuple[str, str]], shots: Mapping[str, Images]
) -> list[dict[str, Any]]:
    """The comparisons of pairs of arms, corrected for their number; and of each pair on each shot, not corrected.

    Args:
        correct: of each arm, whether each run is right about each image (S, N).
        pairs: names of arms.
        shots: which images are of frequent or rare classes (N,), by the name of the shot.
    """
    found = [compare_pair(correct[one], correct[other]) for one, other in pairs]
    adjusted = holm([max(pair.p_seeds, pair.p_images) for pair in found])
    found = [replace(pair, adjusted=value) for pair, value in zip(found, adjusted, strict=True)]
    return [
        {
            "arm": one,
            "against": other,
            **asdict(pair),
            "shown": pair.is_shown,
            "claim": claim(one, other, pair),
            "shots": {
                shot: _uncorrected(compare_pair(correct[one][:, among_N], correct[other][:, among_N]))
                for shot, among_N in shots.items()
            },
        }
        for (one, other), pair in zip(pairs, found, strict=True)
    ]


def _uncorrected(pair: Comparison) -> dict[str, Any]:
    return {name: value for name, value in asdict(pair).items() if name != "adjusted"}


def accuracy_by_shot(correct_SN: Correct, shots: Mapping[str, Images]) -> dict[str, list[float]]:
    """Accuracy of each run on the images of each shot."""
    return {shot: correct_SN[:, among_N].mean(1).tolist() for shot, among_N in shots.items()}


def claim(arm: str, other: str, pair: Comparison) -> str:
    """What a comparison shows, in words."""
    better, worse = (arm, other) if pair.difference >= 0 else (other, arm)
    low, high = (pair.low, pair.high) if pair.difference >= 0 else (-pair.high, -pair.low)
    points = f"{abs(pair.difference) * 100:.2f} points [{low * 100:+.2f}, {high * 100:+.2f}]"
    tests = f"p = {pair.p_seeds:.3f} over seeds, {pair.p_images:.3g} over images, {pair.adjusted:.3f} corrected"
    if pair.is_shown:
        return f"{better} beats {worse} by {points}; {tests}"
    return f"no difference between {arm} and {other} is shown: {better} is {points} above {worse}; {tests}"


def command_line() -> str:
    """The command that is running, without the folder of its program."""
    program = Path(sys.argv[0]).name
    return " ".join(["clipdistill" if program == "__main__.py" else program, *sys.argv[1:]])


def pack(correct_SN: Correct) -> list[str]:
    """A text for each seed: a bit for each image, eight of them a byte, in hexadecimal digits."""
    return [np.packbits(correct_N).tobytes().hex() for correct_N in correct_SN]


def unpack(texts_S: Sequence[str], images: int) -> Correct:
    """The opposite of ``pack``: whether each run is right about each image (S, N).

    Raises:
        ValueError: a text is none of so many images.
    """
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) for text in texts_S]
    if any(not images <= len(row) < images + 8 for row in rows):
        raise ValueError(f"bits of another number of images than {images}")
    return np.stack([row[:images].astype(bool) for row in rows])


def combine(parts: Mapping[str, dict[str, Any]], *, against: str = "") -> dict[str, Any]:
    """One comparison of the arms of several results.

    Args:
        parts: contents of ``results.json``, by the names of the files.
        against: arm with which all others are compared; empty: as the first part states.

    Returns:
        Results, as of a comparison of all arms in one call.

    Raises:
        InputError: no results of a comparison; they differ in test sets, validation sets, training shards, teachers,
            seeds or shared settings; or two state one arm.
    """
    first = next(iter(parts.values()))
    measures = {part.get("measure", PLAIN_MEASURE) for part in parts.values() if isinstance(part, dict)}
    if len(measures) > 1:
        raise InputError(f"results: of different measures: {', '.join(sorted(measures))}; allowed: parts of one call")
    taught = next((part for part in parts.values() if isinstance(part, dict) and part.get("teachers")), first)
    arms: dict[str, Any] = {}
    correct: dict[str, Correct] = {}
    for name, part in parts.items():
        try:
            other, keys = (taught, (*_COMMON, "teachers")) if part["teachers"] else (first, _COMMON)
            found = first_difference({key: other[key] for key in keys}, {key: part[key] for key in keys})
            images = sum(data["images"] for data in part["test"])
            read = {arm: unpack(of_arm["correct"], images) for arm, of_arm in part["arms"].items()}
            if any(len(correct_SN) != len(part["seeds"]) for correct_SN in read.values()):
                raise ValueError("an arm has another number of runs than seeds")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{name}: no results of `clipdistill compare` of this version: {error}") from error
        if found is not None:
            raise InputError(
                f"{name}: {found.part} is {found.now}, but {found.then} in another file; allowed: parts of one call"
            )
        twice = [arm for arm in read if arm in arms]
        if twice:
            raise InputError(f"{name}: arm {twice[0]} is in another file too; allowed: one result of each arm")
        arms |= part["arms"]
        correct |= read
    against = against or first["against"]
    if against and against not in arms:
        raise InputError(f"against: {against!r} is not allowed; allowed: {', '.join(arms)}")
    pairs = pairs_of(list(arms), against)
    check_seeds(len(first["seeds"]), len(pairs))
    images = sum(data["images"] for data in first["test"])
    shots = {shot: unpack([bits], images)[0] for shot, bits in first.get("shots", {}).items()}
    power = {
        key: value for key, value in first["power"].items() if key in ("seeds", "test_images", "validation_images")
    }
    return {
        **first,
        "command": command_line(),
        "machine": ", ".join(dict.fromkeys(part["machine"] for part in parts.values())),
        "teachers": taught["teachers"],
        "teacher": taught["teacher"],
        "against": against,
        "power": power | {"comparisons": len(pairs), "best_p": best_p(len(first["seeds"]), len(pairs))},
        "arms": arms,
        "comparisons": compare_arms(correct, pairs, shots),
    }
