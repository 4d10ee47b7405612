"""Test sets in WebDataset shards: CLIP_benchmark's and DataComp's folders, local or remote.

FOLDER/dataset_type.txt                         retrieval or multilabel; missing: classification
FOLDER/classnames.txt                           not for retrieval; other prompts are matched with it by name
FOLDER/zeroshot_classification_templates.txt    not for retrieval
FOLDER/SPLIT/nshards.txt
FOLDER/SPLIT/0.tar ..                           samples of webp, png, jpg or jpeg, and cls, npy or txt

Or a local folder of tar files alone, as img2dataset writes them, without splits: FOLDER/00000.tar .. Without
dataset_type.txt, the first sample tells its type; tables beside the tar files are not read.
"""

import hashlib
import io
import logging
import math
import re
import secrets
import tarfile
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from clipdistill.data import ShardIndex, index_shards
from clipdistill.data.sample import IMAGE_EXTENSIONS, RawSample, SampleReader, find_image
from clipdistill.data.shard_format import BadSampleError
from clipdistill.data.tar_shards import split_name
from clipdistill.distributed.collectives import rank, world_size
from clipdistill.errors import InputError
from clipdistill.evaluation.ranks import on_all_ranks, with_shared_errors
from clipdistill.evaluation.sets.samples import EncodedSample, EvaluationSet, Kind, digest, name_classes
from clipdistill.io.caches import COPIES, mark_used
from clipdistill.io.files import new_file
from clipdistill.io.paths import expand
from clipdistill.io.retries import may_pass, status_of
from clipdistill.io.urls import NUMBER_FILE, ShardFile, Stat, expand_urls, one_line, read_small, shown, stat
from clipdistill.models.class_matching import ClassLabels
from clipdistill.models.prompts import CLASSNAMES_FILE, TEMPLATE_FILES, PromptSet, parse_classnames

log = logging.getLogger(__name__)

_ANNOTATION: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_TEXT_BYTES = 64 << 20
_MOST_SHARDS = 1_000_000
_FIRST_MEMBERS = 20
_DOWNLOAD_BYTES = 8 << 20
_DIGITS = 32
"""Of the digests in the names of copies."""


def is_shard_set(folder: Path, split: str) -> bool:
    """Whether a local folder has shards of the split, or is a folder of tar files alone."""
    return (folder / split / NUMBER_FILE).is_file() or bool(_tars_alone(folder))


def _tars_alone(folder: Path) -> list[str]:
    """The tar files of a folder that has no number of them."""
    if not folder.is_dir() or (folder / NUMBER_FILE).exists() or next(folder.glob("*.tar"), None) is None:
        return []
    return expand_urls([str(folder)])


def open_shard_set(
    root: str,
    *,
    split: str,
    prompts: PromptSet | None,
    by_order: bool,
    load_prompts: Callable[[str | Path], PromptSet],
    cache: Path | None,
) -> EvaluationSet:
    """Open a folder of shards; every rank calls this, and indexes its share of the shards.

    Args:
        root: path or URL; the page of a data set on the Hugging Face Hub stands for its files.
        split: which split.
        prompts: replaces the folder's own; the classes of both are matched by name.
        by_order: match them by order.
        load_prompts: loads a folder's own prompts.
        cache: folder for indexes and copies of remote shards; None: neither is cached.

    Raises:
        InputError: a missing, damaged or unreachable file, or a class that is not among the prompts'.
    """
    root = _hub_files(root).rstrip("/")
    found = with_shared_errors(
        lambda: _describe(root, split=split, prompts=prompts, by_order=by_order, load_prompts=load_prompts)
    )
    reader = ShardReader(found.urls, kind=found.kind, labels=found.labels, cache=cache)
    return EvaluationSet(name=found.name, kind=found.kind, prompts=found.prompts, reader=reader)


