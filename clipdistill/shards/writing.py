"""Write samples as WebDataset shards, alone or as a CLIP_benchmark test set.

File names follow CLIP_benchmark, which can evaluate on every folder written here. Shards are written into a temporary
folder beside the target, which is renamed when complete: an error or a kill never leaves a partial data set.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.files import check_new, new_folder
from clipdistill.models.class_counts import CLASS_COUNTS_FILE, as_json
from clipdistill.models.prompts import CLASSNAMES_FILE, PLACEHOLDER, TEMPLATE_FILES

WRITTEN_EXTENSIONS = ("jpg", "png", "webp")
"""Image formats of written shards. Files of these formats are copied unchanged, others are converted to PNG."""

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its annotations: the members of a shard that share a key."""

    key: str
    """Unique in its split; without dots, as WebDataset ends a key at the first one, and without slashes."""
    image: bytes
    """The encoded image file."""
    image_extension: str
    """One of `WRITTEN_EXTENSIONS`."""
    caption: str | None = None
    """Each line is a caption."""
    label: int | None = None
    """Index into the class names, from 0."""
    metadata: dict[str, Any] | None = None
    """A JSON-serialisable value."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^./\s]+", self.key):
            raise ValueError(f"key: {self.key!r}; allowed: a text without dots, slashes and spaces")
        if self.image_extension not in WRITTEN_EXTENSIONS:
            raise ValueError(f"image_extension: {self.image_extension!r}; allowed: {', '.join(WRITTEN_EXTENSIONS)}")

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of its tar members, in order."""
        yield f"{self.key}.{self.image_extension}", self.image
        if self.caption is not None:
            yield f"{self.key}.txt", self.caption.encode()
        if self.label is not None:
            yield f"{self.key}.cls", str(self.label).encode()
        if self.metadata is not None:
            yield f"{self.key}.json", json.dumps(self.metadata, sort_keys=True, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """The shards that were written."""

    folder: Path
    """The folder of the tar files."""
    shards: int
    samples: int


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    classnames: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ShardSummary:
    """Write ``0.tar`` .. ``n-1.tar`` and ``nshards.txt`` into the new folder ``folder``; with the names of the classes,
    also ``class_counts.json``.

    The bytes of a tar depend on its samples alone: it stores no times and no owner. ``progress`` is called
    after each shard with the number of samples written so far.

    Raises:
        InputError: ``folder`` exists, there is no sample, or two samples of a shard share a key.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard: {samples_per_shard}; allowed: 1 or more")
    check_new(folder)
    counts: Counter[int | None] = Counter()

    def counted() -> Iterator[Sample]:
        for sample in samples:
            counts[sample.label] += 1
            yield sample

    iterator = counted()
    shards = written = 0
    with new_folder(folder) as temporary:
        while (first := next(iterator, None)) is not None:
            rest = islice(iterator, samples_per_shard - 1)
            written += _write_tar(chain([first], rest), temporary / f"{shards}.tar")
            shards += 1
            if progress:
                progress(written)
        if not shards:
            raise InputError(f"samples: none to write into {folder.name!r}; allowed: one or more")
        (temporary / "nshards.txt").write_text(f"{shards}\n")
        if classnames is not None:
            text = as_json(classnames, [counts[label] for label in range(len(classnames))])
            (temporary / CLASS_COUNTS_FILE).write_text(text, encoding="utf-8")
    return ShardSummary(folder=folder, shards=shards, samples=written)


def write_classification_folder(
    samples: Iterable[Sample],
    folder: Path,
    *,
    split: str,
    classnames: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ShardSummary:
    """Write a zero-shot classification set: the shards of one split, class names and prompt templates.

    The split can be added to a folder that has other splits with the same classes and templates.

    Raises:
        InputError: the split exists, the folder has other classes or templates, a sample's label is missing or
            not an index into ``classnames``, or a template lacks ``{c}``.
    """
    for name in classnames:
        if name != name.strip() or len(name.splitlines()) != 1:
            raise InputError(f"classnames: {name!r}; allowed: one line of text without blanks at its ends")
    for template in templates:
        if PLACEHOLDER not in template or len(template.splitlines()) != 1:
            raise InputError(f"templates: {template!r}; allowed: one line with {PLACEHOLDER} for the class name")
    return write_split(
        _check_labels(samples, classes=len(classnames)),
        folder,
        split=split,
        shared_files={CLASSNAMES_FILE: _lines(classnames), TEMPLATE_FILES[1]: _lines(templates)},
        samples_per_shard=samples_per_shard,
        classnames=classnames,
        progress=progress,
    )


def write_retrieval_folder(
    samples: Iterable[Sample],
    folder: Path,
    *,
    split: str,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ShardSummary:
    """Write an image-text retrieval set: the shards of one split, and ``dataset_type.txt``.

    Raises:
        InputError: the split exists, or the folder is not a retrieval set.
    """
    return write_split(
        samples,
        folder,
        split=split,
        shared_files={"dataset_type.txt": "retrieval\n"},
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def write_split(
    samples: Iterable[Sample],
    folder: Path,
    *,
    split: str,
    shared_files: dict[str, str],
    samples_per_shard: int,
    classnames: Sequence[str] | None = None,
    progress: Callable[[int], None] | None,
) -> ShardSummary:
    """Write ``<folder>/<split>``; the folder's first split also writes the files that all splits share."""
    write = partial(
        write_shards, samples, samples_per_shard=samples_per_shard, classnames=classnames, progress=progress
    )
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise InputError(f"split: {split!r}; allowed: a folder name of letters, digits, '_', '-' and '.'")
    if folder.exists():
        for name, text in shared_files.items():
            file = folder / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                raise InputError(f"{file}: is missing, or differs from that of split {split!r}; allowed: a new folder")
        return write(folder / split)
    with new_folder(folder) as temporary:
        for name, text in shared_files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        inner = write(temporary / split)
    return ShardSummary(folder=folder / split, shards=inner.shards, samples=inner.samples)


def _write_tar(samples: Iterable[Sample], file: Path) -> int:
    """Write one shard; returns its number of samples."""
    keys: set[str] = set()
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if sample.key in keys:
                raise InputError(f"key: {sample.key!r} occurs twice in {file.name}; allowed: unique keys")
            keys.add(sample.key)
            for name, content in sample.members():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return len(keys)


def _check_labels(samples: Iterable[Sample], *, classes: int) -> Iterator[Sample]:
    for sample in samples:
        if sample.label is None or not 0 <= sample.label < classes:
            raise InputError(f"label of {sample.key!r}: {sample.label}; allowed: 0 to {classes - 1}")
        yield sample


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"{text}\n" for text in texts)
