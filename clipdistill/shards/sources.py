"""Read samples from image folders, tables and Hugging Face data sets."""

import csv
import io
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from clipdistill.errors import InputError
from clipdistill.io.image_folders import IMAGE_SUFFIXES, find_image_folder
from clipdistill.io.images import MAX_PIXELS, READABLE_FORMATS, open_image, read_orientation, to_upright
from clipdistill.io.paths import read_text
from clipdistill.io.tables import ImageCells, load_table, read_image_file
from clipdistill.models.class_matching import (
    BOOL_NAMES,
    ClassLabels,
    are_numbers,
    in_class_order,
    match_classes,
    match_through,
)
from clipdistill.models.prompts import load_own_prompts
from clipdistill.shards.writing import DEFAULT_TEMPLATES, Sample

_PROMPTS = "the prompt set"

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples that can be read once, in order, and their class names."""

    samples: Iterator[Sample]
    classnames: list[str] | None = None
    """Names that the labels index; None if there are no labels, or only indices."""
    templates: Sequence[str] = DEFAULT_TEMPLATES
    """Prompt templates: those beside the source's own class list, if it has both."""
    notes: Sequence[str] = ()
    """Where in the source the samples are, and what it holds beside them; in words."""
    skipped: list[str] = field(default_factory=list)
    """With ``skip_bad``: one line for each skipped row, with row and file. Grows as samples are read."""


