"""Open a test set by folder, URL or Hub name.

folders of shards, local or remote ── shards.py ─┐
folders of class folders ──────────── images.py ─┼─> EvaluationSet (samples.py)
Hugging Face data sets ────────────── hub.py ────┘
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from clipdistill.distributed.collectives import rank
from clipdistill.errors import InputError
from clipdistill.evaluation.ranks import from_first_rank, with_shared_errors
from clipdistill.evaluation.sets.hub import Columns, holds_tables, is_dataset, open_dataset
from clipdistill.evaluation.sets.images import open_image_set
from clipdistill.evaluation.sets.samples import EvaluationSet
from clipdistill.evaluation.sets.shards import is_shard_set, open_shard_set
from clipdistill.evaluation.settings import EvaluationSettings
from clipdistill.io.image_folders import find_image_folder
from clipdistill.io.images import STANDARD_DECODING, DecodingSettings
from clipdistill.io.paths import expand
from clipdistill.models.class_counts import CLASS_COUNTS_FILE, OtherClassesError, load_class_counts
from clipdistill.models.prompts import load_prompts

log = logging.getLogger(__name__)

HUB = "hf-hub:"
"""Prefix of the name of a data set on the Hugging Face Hub."""

TRAIN_SPLIT = "train"
"""The split whose class counts count for the others of its folder."""

ALLOWED = (
    "a folder or URL in CLIP_benchmark's layout, a folder of tar files, a folder of class folders, a folder that the "
    "library datasets loads, or hf-hub:OWNER/NAME"
)


def open_set(
    location: str | Path,
    *,
    split: str = "test",
    prompts: str | None = None,
    by_order: bool = False,
    allow_duplicates: bool = False,
    columns: Columns | None = None,
    decoding: DecodingSettings = STANDARD_DECODING,
    class_counts: Path | None = None,
    cache: Path | None = None,
) -> EvaluationSet:
    """Open a test set; with several ranks, all call this together.

    Args:
        location: a folder or URL in CLIP_benchmark's layout, also as its page on the Hub
            (``https://huggingface.co/datasets/OWNER/NAME/tree/REVISION``); a folder of tar files alone, as img2dataset
            writes them; a folder of class folders, or one of splits of these; a folder that the library ``datasets``
            wrote or loads; or ``hf-hub:OWNER/NAME``.
        split: which split.
        prompts: prompt set, by name or folder, that replaces the set's own; the set's classes, if they have names, are
            matched with it by name (`clipdistill.models.class_matching`).
        by_order: match the set's classes by their order in place of their names.
        allow_duplicates: accept a class list that names a class twice.
        columns: of a Hugging Face data set.
        decoding: of the images.
        class_counts: file of the training samples of each class, or a folder with ``class_counts.json``; None: that in
            the training split of a local folder, if there is one, and it has the classes of the prompts.
        cache: folder for indexes and copies of remote shards; None: neither is cached.

    Raises:
        InputError: on every rank: no such set or split, a missing or damaged part, a bad class list, classes that are
            not among the prompts', or class counts of other classes.
    """
    opened = _open_set(
        location,
        split=split,
        prompts=prompts,
        by_order=by_order,
        allow_duplicates=allow_duplicates,
        columns=columns,
        cache=cache,
    )
    opened = replace(opened, decoding=decoding)
    if class_counts is not None:
        return _with_counts(opened, class_counts, by_order=by_order)
    return _with_counts_beside(opened, location, split=split, by_order=by_order)


def _with_counts(data: EvaluationSet, place: Path | None, *, by_order: bool = False) -> EvaluationSet:
    """A set for classification with the class counts in a file or folder; others, and without a place, as they are.

    Raises:
        InputError: as ``load_class_counts``.
    """
    if place is None or data.kind != "classification":
        return data
    load = partial(load_class_counts, place, data.prompts.classnames, of=f"data {data.name}", by_order=by_order)
    return replace(data, class_counts=with_shared_errors(load))


def _with_counts_beside(
    data: EvaluationSet, location: str | Path, *, split: str, by_order: bool = False
) -> EvaluationSet:
    """A set with the class counts in the training split of its local folder, if there are any and they fit."""
    beside = Path(location) / TRAIN_SPLIT
    found = from_first_rank(lambda: split != TRAIN_SPLIT and (beside / CLASS_COUNTS_FILE).is_file())
    try:
        return _with_counts(data, beside if found else None, by_order=by_order)
    except OtherClassesError as error:
        _warn_left_out(error)
        return data


def _warn_left_out(error: OtherClassesError) -> None:
    if rank() == 0:
        log.warning("%s: the accuracy of frequent and rare classes is left out", error)


def _open_set(
    location: str | Path,
    *,
    split: str,
    prompts: str | None = None,
    by_order: bool = False,
    allow_duplicates: bool,
    columns: Columns | None = None,
    cache: Path | None,
) -> EvaluationSet:
    text = str(location)
    load = partial(load_prompts, allow_duplicates=allow_duplicates)
    chosen_prompts = load(prompts) if prompts else None
    folder = Path(text)
    if "://" in text or is_shard_set(folder, split):
        return open_shard_set(
            text, split=split, prompts=chosen_prompts, by_order=by_order, load_prompts=load, cache=cache
        )

    open_table = partial(open_dataset, split=split, prompts=chosen_prompts, by_order=by_order, columns=columns)

    def open_local() -> EvaluationSet:
        if text.startswith(HUB):
            repository = text.removeprefix(HUB)
            name = repository.rpartition("/")[2]
            return open_table(repository, name=name)
        if not folder.is_dir():
            raise InputError(f"data {folder}: no such folder; allowed: {ALLOWED}")
        name = folder.resolve().name
        if not holds_tables(folder) and (found := find_image_folder(folder, split=split)) is not None:
            return open_image_set(
                found, name=name, prompts=chosen_prompts, by_order=by_order, allow_duplicates=allow_duplicates
            )
        if is_dataset(folder):
            return open_table(text, name=name)
        if splits := ", ".join(sorted(path.parent.name for path in folder.glob("*/nshards.txt"))):
            raise InputError(f"data {folder}: no {split}/nshards.txt; allowed: a split that is there: {splits}")
        raise InputError(f"data {folder}: no {split}/nshards.txt, class folders or data files; allowed: {ALLOWED}")

    return with_shared_errors(open_local)


def open_sets(
    folders: Sequence[str], settings: EvaluationSettings, *, cache: Path, counts_must_fit: bool = True
) -> list[EvaluationSet]:
    """Open sets with the settings of a run's evaluation, whatever its own folders.

    Args:
        folders: the sets.
        settings: of the evaluation. Its class counts go to the sets with their classes.
        cache: folder for indexes and copies of remote shards.
        counts_must_fit: at least one set must have them.

    Raises:
        InputError: as ``open_set``; the class counts fit no set.
    """
    counts = expand(settings.class_counts) if settings.class_counts else None
    sets: list[EvaluationSet] = []
    misfits: list[OtherClassesError] = []
    for folder in folders:
        opened = _open_set(folder, split=settings.split, allow_duplicates=settings.allow_duplicate_classes, cache=cache)
        opened = replace(opened, decoding=settings.images)
        try:
            counted = _with_counts(opened, counts)
        except OtherClassesError as error:
            misfits.append(error)
            counted = opened
        fits = counted.class_counts is not None
        sets.append(counted if fits else _with_counts_beside(opened, folder, split=settings.split))
    if misfits and len(misfits) == len(sets) and counts_must_fit:
        raise misfits[0]
    for misfit in misfits:
        _warn_left_out(misfit)
    return sets


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
