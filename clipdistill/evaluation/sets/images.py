"""Test sets in plain folders: one folder of images for each class."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipdistill.distributed.collectives import rank
from clipdistill.errors import InputError
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, name_classes
from clipdistill.io.image_folders import ImageFolder
from clipdistill.models.class_matching import are_identifiers, in_class_order
from clipdistill.models.prompts import PromptSet, load_own_prompts
from clipdistill.shards.writing import DEFAULT_TEMPLATES

log = logging.getLogger(__name__)


def open_image_set(
    found: ImageFolder,
    *,
    name: str,
    prompts: PromptSet | None,
    by_order: bool = False,
    allow_duplicates: bool = False,
) -> EvaluationSet:
    """Open a set of class folders.

    A ``classnames.txt`` in the folder, or beside it if it is a split, is the list of classes; the folders have its
    names or its numbers.

    Args:
        found: the class folders.
        name: of the set.
        prompts: chosen by the user; None: those in the folder, or the folders' names.
        by_order: match the classes with the prompts by their order.
        allow_duplicates: accept a list in the folder that names a class twice.

    Raises:
        InputError: a folder's class is not among the prompts' or the list's.
    """
    places = found.places_of_class_list
    own = load_own_prompts(places, default_templates=DEFAULT_TEMPLATES, allow_duplicates=allow_duplicates)
    names = in_class_order(found.names)
    if prompts is None and own is None and are_identifiers(names) and rank() == 0:
        log.warning(
            "data %s: folders such as %r are no names; name them with --prompts or classnames.txt", name, names[0]
        )
    prompts, indices = name_classes(name, names, prompts, own=own, by_order=by_order)
    numbers = dict(zip(names, indices, strict=True))
    files = [(image, numbers[each.path.name]) for each in found.classes for image in each.images]
    log.info("data %s: %d images of %d classes in %s; %s", name, len(files), len(names), found.root, found.notes)
    return EvaluationSet(name=name, kind="classification", prompts=prompts, reader=FolderReader(found.root, files))


class FolderReader:
    """Image files with one class each; see `samples.Reader`. Keys are paths below the root."""

    def __init__(self, root: Path, files: Sequence[tuple[Path, int]]) -> None:
        self._root = root
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, positions: range) -> Iterator[EncodedSample]:
        """The samples of a range."""
        for position in positions:
            path, label = self._files[position]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}; allowed: a readable file") from error
            yield EncodedSample(key=path.relative_to(self._root).as_posix(), where=str(path), data=data, label=label)
