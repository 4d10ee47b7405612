"""Class lists beside training shards: from the labels in a shard to the classes of the prompt set, by name.

FOLDER/classnames.txt, or that of the folder above ─ find_class_lists ─> ClassLists.of(shard) ─> ClassLabels
"""

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePath

from clipdistill.errors import InputError
from clipdistill.io.retries import may_pass, status_of
from clipdistill.io.urls import folder_of, one_line, read_small, shown
from clipdistill.models.class_matching import ClassLabels, match_classes
from clipdistill.models.prompts import CLASSNAMES_FILE, PromptSet, parse_classnames

log = logging.getLogger(__name__)

_MAX_BYTES = 64 << 20
_THREADS = 8
_DIGEST = 32
_ROOT = re.compile(r"[\w+.-]+://[^/]+")
_HUB_ROOT = re.compile(r"hf://(?:(?:datasets|spaces)/|(?!datasets/|spaces/))[^/]+/[^/]+")


@dataclass(frozen=True, kw_only=True)
class ClassLists:
    """Readers of the labels in shards."""

    prompts: ClassLabels
    """Of shards without a class list: their labels are numbers or names of the prompt set's classes."""
    of_folders: Mapping[str, ClassLabels] = field(default_factory=dict)
    """Of the shards in a folder with a class list."""

    def of(self, url: str) -> ClassLabels:
        """The reader of a shard's labels."""
        return self.of_folders.get(folder_of(url), self.prompts)

    def digests(self, urls: Sequence[str]) -> list[str]:
        """What each shard's labels stand for; the same wherever the shards and their lists are."""
        known: dict[int, str] = {}
        for each in (self.prompts, *self.of_folders.values()):
            if id(each) not in known:
                content = json.dumps([each.names, each.indices]).encode()
                known[id(each)] = hashlib.sha256(content).hexdigest()[:_DIGEST]
        return [known[id(self.of(url))] for url in urls]


def find_class_lists(urls: Sequence[str], prompts: PromptSet, *, by_order: bool = False) -> ClassLists:
    """Match the class lists beside shards with the prompts.

    Args:
        urls: the shards. A remote ``classnames.txt`` is not looked for where the URL is signed or chained.
        prompts: the prompt set of the run.
        by_order: match by order in place of names.

    Raises:
        InputError: a list has classes that the prompts lack, or cannot be read.
    """
    folders = sorted({folder_of(url) for url in urls if "?" not in url and "::" not in url})
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        found = list(pool.map(_find, folders))
    of_folders, matched = {}, {}
    for folder, (place, names) in zip(folders, found, strict=True):
        if not names:
            continue
        if place not in matched:
            indices = match_classes(
                names,
                prompts.classnames,
                of=f"data.shards: {shown(place)}",
                to=f"prompts {prompts.name}",
                by_order=by_order,
                flag="data.labels_by_order=true",
            )
            matched[place] = ClassLabels(names, indices)
        of_folders[folder] = matched[place]
    return ClassLists(prompts=ClassLabels(prompts.classnames), of_folders=of_folders)


def _find(folder: str) -> tuple[str, list[str]]:
    """The class list of the shards in a folder, with its place; empty if there is none."""
    for place in (folder, _parent(folder)):
        file = f"{place}/{CLASSNAMES_FILE}"
        content = None if place is None else _read(file)
        if content is not None:
            return file, parse_classnames(content, where=shown(file))
    return folder, []


def _read(file: str) -> bytes | None:
    """Content of a local or remote file; None if there is none, or no answer, which is logged."""
    try:
        return read_small(file, _MAX_BYTES)
    except Exception as error:  # every filesystem raises its own errors
        missing = status_of(error) in (None, 404, 410) and not may_pass(error)
        if isinstance(error, FileNotFoundError) and missing:
            return None
        if "://" not in file:
            raise InputError(f"data.shards: {file}: cannot be read: {one_line(error)}") from error
        log.warning(
            "%s: no answer, so labels are not compared with class names: %s", shown(file), one_line(error, file)
        )
        return None


def _parent(folder: str) -> str | None:
    """The folder above; None above the root of a bucket, host or repository."""
    if "://" not in folder:
        return str(PurePath(folder).parent)
    outer = folder.rpartition("/")[0]
    return outer if re.match(_HUB_ROOT if folder.startswith("hf://") else _ROOT, outer) else None