class ShardReader:
    """Samples of shards; see `clipdistill.evaluation.sets.samples.Reader`.

    Creating one is a collective call: each rank indexes its share of the shards, and copies the remote ones to the
    cache.

    Args:
        urls: the shards.
        kind: of the annotations.
        labels: reads labels; unused for captions.
        cache: folder for indexes and copies of remote shards; None: neither is cached.

    Raises:
        InputError: a missing or damaged shard.
    """

    def __init__(self, urls: tuple[str, ...], *, kind: Kind, labels: ClassLabels, cache: Path | None) -> None:
        self._urls = urls
        self._kind = kind
        self._labels = labels
        self._cache = cache
        self._copies: dict[str, str] = {}
        shares = on_all_ranks(lambda: [self._index(url) for url in urls[rank() :: world_size()]])
        found = [shares[number % world_size()][number // world_size()] for number in range(len(urls))]
        self._shards = [index for index, _ in found]
        self._versions = [version for _, version in found]
        self._starts = list(accumulate((len(shard) for shard in self._shards), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, positions: range) -> Iterator[EncodedSample]:
        """The samples of a range."""
        shards = list(self._shards)
        reader = SampleReader(shards, frozenset((*IMAGE_EXTENSIONS, _ANNOTATION[self._kind])))
        number = -1
        try:
            for position in positions:
                previous, number = number, bisect_right(self._starts, position) - 1
                if number != previous:
                    url = self._urls[number]
                    with _shard_errors(url):
                        shards[number] = replace(shards[number], url=self._cached(url, self._versions[number]))
                raw = reader.read(number, position - self._starts[number])
                yield self._sample(raw, f"{shown(self._urls[number])}: sample {raw.key}")
        finally:
            reader.close()

    def _index(self, url: str) -> tuple[ShardIndex, Stat]:
        with _shard_errors(url):
            version = stat(url)
            (index,) = index_shards([self._cached(url, version)], cache_dir=self._cache)
        if index.problems:
            raise InputError(f"shard {shown(url)}: {index.problems[0]}; allowed: a complete tar file")
        return index, version

    def _cached(self, url: str, version: Stat) -> str:
        """Path of the cached copy of a remote shard; the shard itself if it is local or nothing is cached."""
        if self._cache is None or "://" not in url:
            return url
        if url not in self._copies or not Path(self._copies[url]).is_file():
            self._copies[url] = str(_copy(url, version, self._cache))
        return self._copies[url]

    def _sample(self, raw: RawSample, where: str) -> EncodedSample:
        if raw.fault is not None:
            raise InputError(f"{where}: {raw.fault.reason}: {raw.fault.detail}")
        member = _ANNOTATION[self._kind]
        if member not in raw.members:
            raise InputError(f"{where}: has {raw.extensions}; allowed: an image and {member}")
        annotation = _read_annotation(self._kind, raw.members[member], self._labels, where)
        try:
            data = find_image(raw)
        except BadSampleError as bad:
            raise InputError(f"{where}: {bad.detail}; allowed: an image and {member}") from bad
        return EncodedSample(key=raw.key, where=where, data=data, **annotation)


@dataclass(frozen=True)
class _Description:
    name: str
    urls: tuple[str, ...]
    kind: Kind
    prompts: PromptSet
    labels: ClassLabels


def _describe(
    root: str,
    *,
    split: str,
    prompts: PromptSet | None,
    by_order: bool,
    load_prompts: Callable[[str | Path], PromptSet],
) -> _Description:
    urls = () if "://" in root or Path(root, split, NUMBER_FILE).is_file() else tuple(_tars_alone(Path(root)))
    kind = _kind_of(urls[0]) if urls else "classification"
    urls = urls or _listed(f"{root}/{split}")
    match (_text(f"{root}/dataset_type.txt") or "").strip().lower():
        case "retrieval":
            kind = "retrieval"
        case "multilabel":
            kind = "multilabel"
        case "classification":
            kind = "classification"
        case "":
            pass
        case other:
            allowed = "classification, multilabel, retrieval"
            raise InputError(f"{shown(root)}/dataset_type.txt: {other[:40]!r}; allowed: {allowed}")
    name = Path(root).resolve().name if "://" not in root else root.rpartition("/")[2].partition("@")[0]
    if kind == "retrieval":
        return _Description(name, urls, kind, PromptSet(name=name, classnames=(), templates=()), ClassLabels(None))
    if prompts is None:
        prompts = load_prompts(root) if "://" not in root else _load_remote_prompts(root, load_prompts)
        return _Description(name, urls, kind, prompts, ClassLabels(prompts.classnames))
    own = _text(f"{root}/{CLASSNAMES_FILE}")
    if own is None:
        return _Description(name, urls, kind, prompts, ClassLabels(prompts.classnames))
    names = parse_classnames(own.encode(), where=f"{shown(root)}/{CLASSNAMES_FILE}")
    prompts, indices = name_classes(name, names, prompts, by_order=by_order)
    return _Description(name, urls, kind, prompts, ClassLabels(names, indices))


def _listed(folder: str) -> tuple[str, ...]:
    """The shards of a split, as many as its ``nshards.txt`` says."""
    listing = f"{folder}/{NUMBER_FILE}"
    text = (_text(listing) or "").strip()
    if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= _MOST_SHARDS:
        raise InputError(
            f"{shown(listing)}: {text[:40]!r}; allowed: a positive number of shards, at most {_MOST_SHARDS:,}"
        )
    urls = tuple(f"{folder}/{number}.tar" for number in range(int(text)))
    for url in urls:
        if "://" not in url and not Path(url).is_file():
            raise InputError(f"{listing}: lists {text} shards, but {url} is missing")
    return urls


def _kind_of(shard: str) -> Kind:
    """The kind of the annotations of a local shard, by the members of its first sample."""
    with _shard_errors(shard), tarfile.open(shard, "r:") as tar:
        members = (split_name(member.name) for member in islice(tar, _FIRST_MEMBERS) if member.isfile())
        named = [each for each in members if each is not None]
    found = [extension for key, extension in named if key == named[0][0]]
    kind = next((kind for kind, extension in _ANNOTATION.items() if extension in found), None)
    if kind is None:
        raise InputError(
            f"shard {shard}: begins with {', '.join(found) or 'no sample'}; allowed: an image and one of "
            f"{', '.join(_ANNOTATION.values())}"
        )
    return kind


def _hub_files(root: str) -> str:
    """URL of the files behind a Hub page, as CLIP_benchmark and DataComp list their sets; other locations unchanged."""
    page = re.fullmatch(r"https://huggingface\.co/datasets/([^/]+/[^/]+)(?:/tree/([^/]+)(/.+?)?)?/?", root)
    if page is None:
        return root
    repository, revision, path = page.groups()
    return f"hf://datasets/{repository}@{revision or 'main'}{path or ''}"


def _load_remote_prompts(root: str, load_prompts: Callable[[str | Path], PromptSet]) -> PromptSet:
    """Load a remote folder's own prompt set; errors name the remote folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (CLASSNAMES_FILE, *TEMPLATE_FILES):
            text = _text(f"{root}/{name}")
            if text is not None:
                Path(folder, name).write_text(text, encoding="utf-8")
        try:
            return load_prompts(folder)
        except InputError as error:
            raise InputError(str(error).replace(folder, shown(root))) from None


def _text(path: str) -> str | None:
    """Content of a local or remote text file; None if it does not exist."""
    try:
        content = read_small(path, _TEXT_BYTES + 1)
        if len(content) > _TEXT_BYTES:
            raise InputError(f"{shown(path)}: is too large; allowed: a text file of {_TEXT_BYTES >> 20} MiB")
        return content.decode("utf-8")
    except InputError:
        raise
    except Exception as error:  # each filesystem raises errors of its own
        if isinstance(error, FileNotFoundError) and not may_pass(error):
            if status_of(error) not in (None, 404, 410):  # some stores answer so for any file that is not there
                log.warning("%s counts as missing: %s", shown(path), one_line(error, path))
            return None
        raise InputError(f"{shown(path)}: cannot be read: {one_line(error, path)}") from error


@contextmanager
def _shard_errors(url: str) -> Iterator[None]:
    """Convert any error of reading a shard to a one-line InputError that names the shard."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each filesystem raises errors of its own
        raise InputError(f"shard {shown(url)}: cannot be read: {one_line(error, url)}") from error


def _copy(url: str, version: Stat, cache: Path) -> Path:
    """The cached copy of this version of a remote shard, ``VERSION-CONTENT.tar``; downloaded if it is missing, or not
    what was downloaded."""
    folder = expand(cache) / COPIES
    made_of = [url, version.size, version.etag or version.modified] if version.is_known else [url]
    name = digest(made_of)[:_DIGITS]
    for copy in folder.glob(f"{name}-*.tar"):
        with copy.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]
        if version.is_known and copy.stem == f"{name}-{content}":
            mark_used(copy)
            return copy
        copy.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / f"{name}.{secrets.token_hex(8)}.tar"  # another process may copy the same shard
    shard, found = ShardFile(url, stat=version), hashlib.sha256()
    try:
        with new_file(complete) as temporary, temporary.open("wb") as file:
            while data := shard.read_at(file.tell(), _DOWNLOAD_BYTES):
                file.write(data)
                found.update(data)
            if file.tell() != version.size:
                raise InputError(f"shard {shown(url)}: ends at byte {file.tell():,}; allowed: {version.size:,} bytes")
    finally:
        shard.close()
    return complete.rename(folder / f"{name}-{found.hexdigest()[:_DIGITS]}.tar")


def _read_annotation(kind: Kind, content: bytes, labels: ClassLabels, where: str) -> dict[str, Any]:
    """The annotation as fields of ``EncodedSample``."""
    if kind == "retrieval":
        try:
            captions = tuple(content.decode("utf-8").splitlines())
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: txt: {one_line(error)}; allowed: captions in UTF-8") from error
        if not any(caption.strip() for caption in captions):
            raise InputError(f"{where}: txt has no caption; allowed: one or more, one per line")
        return {"captions": captions}
    if kind == "multilabel":
        try:
            marks_C = _read_array(content)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{where}: npy: {one_line(error)}; allowed: an array of 0 and 1") from error
        if marks_C.ndim != 1:
            raise InputError(f"{where}: npy of shape {marks_C.shape}; allowed: one number per class")
        return {"classes": tuple(_class_index(number, labels, where) for number in np.flatnonzero(marks_C).tolist())}
    text = content.decode("utf-8", "replace").strip()
    return {"label": _class_index(int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text, labels, where)}


def _class_index(label: int | str, labels: ClassLabels, where: str) -> int:
    index = labels.index(label)
    if index is None:
        count = len(labels.names or ())
        raise InputError(
            f"{where}: label {label!r:.40}; allowed: 0 to {count - 1} (there are {count} class names), or a name"
        )
    return index


def _read_array(content: bytes) -> NDArray[Any]:
    """An array in npy format; its header is believed only as far as the content goes.

    Raises:
        ValueError, EOFError: it is damaged, holds no numbers, or claims more of them than there are.
    """
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    shape, _, dtype = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"type {dtype}")
    if math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError(f"shape {shape} in {len(content):,} bytes")
    return np.load(io.BytesIO(content), allow_pickle=False)
