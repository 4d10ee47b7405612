"""Teachers' embeddings of a shard's samples, in one file: `FOLDER/<shard's stem>-<its digest>.safetensors`.

    valid        (N,)         uint8: 0 for an unusable sample
    content      (N,)         int64: digest of the sample's image and caption as stored in the shard
    label        (N,)         int64: -1 for a sample without one, -2 for one that is a name
    image.T      (N, K, D)    of teacher T: unit-norm image embedding of each stored view
    pixels       (N, K, 3, H, W)  uint8, where pixels are stored: the views themselves
    captions     (N,)         int64, where captions are stored: number of the sample's captions
    captions.T   (M, D)       of teacher T: unit-norm text embedding of each caption, sample by sample
    *.scale      (N, K), (M,) float32: factor of an int8 row

The header holds the key (everything that the embeddings depend on) and a digest of the tensors. A file with another
key, or with changed bytes, is never used.

Shapes: N samples of a shard, M captions, K views, D dimensions of a teacher, B samples of a batch.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdistill.data.image import Pixels
from clipdistill.data.index import ShardIndex
from clipdistill.data.sample import BROKEN_IMAGE, IMAGE_EXTENSIONS, BadSampleError, RawSample
from clipdistill.errors import InputError
from clipdistill.io.files import new_file, writing
from clipdistill.io.urls import file_name, shown
from clipdistill.models.outputs import ModelOutputs

EMBEDDING_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""Storage formats of embeddings."""

NAMED = -2
"""Stored label of a sample whose own label is a class name."""

_FORMAT = 3
_OPEN_FILES = 64


def pack(rows: Tensor, precision: str) -> dict[str, Tensor]:
    """Rows (..., D) in their stored form: ``""`` the values, and for int8 ``".scale"`` each row's factor."""
    if precision != "int8":
        return {"": rows.to(EMBEDDING_DTYPES[precision]).cpu().contiguous()}
    scale = rows.float().abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    whole = (rows.float() / scale[..., None]).round().to(torch.int8)
    return {"": whole.cpu().contiguous(), ".scale": scale.cpu().contiguous()}


