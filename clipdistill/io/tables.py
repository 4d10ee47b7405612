"""Data sets of the library ``datasets``: of the Hugging Face Hub, ``save_to_disk`` folders, and files that it reads."""

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec

from clipdistill.errors import InputError
from clipdistill.io.paths import expand
from clipdistill.io.urls import one_line

_SAVED = ("state.json", "dataset_dict.json")


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written a folder."""
    return any((folder / name).is_file() for name in _SAVED)


def load_table(location: str, *, split: str, subset: str | None = None, streaming: bool = False) -> Any:
    """Load a data set.

    Args:
        location: name on the Hub, or a folder.
        split: in the library's notation; of a saved ``DatasetDict``, its name; ignored for a saved ``Dataset``, which
            has no splits.
        subset: the configuration, for data sets that have several.
        streaming: read rows as they arrive.

    Raises:
        InputError: no such data set or split.
    """
    import datasets

    folder = Path(location)
    try:
        if not is_saved(folder):
            cache = _cache_of(folder, Path(datasets.config.HF_DATASETS_CACHE)) if folder.is_dir() else None
            return datasets.load_dataset(location, subset, split=split, streaming=streaming, cache_dir=cache)
        saved = datasets.load_from_disk(location)
    except Exception as error:  # errors of the library, the Hub's client, the network
        raise InputError(f"data {location}, split {split}: cannot be loaded: {one_line(error)[:300]}") from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise InputError(f"data {location}: no split {split!r}; allowed: {', '.join(saved)}")
    return saved[split]


def _cache_of(folder: Path, cache: Path) -> str:
    """Where the library keeps its tables of a local folder: another place if any file changes. By itself it goes by the
    names and times of the files."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        info = path.stat()
        found.update(f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} ".encode() + os.fsencode(path) + b"\0")
    return str(cache / f"local-{found.hexdigest()[:32]}")


def read_image_file(path: str, *, where: str) -> bytes:
    """Content of a local file, or of a URL that fsspec supports."""
    try:
        if "://" in path:
            with fsspec.open(path, "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{where}: cannot read {path} ({reason})") from None


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
        from huggingface_hub.constants import HF_HUB_CACHE

        own = [] if root is None else [expand(root)]
        own += [Path(dataset)] if Path(dataset).is_dir() else []
        caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
        self._starts = own
        self._roots = [Path(each).resolve() for each in (*own, *caches, HF_HUB_CACHE)]
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
        return read_image_file(self._allowed(path, where), where=where), path

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
