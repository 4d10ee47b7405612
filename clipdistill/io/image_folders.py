"""Image folders: one folder of images for each class, in ROOT or in ROOT/SPLIT.

Every command reads them here: links are followed, hidden names are skipped, and what is skipped is counted.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdistill.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of images, in any case, as in torchvision's ImageFolder."""

_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"})
_SPLIT = re.compile(
    r"(train|training|trn|val|valid|validation|dev|development|test|testing|tst|eval|evaluation|holdout)"
    r"([-_ ]?(set|split|data|images|imgs|[0-9]+|[ab]))*",
    re.IGNORECASE,
)
_LISTED = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClassFolder:
    """The images of one class, at any depth, sorted by folder and name."""

    path: Path
    images: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A folder of class folders."""

    root: Path
    """The folder of the class folders: the one given, or its split."""
    classes: tuple[ClassFolder, ...]
    """Sorted by name, as text."""
    ignored: Counter[str]
    """Number of files and folders that were skipped, by reason."""

    @property
    def names(self) -> list[str]:
        """Names of the class folders."""
        return [each.path.name for each in self.classes]

    @property
    def places_of_class_list(self) -> list[Path]:
        """Folders that may hold its list of classes: its own, and of a split that of all splits."""
        place = self.root.absolute()
        return [place, place.parent] if is_split_name(place.name) else [place]

    @property
    def notes(self) -> str:
        """What was skipped, in words."""
        counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.ignored.items()))
        return f"ignored: {counts or 'nothing'}"


def find_image_folder(folder: Path, *, split: str | None) -> ImageFolder | None:
    """The class folders in a folder, or in its split; None if no subfolder holds an image.

    The subfolder ``split``, in any case, is the split if it holds folders of images. A folder whose subfolders are all
    named as splits (train, val, test, ...) and hold folders of images has no classes of its own.

    Args:
        folder: the folder.
        split: name of the split to read if there are splits; None: there must be none.

    Raises:
        InputError: the folder has other splits only, a class folder has no image, a folder cannot be read, or a name is
            not UTF-8.
    """
    try:
        return _find(folder, split)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: cannot be read: {error.strerror}; allowed: a readable folder"
        ) from error


def is_split_name(name: str) -> bool:
    """Whether a folder's name is that of a split, such as "train", "Val", "test2017" or "training_set"."""
    return _SPLIT.fullmatch(name) is not None


def _find(folder: Path, split: str | None) -> ImageFolder | None:
    subfolders = [path for path in _entries(folder) if path.is_dir()]
    inhabited = [path for path in subfolders if next(_walk(path, Counter()), None) is not None]
    if not inhabited:
        return None
    splits = [path for path in inhabited if not any(map(_is_image, _entries(path)))]
    classes_beside = any(path not in splits and not is_split_name(path.name) for path in inhabited)
    chosen = next((path for path in splits if split is not None and path.name.casefold() == split.casefold()), None)
    if chosen is not None and not classes_beside:
        return _read(chosen)
    if splits and all(is_split_name(path.name) for path in inhabited):
        names = ", ".join(path.name for path in splits)
        wanted = "no classes" if split is None else f"no split {split!r}"
        raise InputError(f"{folder}: {wanted}, but folders of classes in its splits; allowed: {names}")
    return _read(folder)


def _read(root: Path) -> ImageFolder:
    ignored: Counter[str] = Counter()
    classes = []
    for path in _entries(root, ignored):
        if path.is_dir():
            images = sorted(_walk(path, ignored), key=lambda image: (str(image.parent), image.name))
            classes.append(ClassFolder(path=path, images=tuple(images)))
        elif _is_image(path):
            ignored["images outside the class folders"] += 1
    empty = [each for each in classes if not each.images]
    if empty:
        raise InputError(
            f"{root}: no image in the class folders {_some(empty)}; allowed: images "
            f"({', '.join(IMAGE_SUFFIXES)}) in each"
        )
    if all(is_split_name(each.path.name) for each in classes):
        log.warning("%s: folders named as splits count as classes, since they hold images: %s", root, _some(classes))
    return ImageFolder(root=root, classes=tuple(classes), ignored=ignored)


def _walk(folder: Path, ignored: Counter[str]) -> Iterator[Path]:
    """The images in a folder and below, each real folder once: a link cannot lead round in a circle."""
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in seen:
            ignored["folders reached again by a link"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for path in _entries(current, ignored):
            if _is_image(path):
                yield path
            elif path.is_dir():
                folders.append(path)
            else:
                ignored["not images"] += 1
        waiting += reversed(folders)


def _entries(folder: Path, ignored: Counter[str] | None = None) -> list[Path]:
    """What a folder holds, sorted, without hidden names, which are counted."""
    names = sorted(path.name for path in folder.iterdir())
    shown = [name for name in names if not name.startswith(".") and name not in _SYSTEM_NAMES]
    if ignored is not None and len(shown) < len(names):
        ignored["hidden"] += len(names) - len(shown)
    for name in shown:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise InputError(f"{folder}: the name {name!a} is not UTF-8; allowed: names in UTF-8")
    return [folder / name for name in shown]


def _some(classes: Sequence[ClassFolder]) -> str:
    names = ", ".join(each.path.name for each in classes[:_LISTED])
    return f"{names} and {len(classes) - _LISTED} more" if len(classes) > _LISTED else names


def _is_image(path: Path) -> bool:
    return path.name.lower().endswith(IMAGE_SUFFIXES) and path.is_file()