def unpack(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Stored rows as float32."""
    return rows.float() if scale is None else rows.float() * scale[..., None]


def bytes_per_sample(
    dimensions: Sequence[int], *, views: int, captions: float, precision: str, view_bytes: int = 0
) -> int:
    """Size of a sample in its file: all teachers' rows, their scales, its pixels, and its own fields.

    Args:
        dimensions: of each teacher's embeddings.
        views: stored views.
        captions: mean number of captions stored of a sample; 0: none are.
        precision: storage format of embeddings.
        view_bytes: of the stored pixels of a view; 0: none are.
    """
    row = sum(dimensions) * EMBEDDING_DTYPES[precision].itemsize + (4 * len(dimensions) if precision == "int8" else 0)
    return round(row * (views + captions)) + view_bytes * views + 17 + (8 if captions else 0)


def content_digest(raw: RawSample, *, caption_key: str, label_key: str) -> int:
    """A 63-bit digest of a sample's image, caption and label as stored in the shard."""
    digest = hashlib.blake2b(digest_size=8)
    texts = ("txt" if caption_key == "txt" else "json", "cls" if label_key == "cls" else "json")
    for name in (*IMAGE_EXTENSIONS, *dict.fromkeys(texts)):
        if name in raw.members:
            digest.update(f"{name}:{len(raw.members[name])}:".encode())
            digest.update(raw.members[name])
    return int.from_bytes(digest.digest(), "big") >> 1


def embedding_file(folder: Path, shard: ShardIndex) -> Path:
    """Path of a shard's embeddings."""
    stem = file_name(shard.url).removesuffix(".tar")
    return folder / f"{stem}-{shard.digest}.safetensors"


def write_embeddings(folder: Path, shard: ShardIndex, tensors: Mapping[str, Tensor], key: Mapping[str, Any]) -> None:
    """Write a shard's file atomically, with what identifies the shard's content.

    Raises:
        RunError: The disk is full...
    """
    path = embedding_file(folder, shard)
    header = {
        "format": str(_FORMAT),
        "key": json.dumps(key, sort_keys=True),
        "shard": shard.content,
        "digest": _digest(tensors),
    }
    with writing(f"teacher cache {path.name}", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            save_file(dict(tensors), temporary, metadata=header)


def find_fault(folder: Path, shard: ShardIndex, key: Mapping[str, Any], *, thorough: bool) -> str | None:
    """Reason why a shard's file cannot be used, None if it can.

    Args:
        folder: The folder of the files.
        shard: The shard, whose labels, captions and images must be those that the file was made from.
        key: The key that its header must hold.
        thorough: Also read the entire file and verify its digest.
    """
    path, samples = embedding_file(folder, shard), len(shard)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != str(_FORMAT):
                return f"format {header.get('format')}, this version reads {_FORMAT}"
            difference = _difference(json.loads(header["key"]), json.loads(json.dumps(key)))
            if difference:
                return f"stale: {difference}"
            if header["shard"] != shard.content:
                return "stale: the shard's labels, captions or images have changed"
            if file.get_slice("valid").get_shape() != [samples]:
                return f"stale: it holds {file.get_slice('valid').get_shape()[0]} samples, the shard {samples}"
            if thorough and _digest(_tensors(file)) != header["digest"]:
                return "damaged: its bytes differ from those written"
    except FileNotFoundError:
        return "missing"
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return f"damaged: {' '.join(str(error).split())}"
    return None


class EmbeddingReader:
    """Embeddings of samples, by shard and number; files are memory-mapped, and verified when first opened.

    Args:
        folder: Folder of the files.
        index: All shards.
        key: The key that every file's header must hold.
    """

    def __init__(self, folder: Path, index: Sequence[ShardIndex], key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._index = index
        self._key = key
        self._files: OrderedDict[int, _File] = OrderedDict()

    def check(self) -> None:
        """Check that every shard has a file with the right key.

        Raises:
            InputError: A shard has none; the message names the first.
        """
        faults = []
        for shard in self._index:
            fault = find_fault(self._folder, shard, self._key, thorough=False)
            if fault:
                faults.append(f"{embedding_file(self._folder, shard).name} {fault}")
        if faults:
            raise InputError(
                f"teacher_cache.folder: {self._folder} cannot serve {len(faults)} of {len(self._index)} shards, "
                f"the first for {faults[0]}; allowed: a cache written by `clipdistill cache` with this config"
            )

    def pixels(self, shard: int, sample: int, view: int) -> Pixels | None:
        """The stored pixels of a view (3, H, W); None if none are stored, or the sample was bad.

        Raises:
            InputError: The file is damaged.
        """
        if not self._key["pixels"]:
            return None
        file = self._open(shard)
        return file.tensors["pixels"][sample, view].numpy() if file.contents[sample] is not None else None

    def check_image(self, shard: int, sample: int) -> None:
        """Check that the image of a sample, which will be decoded later, was good when the file was made.

        Raises:
            BadSampleError: It was not.
        """
        if self._open(shard).contents[sample] is None:
            raise BadSampleError(BROKEN_IMAGE, "the teacher cache could not decode it")

    def read(self, shard: int, sample: int, view: int, caption: int, raw: RawSample) -> list[ModelOutputs]:
        """Each teacher's embeddings of a view of a sample, and of one caption if captions are stored; (D,) float32.

        Raises:
            InputError: The file is damaged, or was computed from other content of the shard.
        """
        file = self._open(shard)
        keys = {"caption_key": self._key["caption_key"], "label_key": self._key["label_key"]}
        if file.contents[sample] != content_digest(raw, **keys):
            raise InputError(
                f"teacher_cache.folder: sample {raw.key!r} of {shown(raw.url)} is not what {self._path(shard).name} "
                "was made from; allowed: the same shards, or `clipdistill cache --rebuild`"
            )

        def row(name: str, *at: int) -> Tensor:
            scale = file.tensors.get(f"{name}.scale")
            return unpack(file.tensors[name][at], None if scale is None else scale[at])

        return [
            ModelOutputs(
                row(f"image.{teacher}", sample, view),
                row(f"captions.{teacher}", file.first_captions[sample] + caption) if file.first_captions else None,
            )
            for teacher in range(len(self._key["teachers"]))
        ]

    def everything(self, shard: int) -> tuple[list[Tensor], Tensor]:
        """All views of a shard's usable samples: each teacher's image embeddings (M, D), float32, and the labels (M,).

        Raises:
            InputError: The file is damaged.
        """
        tensors = self._open(shard).tensors
        usable_N = tensors["valid"].bool()
        images = []
        for teacher in range(len(self._key["teachers"])):
            scale = tensors.get(f"image.{teacher}.scale")
            image_NKD = unpack(tensors[f"image.{teacher}"][usable_N], None if scale is None else scale[usable_N])
            images.append(image_NKD.flatten(0, 1))
        return images, tensors["label"][usable_N].repeat_interleave(self._key["views"])

    def url(self, shard: int) -> str:
        """The shard itself."""
        return self._index[shard].url

    def _path(self, shard: int) -> Path:
        return embedding_file(self._folder, self._index[shard])

    def _open(self, shard: int) -> "_File":
        if shard not in self._files:
            path = self._path(shard)
            fault = find_fault(self._folder, self._index[shard], self._key, thorough=True)
            if fault:
                raise InputError(
                    f"teacher_cache.folder: {path} {fault}; allowed: a file rebuilt by `clipdistill cache`"
                )
            with safe_open(path, framework="pt") as file:
                self._files[shard] = _File.of(_tensors(file))
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]


class _File(NamedTuple):
    """An open file; what is looked up for each sample is a list."""

    tensors: dict[str, Tensor]
    contents: list[int | None]
    """Digest of each sample's content; None: the sample is unusable."""
    first_captions: list[int]
    """Row of each sample's first caption; empty if captions are not stored."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "_File":
        pairs = zip(tensors["content"].tolist(), tensors["valid"].tolist(), strict=True)
        captions_N = tensors.get("captions")
        first = [] if captions_N is None else (captions_N.cumsum(0) - captions_N).tolist()
        return cls(tensors, [content if valid else None for content, valid in pairs], first)


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}:".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _difference(then: Any, now: Any, at: str = "") -> str | None:
    """Description of the first setting that differs, None if all are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in now:
            found = _difference(then.get(name), now[name], f"{at}.{name}" if at else name)
            if found:
                return found
        return None
    return None if then == now else f"{at} was {then!r} and is {now!r}"
