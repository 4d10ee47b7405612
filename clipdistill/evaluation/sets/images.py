"""Test sets in plain folders: one folder of images per class, in ROOT or in ROOT/SPLIT."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, digest, name_classes
from clipdistill.models.prompts import PromptSet
from clipdistill.shards.sources import FOLDER_SUFFIXES


def find_class_folders(folder: Path) -> list[Path]:
    """The subfolders, sorted, if each of them holds images; else none."""
    if not folder.is_dir():
        return []
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return folders if all(next(_images(path), None) for path in folders) else []


def open_image_set(folders: Sequence[Path], *, name: str, prompts: PromptSet | None) -> EvaluationSet:
    """Open a set of class folders; ``prompts`` as in `clipdistill.evaluation.sets.samples.name_classes`.

    Raises:
        InputError: ``prompts`` has neither the folders' names nor the same number of classes.
    """
    prompts, numbers = name_classes(name, [folder.name for folder in folders], prompts)
    files = [(path, numbers[folder.name]) for folder in folders for path in sorted(_images(folder))]
    return EvaluationSet(
        name=name, kind="classification", prompts=prompts, reader=FolderReader(folders[0].parent, files)
    )


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
            yield EncodedSample(key=self._key(path), where=str(path), data=data, label=label)

    def identity(self) -> str:
        """Digest of the names, sizes, times and classes of the files."""
        infos = [(self._key(path), path.stat(), label) for path, label in self._files]
        return digest([[key, info.st_size, info.st_mtime_ns, label] for key, info, label in infos])

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _images(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file())
