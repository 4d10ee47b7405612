"""Paths of the files shipped with clipdistill: prompts, configs and the icons teacher's weights."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def resource(*parts: str) -> Path:
    """Path of a shipped file or folder, such as ``resource("prompts", "imagenet")``.

    In a wheel the top-level ``prompts/``, ``configs/`` and ``weights/`` folders are in ``clipdistill/resources``;
    in a checkout (editable install) they are next to the package.
    """
    packaged = _PACKAGE / "resources"
    root = packaged if packaged.is_dir() else _PACKAGE.parent
    return root.joinpath(*parts)
