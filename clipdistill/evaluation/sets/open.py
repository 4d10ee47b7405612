"""Open a test set by folder, URL or Hub name.

folders of shards, local or remote ── shards.py ─┐
folders of class folders ──────────── images.py ─┼─> EvaluationSet (samples.py)
Hugging Face data sets ────────────── hub.py ────┘
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.evaluation.ranks import with_shared_errors
from clipdistill.evaluation.sets.hub import Columns, is_dataset, open_dataset
from clipdistill.evaluation.sets.images import find_class_folders, open_image_set
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.evaluation.sets.shards import is_shard_set, open_shard_set
from clipdistill.io.images import STANDARD_DECODING, DecodingSettings
from clipdistill.models.prompts import load_prompts

HUB = "hf-hub:"
"""Prefix of the name of a data set on the Hugging Face Hub."""

ALLOWED = (
    "a folder or URL in CLIP_benchmark's layout, a folder of class folders, a folder that the library datasets loads, "
    "or hf-hub:OWNER/NAME"
)


def open_set(
    location: str | Path,
    *,
    split: str = "test",
    prompts: str | None = None,
    allow_duplicates: bool = False,
    columns: Columns | None = None,
    decoding: DecodingSettings = STANDARD_DECODING,
    cache: Path | None = None,
) -> EvaluationSet:
    """Open a test set; with several ranks, all call this together.

    Args:
        location: a folder or URL in CLIP_benchmark's layout, also as its page on the Hub
            (``https://huggingface.co/datasets/OWNER/NAME/tree/REVISION``); a folder of class folders, or one of splits
            of these; a folder that the library ``datasets`` wrote or loads; or ``hf-hub:OWNER/NAME``.
        split: which split.
        prompts: prompt set, by name or folder, that replaces the set's own.
        allow_duplicates: accept a class list that names a class twice.
        columns: of a Hugging Face data set.
        decoding: of the images.
        cache: folder for indexes and copies of remote shards; None: neither is cached.

    Raises:
        InputError: on every rank: no such set, a missing or damaged part, or a bad class list.
    """
    opened = _open_set(
        location, split=split, prompts=prompts, allow_duplicates=allow_duplicates, columns=columns, cache=cache
    )
    return replace(opened, decoding=decoding)


def _open_set(
    location: str | Path,
    *,
    split: str,
    prompts: str | None,
    allow_duplicates: bool,
    columns: Columns | None,
    cache: Path | None,
) -> EvaluationSet:
    text = str(location)
    load = partial(load_prompts, allow_duplicates=allow_duplicates)
    chosen_prompts = load(prompts) if prompts else None
    folder = Path(text)
    if "://" in text or is_shard_set(folder, split):
        return open_shard_set(text, split=split, prompts=chosen_prompts, load_prompts=load, cache=cache)

    def open_local() -> EvaluationSet:
        if text.startswith(HUB):
            repository = text.removeprefix(HUB)
            name = repository.rpartition("/")[2]
            return open_dataset(repository, split=split, name=name, prompts=chosen_prompts, columns=columns)
        if not folder.is_dir():
            raise InputError(f"data {folder}: no such folder; allowed: {ALLOWED}")
        name = folder.resolve().name
        if classes := find_class_folders(folder / split) or find_class_folders(folder):
            return open_image_set(classes, name=name, prompts=chosen_prompts)
        if is_dataset(folder):
            return open_dataset(text, split=split, name=name, prompts=chosen_prompts, columns=columns)
        raise InputError(f"data {folder}: no {split}/nshards.txt, class folders or data files; allowed: {ALLOWED}")

    return with_shared_errors(open_local)


def load_classification_set(
    folder: str | Path, *, split: str = "test", prompts: str | None = None, allow_duplicates: bool = False
) -> EvaluationSet:
    """Open a set with class names, as ``open_set`` does.

    Raises:
        InputError: as ``open_set``; for a retrieval set.
    """
    data = open_set(folder, split=split, prompts=prompts, allow_duplicates=allow_duplicates)
    if data.kind == "retrieval":
        raise InputError(f"data {folder}: a retrieval set; allowed: a set with class names")
    return data
