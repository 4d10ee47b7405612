"""Argument types shared by the commands, and a parser whose errors are one line."""

import argparse
import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from clipdistill.errors import InputError
from clipdistill.io.paths import local_path
from clipdistill.io.urls import shown_text

MOST = 2**31 - 1
_SHOWN = 60


class Parser(argparse.ArgumentParser):
    """Takes a command's ``KEY=VALUE`` arguments before, between and after its options, where argparse takes only those
    that stand together. Ends with exit code 2 and one line for wrong arguments."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; all overrides are in ``overrides``, in their order."""
        found, rest = self.parse_known_args(args, namespace)
        strange = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(found, "overrides")]
        if strange:
            self.error(f"unrecognized arguments: {' '.join(strange)}")
        if rest:
            found.overrides = [*found.overrides, *rest]
        return found

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit."""
        line = " ".join(shown_text(message).split())
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """Argument type: a whole number, 1 or more."""
    return _whole(1, text)


def not_negative(text: str) -> int:
    """Argument type: a whole number, 0 or more."""
    return _whole(0, text)


def positive_number(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not allowed; allowed: a finite number above 0")
    return number


def radius(text: str) -> Fraction:
    """Argument type: a number in (0, 1], also as a quotient such as 4/255, exactly."""
    try:
        number = Fraction(text.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(
            f"{_short(text)} is not allowed; allowed: a number in (0, 1], or a quotient such as 4/255"
        )
    return number


def path(text: str) -> Path:
    """Argument type: a path, with ``~`` replaced by the home folder."""
    try:
        return local_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _whole(least: int, text: str) -> int:
    try:
        number = int(text) if text.isascii() else -1
    except ValueError:
        number = -1
    if not least <= number <= MOST:
        most = f", at most {MOST}" if number > MOST else ""
        raise argparse.ArgumentTypeError(
            f"{_short(text)} is not allowed; allowed: a whole number, {least} or more{most}"
        )
    return number


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
