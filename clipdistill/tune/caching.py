"""The teacher cache that the runs of a search share."""

import logging
import time
from pathlib import Path
from typing import Any

from clipdistill.config import Config
from clipdistill.io.lock import InUseError
from clipdistill.training.cache_command import build_cache
from clipdistill.tune.space import Space

log = logging.getLogger(__name__)

_CONTENT = ("data", "student", "teachers", "teacher_cache", "prompts")
"""Parts of a config on which the content of a teacher cache may depend."""


def cache_settings(config: Config, space: Space, *, folder: Path, views: int) -> dict[str, Any]:
    """The settings with which all runs of a search train from one teacher cache; empty where they cannot, or where the
    config has a cache already.

    Args:
        config: of the search.
        space: what is searched.
        folder: of the cache.
        views: stored augmentations of each image, unless the config states their number.
    """
    if not config.teachers or config.teacher_cache.folder:
        return {}
    changes = [key for key in space.dimensions if key.split(".")[0] in _CONTENT or key == "objective"]
    if changes:
        log.warning("no teacher cache: %s changes what it would hold", changes[0])
        return {}
    return {"data.views": config.data.views or views, "teacher_cache.folder": str(folder)}


def complete_cache(config: Config) -> None:
    """Build what the teacher cache of a config lacks, if it has one; another process may be doing so."""
    complete = not config.teacher_cache.folder
    while not complete:
        try:
            build_cache(config)
            complete = True
        except InUseError:
            time.sleep(1.0)
