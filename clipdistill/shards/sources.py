"""Read samples from image folders, tables and Hugging Face data sets."""

import csv
import io
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec

from clipdistill.errors import InputError
from clipdistill.io.images import MAX_PIXELS, READABLE_FORMATS, open_image, read_orientation, to_upright
from clipdistill.io.paths import expand
from clipdistill.shards.writing import Sample

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of images in an image folder, as in torchvision's ImageFolder."""

SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")
"""Files of which a folder written by ``datasets``' ``save_to_disk`` has one."""

Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples that can be read once, in order, and their class names."""

    samples: Iterator[Sample]
    classnames: list[str] | None = None
    """Names that the labels index; None if there are no labels, or only indices."""
    skipped: list[str] = field(default_factory=list)
    """With ``skip_bad``: one line for each skipped row, with row and file. Grows as samples are read."""


def from_image_folder(
    root: Path,
    *,
    classnames: Sequence[str] | None = None,
    shuffle_seed: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Samples of ``root/<class>/**/<image>``, with the classes and the order of torchvision's ImageFolder.

    Args:
        root: its folders, sorted, are the classes.
        classnames: names of the classes in that order; by default the folders' own.
        shuffle_seed: shuffle the images with this seed; by default they stay sorted, so a shard may hold a single
            class.
        skip_bad: skip unreadable images and list them in `Source.skipped`, instead of raising.

    A key is the image's number in ImageFolder's order; the metadata holds its path below ``root``.

    Raises:
        InputError: no such folder, no class in it, a class without images, or a wrong number of class names;
            while samples are read, an unreadable image.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; allowed: an image folder")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not folders:
        raise InputError(f"{root}: no folder in it; allowed: an image folder, with one folder per class")
    if classnames is not None and len(classnames) != len(folders):
        raise InputError(f"{root}: {len(classnames)} class names; allowed: {len(folders)}, one per class folder")
    images: list[tuple[Path, int]] = []
    for label, name in enumerate(folders):
        files = _image_files(root / name)
        if not files:
            raise InputError(f"{root / name}: no image in this class; allowed: {', '.join(FOLDER_SUFFIXES)}")
        images += [(file, label) for file in files]

    def convert(index: int) -> Sample:
        file, label = images[index]
        image, extension = encode_image(_read(str(file), where=str(root)), where=str(file))
        path = file.relative_to(root).as_posix()
        return Sample(key=_key(index), image=image, image_extension=extension, label=label, metadata={"path": path})

    order = _order(len(images), shuffle_seed)
    return _source(order, convert, classnames=list(classnames or folders), skip_bad=skip_bad)


def from_csv(
    path: Path,
    *,
    image_column: str = "image",
    caption_column: str | None = None,
    label_column: str | None = None,
    root: Path | None = None,
    delimiter: str | None = None,
    classnames: Sequence[str] | None = None,
    shuffle_seed: int | None = None,
    skip_bad: bool = False,
) -> Source:
    """Samples of a table in UTF-8 with a header line, one row per image file.

    Args:
        path: the table.
        image_column: holds the path of the image file, absolute or below ``root``.
        caption_column: holds the caption; none by default.
        label_column: holds a class name, or an index from 0; none by default.
        root: the table's own folder by default.
        delimiter: by default a tab where the table's name ends in .tsv, else a comma.
        classnames: names that the labels index. By default a column of whole numbers holds indices, and the
            sorted distinct values of any other column are the classes.
        shuffle_seed: shuffle the rows with this seed; by default they stay in order.
        skip_bad: skip bad rows and list them in `Source.skipped`, instead of raising.

    A key is the row's number, from 0; the metadata holds the image's path as the table has it.

    Raises:
        InputError: no such file or column, or a table that is not UTF-8; while samples are read, a row
            without caption or label, or an image that is missing or unreadable.
    """
    folder = path.parent if root is None else root
    used = [name for name in (image_column, caption_column, label_column) if name is not None]
    rows = _read_table(path, used, "\t" if path.suffix == ".tsv" and delimiter is None else delimiter or ",")
    if label_column is not None and classnames is None:
        classnames = _distinct_names(row[label_column] for _, row in rows)
    labels = _Labels(classnames)

    def convert(index: int) -> Sample:
        line, row = rows[index]
        where = f"{path}, line {line}"
        if not row[image_column]:
            raise InputError(f"{where}: column {image_column!r} is empty; allowed: the path of an image")
        file = str(folder / row[image_column])
        image, extension = encode_image(_read(file, where=where), where=f"{where}: {file}")
        return Sample(
            key=_key(index),
            image=image,
            image_extension=extension,
            caption=_caption(row[caption_column], where=where) if caption_column else None,
            label=labels.index(row[label_column], where=where) if label_column else None,
            metadata={"path": row[image_column]},
        )

    order = _order(len(rows), shuffle_seed)
    return _source(order, convert, classnames=labels.names, skip_bad=skip_bad)


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
        caption_column: strings, or lists of strings (the first is used); none by default.
        label_column: a ``ClassLabel``, an index from 0, or a class name; none by default.
        classnames: names that the labels index; by default those of the ``ClassLabel``, or the sorted distinct
            values of a column of strings.
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
    dataset = _load_hf_dataset(name_or_path, split=split, subset=subset, streaming=streaming)
    used = [name for name in (image_column, caption_column, label_column) if name is not None]
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for name in used:
        if name not in columns:
            raise InputError(f"{name_or_path}: no column {name!r}; allowed: {', '.join(columns)}")
    dataset = dataset.select_columns(sorted(set(used)))
    if dataset.features is not None:  # None in some streams, which yield rows as stored in the files
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    if label_column is not None:
        feature = (dataset.features or {}).get(label_column)
        own_names = getattr(feature, "names", None)
        if classnames is None:
            classnames = own_names
        elif own_names and len(own_names) != len(classnames):
            raise InputError(
                f"{name_or_path}: {len(classnames)} class names; allowed: {len(own_names)}, one per class of column "
                f"{label_column!r}"
            )
        if classnames is None and not streaming and "string" in str(getattr(feature, "dtype", "")):
            classnames = _distinct_names(value for value in dataset.unique(label_column) if value)
    labels = _Labels(classnames)
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
            caption=_caption(row[caption_column], where=where) if caption_column else None,
            label=labels.index(row[label_column], where=where) if label_column else None,
        )

    rows: Iterable[tuple[int, dict[str, Any]]] = enumerate(dataset)
    if shuffle_seed is not None:
        rows = ((index, dataset[index]) for index in _order(len(dataset), shuffle_seed))
    return _source(rows, convert, classnames=labels.names, skip_bad=skip_bad)


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


class ImageCells:
    """Reads the cells of an undecoded image column: encoded bytes, the path of a file, or a dict of both.

    A path is data, and data may come from anywhere: only files of the data set itself are read, and those below
    ``root``; links are followed before this is decided.

    Args:
        dataset: name on the Hub, or folder.
        root: a further folder of images; paths that are not absolute start there, or else in the data set's folder.
    """

    def __init__(self, dataset: str, root: Path | None = None) -> None:
        import datasets
        import huggingface_hub

        own = [] if root is None else [expand(root)]
        own += [Path(dataset)] if Path(dataset).is_dir() else []
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
        self._starts = own
        self._roots = [Path(each).resolve() for each in (*own, *caches, huggingface_hub.constants.HF_HUB_CACHE)]
        self._repository = f"hf://datasets/{dataset}@"

    def read(self, cell: Any, *, where: str) -> tuple[bytes, str]:
        """An image file's content, and its path if it has one.

        Raises:
            InputError: no image, a file elsewhere, or one that cannot be read; begins with ``where``.
        """
        if not isinstance(cell, dict):
            cell = {"bytes" if isinstance(cell, bytes) else "path": cell}
        content, path = cell.get("bytes"), cell.get("path")
        if isinstance(content, bytes):
            return content, str(path or "")
        if not isinstance(path, str) or not path:
            raise InputError(f"{where}: no image; allowed: an image in every row")
        return _read(self._allowed(path, where), where=where), path

    def _allowed(self, path: str, where: str) -> str:
        """The file or URL to read for a path."""
        if path.startswith(self._repository) and "::" not in path:
            return path
        local = unquote(urlsplit(path).path) if path.startswith("file://") else path
        files = [Path(local)] if Path(local).is_absolute() else [start / local for start in self._starts]
        resolved = [Path(os.path.realpath(file)) for file in files if "://" not in local]
        inside = [file for file in resolved if any(file.is_relative_to(root) for root in self._roots)]
        if inside:
            return str(next((file for file in inside if file.exists()), inside[0]))
        raise InputError(
            f"{where}: image {path!r} is not a file of the data set; allowed: embedded images, files in the data set's "
            "folder, or in that of --image-root"
        )


class _Labels:
    """Converts the values of a label column to class indices."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self.names = None if names is None else list(names)
        self._indices = {name: index for index, name in enumerate(names or ())}

    def index(self, value: Any, *, where: str) -> int:
        if isinstance(value, str) and value in self._indices:
            return self._indices[value]
        if isinstance(value, int) or (isinstance(value, str) and _is_number(value)):
            index = int(value)
            if index >= 0 and (self.names is None or index < len(self.names)):
                return index
        if self.names is None:
            raise InputError(f"{where}: label {value!r}; allowed: an index from 0 (names need a list of the classes)")
        raise InputError(f"{where}: label {value!r}; allowed: a class name or an index from 0 to {len(self.names) - 1}")


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