def from_image_folder(
    root: Path,
    *,
    split: str | None = None,
    classnames: Sequence[str] | None = None,
    by_order: bool = False,
    shuffle_seed: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Samples of ``root/<class>/**/<image>``, in the order of torchvision's ImageFolder.

    The folders are the classes: sorted as numbers if all are whole numbers, else as text. A ``classnames.txt`` in
    ``root``, or beside it if it is a split, is the list of classes; the folders have its names or its numbers.

    Args:
        root: the image folder; or one of splits, each with folders of classes.
        split: which split, if ``root`` has splits; None: it must have none.
        classnames: the classes that labels index, matched by name as in `match_classes`; by default the folder's own.
        by_order: match the classes by their order in place of their names.
        shuffle_seed: shuffle the images with this seed; by default they stay sorted, so a shard may hold a single
            class.
        skip_bad: skip unreadable images and list them in `Source.skipped`, instead of raising.

    A key is the image's number in this order; the metadata holds its path below ``root``.

    Raises:
        InputError: no such folder, no class in it, a class without images, splits in place of classes, or classes that
            are not among the class names; while samples are read, an unreadable image.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; allowed: an image folder")
    found = find_image_folder(root, split=split)
    if found is None:
        raise InputError(
            f"{root}: no folder with images in it; allowed: an image folder, with one folder per class "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    names = in_class_order(found.names)
    own = load_own_prompts(found.places_of_class_list, default_templates=DEFAULT_TEMPLATES)
    own_names = own.classnames if own else None
    indices = match_through(names, own_names, classnames, of=str(root), to=_PROMPTS, by_order=by_order)
    files = {each.path.name: each.images for each in found.classes}
    images = [(image, label) for name, label in zip(names, indices, strict=True) for image in files[name]]

    def convert(index: int) -> Sample:
        file, label = images[index]
        image, extension = encode_image(read_image_file(str(file), where=str(root)), where=str(file))
        path = file.relative_to(root).as_posix()
        return Sample(key=_key(index), image=image, image_extension=extension, label=label, metadata={"path": path})

    order = _order(len(images), shuffle_seed)
    source = _source(order, convert, classnames=list(classnames or own_names or names), skip_bad=skip_bad)
    notes = [f"from {found.root}"] if found.root != root else []
    notes += [found.notes] if found.ignored else []
    return replace(source, notes=notes, templates=own.templates if own else DEFAULT_TEMPLATES)


def from_csv(
    path: Path,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    root: Path | None = None,
    delimiter: str | None = None,
    classnames: Sequence[str] | None = None,
    by_order: bool = False,
    shuffle_seed: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Samples of a table in UTF-8 with a header line, one row per image file or, with captions, per caption.

    Rows that name the same image are one sample with all their captions.

    Args:
        path: the table.
        image_column: holds the path of the image file, absolute or below ``root``.
        caption_column: holds the caption; none by default.
        label_column: holds a class name, or an index from 0; none by default.
        root: the table's own folder by default.
        delimiter: by default a tab where the table's name ends in .tsv, else a comma.
        classnames: names that the labels index, matched by name as in `match_classes`. By default the sorted distinct
            values of the column are the classes. A column of whole numbers holds indices.
        by_order: match the sorted distinct values with ``classnames`` by their order.
        shuffle_seed: shuffle the rows with this seed; by default they stay in order.
        skip_bad: skip bad rows and list them in `Source.skipped`, instead of raising.

    A key is the number of the image's first row, from 0; the metadata holds the image's path as the table has it.

    Raises:
        InputError: no such file or column, or a table that is not UTF-8; while samples are read, a row
            without caption or label, an image with several labels, or one that is missing or unreadable.
    """
    folder = path.parent if root is None else root
    used = [name for name in (image_column, caption_column, label_column) if name is not None]
    rows = _read_table(path, used, "\t" if path.suffix == ".tsv" and delimiter is None else delimiter or ",")
    labels = ClassLabels(classnames)
    if label_column is not None:
        values = (row[label_column] for _, row in rows)
        of = f"{path}: column {label_column!r}"
        labels = _column_labels(values, classnames, of=of, by_order=by_order, skip_bad=skip_bad)

    rows_of: dict[str, list[int]] = {}
    for number, (_, row) in enumerate(rows):
        file = os.path.normpath(folder / row[image_column])
        rows_of.setdefault(file if caption_column and row[image_column] else str(number), []).append(number)
    groups = list(rows_of.values())

    def convert(index: int) -> Sample:
        of_image = [(f"{path}, line {line}", row) for line, row in map(rows.__getitem__, groups[index])]
        where, row = of_image[0]
        if not row[image_column]:
            raise InputError(f"{where}: column {image_column!r} is empty; allowed: the path of an image")
        file = str(folder / row[image_column])
        image, extension = encode_image(read_image_file(file, where=where), where=f"{where}: {file}")
        captions = [_caption(row[caption_column], where=at) for at, row in of_image] if caption_column else []
        found = {_label(labels, row[label_column], where=at): at for at, row in of_image} if label_column else {}
        if len(found) > 1:
            other = list(found.values())[1]
            raise InputError(f"{other}: another label of {file} than at {where}; allowed: one label an image")
        return Sample(
            key=_key(groups[index][0]),
            image=image,
            image_extension=extension,
            caption="\n".join(captions) if captions else None,
            label=next(iter(found), None),
            metadata={"path": row[image_column]},
        )

    order = _order(len(groups), shuffle_seed)
    source = _source(order, convert, classnames=_names(classnames, labels), skip_bad=skip_bad)
    notes = [f"{len(rows)} rows name {len(groups)} images"] if len(groups) < len(rows) else []
    return replace(source, notes=notes)


def from_hf_dataset(
    name_or_path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    classnames: Sequence[str] | None = None,
    image_root: Path | None = None,
    by_order: bool = False,
    streaming: bool = False,
    shuffle_seed: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Samples of a dataset that the library ``datasets`` can load.

    Args:
        name_or_path: a dataset of the Hub, a local folder of data files, or a folder written by
            ``save_to_disk``.
        split: which split, in the library's notation ("train[:10%]"); for a saved ``DatasetDict``, its name;
            ignored for a saved ``Dataset``, which has no splits.
        subset: the configuration, for datasets that have several.
        image_column: an ``Image`` column, or one of encoded bytes or paths.
        caption_column: strings, or lists of strings, the captions of one image; none by default.
        label_column: a ``ClassLabel``, an index from 0, a class name, or a truth value (the classes "False" and
            "True"); none by default.
        classnames: names that the labels index, matched by name as in `match_classes`; by default those of the
            ``ClassLabel``, or the sorted distinct values of a column of strings.
        by_order: match the data set's class names with ``classnames`` by their order.
        image_root: folder in which image cells may name files; see `ImageCells`.
        streaming: read rows as they arrive, in the source's order, without downloading the dataset first.
        shuffle_seed: shuffle the rows with this seed; by default they stay in order.
        skip_bad: skip bad rows and list them in `Source.skipped`, instead of raising.

    A key is the row's number, from 0. Encoded images are copied without re-encoding.

    Raises:
        InputError: no such dataset, split or column, or ``shuffle_seed`` with ``streaming``; while samples
            are read, a row without caption or label, or an image that is missing or unreadable.
    """
    import datasets  # slow to import, and not needed by the other sources

    if streaming and shuffle_seed is not None:
        raise InputError("streaming: cannot be combined with a shuffle; allowed: one of the two")
    dataset = load_table(name_or_path, split=split, subset=subset, streaming=streaming)
    used = [name for name in (image_column, caption_column, label_column) if name is not None]
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for name in used:
        if name not in columns:
            raise InputError(f"{name_or_path}: no column {name!r}; allowed: {', '.join(columns)}")
    dataset = dataset.select_columns(sorted(set(used)))
    if dataset.features is not None:  # None in some streams, which yield rows as stored in the files
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    labels = ClassLabels(classnames)
    if label_column is not None:
        feature = (dataset.features or {}).get(label_column)
        of = f"{name_or_path}: column {label_column!r}"
        own = BOOL_NAMES if getattr(feature, "dtype", "") == "bool" else getattr(feature, "names", None)
        if own:
            indices = match_through(own, None, classnames, of=of, to=_PROMPTS, by_order=by_order)
            labels = ClassLabels(own, indices)
        elif not streaming and "string" in str(getattr(feature, "dtype", "")):
            values = (value for value in dataset.unique(label_column) if value)
            labels = _column_labels(values, classnames, of=of, by_order=by_order, skip_bad=skip_bad)
        elif by_order and "int" not in str(getattr(feature, "dtype", "")):  # numbers are in order
            raise InputError(f"{of}: has no class names that are known beforehand; allowed: labels by name or index")
    cells = ImageCells(name_or_path, image_root)

    def convert(numbered_row: tuple[int, dict[str, Any]]) -> Sample:
        index, row = numbered_row
        where = f"{name_or_path}, row {index}"
        content, path = cells.read(row[image_column], where=where)
        image, extension = encode_image(content, where=f"{where}: {path or 'image'}")
        return Sample(
            key=_key(index),
            image=image,
            image_extension=extension,
            caption=_captions(row[caption_column], where=where) if caption_column else None,
            label=_label(labels, row[label_column], where=where) if label_column else None,
        )

    rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(dataset)
    if shuffle_seed is not None:
        rows = ((index, dataset[index]) for index in _order(len(dataset), shuffle_seed))
    return _source(rows, convert, classnames=_names(classnames, labels), skip_bad=skip_bad)


def encode_image(content: bytes, *, where: str) -> tuple[bytes, str]:
    """The file content for a shard, and its extension: JPEG, PNG and WebP unchanged, other formats as PNG.

    The image is fully decoded, so that damaged files are found here rather than in training. A PNG made from another
    format decodes to the same pixels.

    Raises:
        InputError: not a readable image, or one of too many pixels; begins with ``where``.
    """
    try:
        image = open_image(content, max_pixels=MAX_PIXELS, formats=READABLE_FORMATS)
        orientation = read_orientation(image)
        upright = to_upright(image, orientation)
    except Exception as error:  # Pillow's decoders raise many types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{where}: not a readable image ({reason}); allowed: {', '.join(READABLE_FORMATS)}") from None
    extension = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "")
    if extension is not None:
        return content, extension
    kept = orientation == 1 and image.mode in ("1", "L", "LA", "P", "RGB", "RGBA")
    encoded = io.BytesIO()
    (image if kept else upright).save(encoded, format="PNG")
    return encoded.getvalue(), "png"


def _column_labels(
    values: Iterable[str], classnames: Sequence[str] | None, *, of: str, by_order: bool, skip_bad: bool
) -> ClassLabels:
    """Reads the labels of a column of text, whose values are all known.

    With ``skip_bad``, values that are no class are left to the rows that hold them.
    """
    names = in_class_order(value.strip() for value in values if value.strip())
    if classnames is None:
        return ClassLabels(None) if are_numbers(names) else ClassLabels(names, texts_are_names=True)
    if by_order:
        return ClassLabels(names, match_classes(names, classnames, of=of, to=_PROMPTS, by_order=True))
    given = ClassLabels(classnames)
    if all(given.named(name) is None and re.fullmatch(r"-?[0-9]+(\.0+)?", name) for name in names):
        return given
    if skip_bad:
        return ClassLabels(classnames, texts_are_names=True)
    return ClassLabels(names, match_classes(names, classnames, of=of, to=_PROMPTS), texts_are_names=True)


def _label(labels: ClassLabels, value: Any, *, where: str) -> int:
    index = labels.index(value)
    if index is None:
        raise InputError(f"{where}: label {str(value)[:80]!r}; allowed: {labels.allowed}")
    return index


def _names(classnames: Sequence[str] | None, labels: ClassLabels) -> list[str] | None:
    """The names that a source's labels index."""
    names = labels.names if classnames is None else classnames
    return None if names is None else list(names)


def _source(
    rows: Iterable[Row],
    convert: Callable[[Row], Sample],
    *,
    classnames: list[str] | None,
    skip_bad: bool,
) -> Source:
    """A source of converted rows; bad ones raise, or are listed in `Source.skipped`."""
    skipped: list[str] = []

    def samples() -> Iterator[Sample]:
        for row in rows:
            try:
                sample = convert(row)
            except InputError as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
            else:
                yield sample

    return Source(samples=samples(), classnames=classnames, skipped=skipped)


def _order(length: int, seed: int | None) -> list[int]:
    order = list(range(length))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return order


def _key(index: int) -> str:
    return f"{index:09d}"


def _captions(value: Any, *, where: str) -> str:
    """A caption, or a list of them, one a line."""
    values = value if isinstance(value, list) and value else [value]
    return "\n".join(_caption(each, where=where) for each in values)


def _caption(value: Any, *, where: str) -> str:
    """A caption as one line of text."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: caption {value!r}; allowed: a non-empty text")
    return " ".join(value.split())


def _read_table(path: Path, used: Sequence[str], delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table, each with the number of its last line; only the columns in use."""
    if len(delimiter) != 1:
        raise InputError(f"delimiter: {delimiter!r}; allowed: a single character")
    text = read_text(path, what="table", most=1 << 34)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        columns = reader.fieldnames or []
        for name in used:
            if name not in columns:
                raise InputError(f"{path}: no column {name!r}; allowed: {', '.join(columns)}")
        return [(reader.line_num, {name: row[name] or "" for name in used}) for row in reader]
    except csv.Error as error:
        raise InputError(f"{path}: not a readable table ({error}); allowed: a CSV or TSV file in UTF-8") from None
