"""Packages that only some commands need."""

from importlib import import_module

from clipdistill.errors import InputError


def require(what: str, *packages: str, extra: str) -> None:
    """Check that packages can be imported.

    Args:
        what: needs them, for the message.
        packages: their import names.
        extra: of clipdistill, that installs them.

    Raises:
        InputError: one is missing.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            name = error.name or package
            raise InputError(f"{what}: {name} is not installed; allowed: pip install 'clipdistill[{extra}]'") from error
