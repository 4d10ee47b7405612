"""Write samples as WebDataset shards, alone or as a CLIP_benchmark test set.

The names are those of CLIP_benchmark, so that every folder written here is one that it can evaluate on. Shards are
written into a temporary folder beside the target, which is renamed when it is complete: an error or a kill never
leaves half a data set under the requested name.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.io.files import new_folder
from clipdistill.models.prompts import CLASSNAMES_FILE, PLACEHOLDER, TEMPLATE_FILES

IMAGE_EXTENSIONS = ("jpg", "png", "webp")
"""What a shard may hold. Files of these formats are copied byte for byte, others become PNG."""

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with what is known about it; the members of a shard that share a key."""

    key: str
    """Unique in its split; without dots, as WebDataset ends the key at the first one, and without slashes."""
    image: bytes
    """The encoded file."""
    image_extension: str
    """One of `IMAGE_EXTENSIONS`."""
    caption: str | None = None
    label: int | None = None
    """Index into the class names, from 0."""
    metadata: dict[str, Any] | None = None
    """Anything that JSON can hold."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^./\s]+", self.key):
            raise ValueError(f"key: {self.key!r} must be a text without dots, slashes and spaces")
        if self.image_extension not in IMAGE_EXTENSIONS:
            raise ValueError(f"image_extension: {self.image_extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of its files, in their order in the tar."""
        yield f"{self.key}.{self.image_extension}", self.image
        if self.caption is not None:
            yield f"{self.key}.txt", self.caption.encode()
        if self.label is not None:
            yield f"{self.key}.cls", str(self.label).encode()
        if self.metadata is not None:
            yield f"{self.key}.json", json.dumps(self.metadata, sort_keys=True, ensure_ascii=False).encode()


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What was written."""

    folder: Path
    """The folder of the shards themselves."""
    shards: int
    samples: int


def write_shards(
    samples: Iterable[Sample],
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    progress: Callable[[int], None] | None = None,
) -> ShardSummary:
    """Write ``0.tar`` .. ``n-1.tar`` and ``nshards.txt`` into the new folder ``folder``.

    The bytes of a tar depend on its samples alone: it holds no times and no owner. ``progress`` is called
    after each shard with the number of samples written so far.

    Raises:
        InputError: ``folder`` exists, there is no sample, or two samples of a shard share a key.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard: {samples_per_shard} is not at least 1")
    check_new(folder)
    iterator = iter(samples)
    shards = written = 0
    with new_folder(folder) as partial:
        while (first := next(iterator, None)) is not None:
            rest = islice(iterator, samples_per_shard - 1)
            written += _write_tar(chain([first], rest), partial / f"{shards}.tar")
            shards += 1
            if progress:
                progress(written)
        if not shards:
            raise InputError(f"samples: there is none to write into {folder.name!r}")
        (partial / "nshards.txt").write_text(f"{shards}\n")
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

    A folder that holds other splits of the same classes and templates gets this one beside them.

    Raises:
        InputError: the split exists, the folder has other classes or templates, a sample has no label or one
            that is no index into ``classnames``, or a template lacks ``{c}``.
    """
    for name in classnames:
        if name != name.strip() or len(name.splitlines()) != 1:
            raise InputError(f"classnames: {name!r} is not one line of text without blanks at its ends")
    for template in templates:
        if PLACEHOLDER not in template or len(template.splitlines()) != 1:
            raise InputError(f"templates: {template!r} is not one line with {PLACEHOLDER} for the class name")
    return write_split(
        _check_labels(samples, classes=len(classnames)),
        folder,
        split=split,
        shared_files={CLASSNAMES_FILE: _lines(classnames), TEMPLATE_FILES[1]: _lines(templates)},
        samples_per_shard=samples_per_shard,
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
    """Write an image-text retrieval set: the shards of one split, and ``dataset_type.txt``, which says so.

    Raises:
        InputError: the split exists, or the folder is no retrieval set.
    """
    return write_split(
        samples,
        folder,
        split=split,
        shared_files={"dataset_type.txt": "retrieval\n"},
        samples_per_shard=samples_per_shard,
        progress=progress,
    )


def check_new(folder: Path) -> None:
    """Raise InputError if a folder that is to be written exists."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; name a new folder or remove it")


def write_split(
    samples: Iterable[Sample],
    folder: Path,
    *,
    split: str,
    shared_files: dict[str, str],
    samples_per_shard: int,
    progress: Callable[[int], None] | None,
) -> ShardSummary:
    """Write ``<folder>/<split>``, and with the folder's first split the files that all its splits share."""
    if not re.fullmatch(r"\w[\w.-]*", split):
        raise InputError(f"split: {split!r} is not the name of a folder (letters, digits, '_', '-' and '.')")
    if folder.exists():
        for name, text in shared_files.items():
            file = folder / name
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                raise InputError(f"{file}: is missing, or differs from what split {split!r} needs; name another folder")
        return write_shards(samples, folder / split, samples_per_shard=samples_per_shard, progress=progress)
    with new_folder(folder) as partial:
        for name, text in shared_files.items():
            (partial / name).write_text(text, encoding="utf-8")
        inner = write_shards(samples, partial / split, samples_per_shard=samples_per_shard, progress=progress)
    return ShardSummary(folder=folder / split, shards=inner.shards, samples=inner.samples)


def _write_tar(samples: Iterable[Sample], file: Path) -> int:
    """Write one shard; return how many samples it holds."""
    keys: set[str] = set()
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if sample.key in keys:
                raise InputError(f"key: {sample.key!r} stands twice in {file.name}; a sample's key is its own")
            keys.add(sample.key)
            for name, content in sample.members():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return len(keys)


def _check_labels(samples: Iterable[Sample], *, classes: int) -> Iterator[Sample]:
    for sample in samples:
        if sample.label is None or not 0 <= sample.label < classes:
            raise InputError(f"label of {sample.key!r}: {sample.label} is not a class index from 0 to {classes - 1}")
        yield sample


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"{text}\n" for text in texts)