def _caption(value: Any, *, where: str) -> str:
    """A caption as one line of text: CLIP_benchmark reads several lines as several captions."""
    if isinstance(value, list):
        value = next(iter(value), None)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: caption {value!r}; allowed: a non-empty text")
    return " ".join(value.split())


def _distinct_names(values: Iterable[str]) -> list[str] | None:
    """The class names of a label column, sorted; None if it holds numbers only."""
    names = sorted(set(values) - {""})
    return None if all(map(_is_number, names)) else names


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _image_files(folder: Path) -> list[Path]:
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(FOLDER_SUFFIXES)
    ]


def _read(path: str, *, where: str) -> bytes:
    """Content of a local file, or of a URL that fsspec supports."""
    try:
        if "://" in path:
            with fsspec.open(path, "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{where}: cannot read {path} ({reason})") from None


def _read_table(path: Path, used: Sequence[str], delimiter: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a table, each with the number of its last line; only the columns in use."""
    if len(delimiter) != 1:
        raise InputError(f"delimiter: {delimiter!r}; allowed: a single character")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = reader.fieldnames or []
            for name in used:
                if name not in columns:
                    raise InputError(f"{path}: no column {name!r}; allowed: {', '.join(columns)}")
            return [(reader.line_num, {name: row[name] or "" for name in used}) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a readable table ({error}); allowed: a CSV or TSV file in UTF-8") from None


def _load_hf_dataset(name_or_path: str, *, split: str, subset: str | None, streaming: bool) -> Any:
    import datasets

    saved = any((Path(name_or_path) / file).is_file() for file in SAVED_DATASET_FILES)
    try:
        if not saved:
            return datasets.load_dataset(name_or_path, subset, split=split, streaming=streaming)
        dataset = datasets.load_from_disk(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"{name_or_path}: `datasets` cannot load it ({str(error).splitlines()[0]})") from None
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if split not in dataset:
        raise InputError(f"{name_or_path}: no split {split!r}; allowed: {', '.join(dataset)}")
    return dataset[split]
