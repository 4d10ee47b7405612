"""What the commands' arguments have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number of 1 or more, as the type of an argument."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; allowed: a whole number, 1 or more")
    return number
