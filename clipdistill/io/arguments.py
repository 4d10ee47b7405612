"""What the commands' arguments have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number of 1 or more, as the type of an argument."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of 0 or more, as the type of an argument."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a whole number, {least} or more")
    return number
