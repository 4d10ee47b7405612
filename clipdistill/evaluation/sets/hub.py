"""Test sets of the library ``datasets``: from the Hugging Face Hub, ``save_to_disk`` folders, or files it can read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, Kind, name_classes
from clipdistill.io.tables import ImageCells, is_saved, load_table
from clipdistill.models.class_matching import BOOL_NAMES, ClassLabels, are_numbers, in_class_order
from clipdistill.models.prompts import PromptSet

_SUFFIXES = (".parquet", ".csv", ".json", ".jsonl", ".arrow")
_LABELS = ("label", "labels", "cls", "class", "fine_label")
_CAPTIONS = ("caption", "captions", "text", "txt", "sentences")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Columns to read from a data set; None: found by type or usual name."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None
    subset: str | None = None
    """Configuration, for a data set with several."""
    image_root: Path | None = None
    """Folder in which cells of the image column may name files; see `clipdistill.io.tables.ImageCells`."""


def is_dataset(folder: Path) -> bool:
    """Whether a local folder can be loaded with ``datasets``."""
    return is_saved(folder) or any(path.suffix in _SUFFIXES for path in folder.rglob("*"))


def holds_tables(folder: Path) -> bool:
    """Whether a local folder holds tables that may contain images; other folders of theirs are no classes."""
    tables = (path for place in (folder, folder / "data") for path in place.glob("*.parquet"))
    return is_saved(folder) or next(tables, None) is not None


def open_dataset(
    location: str,
    *,
    split: str,
    name: str,
    prompts: PromptSet | None,
    by_order: bool = False,
    columns: Columns | None = None,
) -> EvaluationSet:
    """Open a data set.

    Args:
        location: name on the Hub, or a folder.
        split: in the library's notation; ignored for a saved ``Dataset``, which has no splits.
        name: of the set, in results.
        prompts: chosen by the user, as in `clipdistill.evaluation.sets.samples.name_classes`; required if the classes
            have no names. Truth values are the classes "False" and "True".
        by_order: match the classes with ``prompts`` by their order.
        columns: to read.

    Raises:
        InputError: no such data set, split or column, classes without names, or some that are not among the prompts'.
    """
    columns = columns or Columns()
    dataset = load_table(location, split=split, subset=columns.subset)
    features: Mapping[str, Any] = dataset.features
    image = columns.image or next((key for key, kind in features.items() if type(kind).__name__ == "Image"), "image")
    annotation, kind = _annotation(name, features, columns)
    for column in (image, annotation):
        if column not in features:
            raise InputError(f"data {name}: no column {column!r}; allowed: {', '.join(features)}")
    labels = ClassLabels(None)
    if kind == "retrieval":
        prompts = PromptSet(name=name, classnames=(), templates=())
    elif names := _class_names(dataset, annotation, texts_may_be_numbers=prompts is not None):
        prompts, indices = name_classes(name, names, prompts, by_order=by_order)
        labels = ClassLabels(names, indices, texts_are_names=True)
    elif prompts is None:
        raise InputError(f"data {name}: classes in column {annotation!r} have no names; allowed: names from --prompts")
    else:
        labels = ClassLabels(prompts.classnames)
    reader = DatasetReader(
        dataset,
        name=name,
        kind=kind,
        image=image,
        annotation=annotation,
        labels=labels,
        cells=ImageCells(location, columns.image_root),
    )
    return EvaluationSet(name=name, kind=kind, prompts=prompts, reader=reader)


class DatasetReader:
    """Rows of a data set; see `clipdistill.evaluation.sets.samples.Reader`. Keys are row numbers.

    Args:
        dataset: a ``datasets.Dataset``.
        name: for messages.
        kind: of the annotations.
        image: column of the images.
        annotation: column of labels, of lists of labels, or of captions (a string or a list of strings).
        labels: reads labels; unused for captions.
        cells: reads the images.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        name: str,
        kind: Kind,
        image: str,
        annotation: str,
        labels: ClassLabels,
        cells: ImageCells,
    ) -> None:
        import datasets

        dataset = dataset.select_columns([image, annotation])
        if isinstance(dataset.features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        self._dataset = dataset
        self._name = name
        self._kind = kind
        self._image = image
        self._annotation = annotation
        self._labels = labels
        self._cells = cells

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, positions: range) -> Iterator[EncodedSample]:
        """The samples of a range."""
        for position in positions:
            row = self._dataset[position]
            where = f"{self._name}, row {position}"
            annotation = self._read_annotation(row[self._annotation], where)
            data, _ = self._cells.read(row[self._image], where=where)
            yield EncodedSample(key=str(position), where=where, data=data, **annotation)

    def _read_annotation(self, value: Any, where: str) -> dict[str, Any]:
        if self._kind == "classification":
            return {"label": self._number(value, where)}
        if self._kind == "multilabel":
            return {"classes": tuple(self._number(label, where) for label in value or ())}
        captions = (value,) if isinstance(value, str) else tuple(value or ())
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise InputError(f"{where}: {self._annotation} {str(value)[:40]!r}; allowed: a caption or a list of them")
        return {"captions": captions}

    def _number(self, label: Any, where: str) -> int:
        index = self._labels.index(label)
        if index is None:
            raise InputError(f"{where}: {self._annotation} {str(label)[:40]!r}; allowed: {self._labels.allowed}")
        return index


def _annotation(name: str, features: Mapping[str, Any], columns: Columns) -> tuple[str, Kind]:
    """The annotation column and its kind: the column chosen by the user, else labels, else captions."""
    if columns.caption is not None and columns.label is None:
        return columns.caption, "retrieval"
    label = columns.label or next((key for key, kind in features.items() if _has_names(kind)), None)
    label = label or next((key for key in _LABELS if key in features), None)
    if label is not None:
        return label, "multilabel" if _is_list(features.get(label)) else "classification"
    caption = next((key for key in _CAPTIONS if key in features), None)
    if caption is None:
        raise InputError(
            f"data {name}: no label or caption among columns {', '.join(features)}; allowed: one named by "
            "--label-column or --caption-column"
        )
    return caption, "retrieval"


def _class_names(dataset: Any, column: str, *, texts_may_be_numbers: bool) -> list[str] | None:
    """Class names: those of the column's type, or its distinct texts, sorted; None for a column of numbers.

    Texts that are all numbers are names only to prompts, which know what they stand for.
    """
    kind = dataset.features[column]
    inner = kind.feature if _is_list(kind) else kind
    if _has_names(inner):
        return list(inner.names)
    dtype = str(getattr(inner, "dtype", ""))
    if dtype == "bool":
        return list(BOOL_NAMES)
    if "string" not in dtype:
        return None
    values = chain.from_iterable(row or () for row in dataset[column]) if _is_list(kind) else dataset.unique(column)
    names = in_class_order(value.strip() for value in values if value and value.strip())
    return names if texts_may_be_numbers or not are_numbers(names) else None


def _has_names(kind: Any) -> bool:
    inner = kind.feature if _is_list(kind) else kind
    return getattr(inner, "names", None) is not None


def _is_list(kind: Any) -> bool:
    return hasattr(kind, "feature")
