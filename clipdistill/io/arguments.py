"""Argument types shared by the commands."""

import argparse


def positive(text: str) -> int:
    """Argument type: a whole number, 1 or more."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """Argument type: a whole number, 0 or more."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a whole number, {least} or more")
    return number
