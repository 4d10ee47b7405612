"""Build the files of the teacher cache.

Each shard has its own file (data/embeddings.py), written when it is complete: an interrupted build resumes with the
shards that have none, and files from several machines can be copied into one folder.

Shapes: N samples of a shard, n samples of a chunk, m of their captions, K views, H and W pixels, L tokens, D
dimensions of a teacher.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clipdistill.data import ShardIndex
from clipdistill.data.embeddings import (
    NAMED,
    bytes_per_sample,
    content_digest,
    embedding_file,
    find_fault,
    pack,
    write_embeddings,
)
from clipdistill.data.encoded import DeviceDecoder, EncodedImages
from clipdistill.data.image import EncodedView
from clipdistill.data.plan import view_pixels
from clipdistill.data.reading import Views
from clipdistill.data.sample import BROKEN_IMAGE, BadSampleError, Decoder, SampleReader
from clipdistill.data.shard_format import SHARD_UNREADABLE
from clipdistill.data.workers import dead_worker_message, from_workers
from clipdistill.errors import InputError, RunError
from clipdistill.io.images import as_size
from clipdistill.io.urls import file_name, shown
from clipdistill.models.embedding_table import EmbeddingTable
from clipdistill.models.towers import FrozenModel
from clipdistill.settings import LocalPath, Settings

_PROBE = ("a photo of a dog", "Größe 42, naïve café!", "zwölf 猫 \u1f98a <b>2.5</b>")
"""Texts whose tokens identify a tokenizer."""

log = logging.getLogger(__name__)


class TeacherCacheSettings(Settings):
    """The teachers' embeddings, which ``clipdistill cache`` computes once for all views of all samples."""

    folder: LocalPath = ""
    """Folder of the files, one per shard; empty: the teachers run in every step."""
    precision: Literal["fp32", "bf16", "int8"] = "bf16"
    """fp32, bf16, or int8 (with a factor per row)."""
    pixels: bool = False
    """Also store the pixels of all views, uncompressed: training then decodes and augments nothing. A view takes three
    bytes a pixel: 150 KB at 224 x 224."""


@dataclass(frozen=True, kw_only=True)
class CacheContent:
    """What is stored, and everything except shards and teachers that the stored values depend on."""

    decoder: Decoder
    """Decodes the pixels that all towers see. The captions' text embeddings are stored if it requires captions."""
    views: Views
    """The stored augmentations of each sample: K of them."""
    precision: str = "bf16"
    """Storage format of embeddings: fp32, bf16, or int8 with a factor per row."""
    pixels: bool = False
    """Whether the views' pixels are stored too."""

    def __post_init__(self) -> None:
        if self.views.number < 1:
            raise InputError(f"data.views: {self.views.number} is not allowed; allowed: 1 or more")

    @property
    def captions(self) -> bool:
        """Whether the captions' text embeddings are stored."""
        return self.decoder.require_captions

    def key(self, teachers: Sequence[FrozenModel], *, device: torch.device | str) -> dict[str, Any]:
        """The key in a file's header: everything that the embeddings depend on.

        Args:
            teachers: the models.
            device: of the run or build, whose decoder of JPEGs may make the pixels.
        """
        identities = []
        for teacher in teachers:
            identity = {"dimensions": teacher.embed_dim, "image": teacher.image_fingerprint()}
            if self.captions:
                identity["text"] = teacher.text_fingerprint()
                identity["tokens"] = teacher.tokenize(_PROBE).tolist()
            identities.append(identity)
        decoder, augmentation = self.decoder, self.decoder.augmentation
        return {
            "teachers": identities,
            "views": self.views.number,
            "seed": self.views.seed,
            "image_size": list(as_size(decoder.image_size)),
            "augmentation": None if augmentation is None else augmentation.model_dump(mode="json"),
            "max_pixels": decoder.max_pixels,
            "caption_key": decoder.caption_key,
            "label_key": decoder.label_key,
            "captions": self.captions,
            "precision": self.precision,
            "pixels": self.pixels,
            "jpegs_decoded_on": torch.device(device).type if self.decoder.on_device else None,
        }


@dataclass(frozen=True, kw_only=True)
class CacheEstimate:
    """Estimated cost of a build."""

    samples: int
    """Samples of the shards that have no file yet."""
    shards: int
    bytes_per_sample: int
    seconds_per_sample: float
    """Measured on the first chunk, all its views."""

    @property
    def bytes(self) -> int:
        """Disk space that the build needs."""
        return self.samples * self.bytes_per_sample

    @property
    def seconds(self) -> float:
        """Time that the build takes with one process."""
        return self.samples * self.seconds_per_sample


@dataclass(kw_only=True)
class CacheBuild:
    """Result of a build."""

    written: int = 0
    """Number of files written."""
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Bad samples by reason."""


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some samples of a shard, decoded in every view."""

    shard: int
    start: int
    pixels: Tensor
    """(n, K, 3, H, W) uint8; of the samples alone that are not encoded, before the chunk is decoded."""
    captions: list[str]
    """All captions of all samples."""
    captions_n: Tensor
    """Their number of each sample."""
    labels_n: Tensor
    content_n: Tensor
    valid_n: Tensor
    skips: list[tuple[str, str, str]]
    """Key, reason and detail of each bad sample."""
    keys: list[str] = field(default_factory=list)
    encoded: EncodedImages | None = None
    """JPEGs that are decoded on the device; row n * K + k is view k of sample n."""

    def pin_memory(self) -> "_Chunk":
        """The chunk with its pixels in pinned memory; DataLoader calls this."""
        return replace(self, pixels=self.pixels.pin_memory())

    def with_images(self, decode: DeviceDecoder) -> "_Chunk":
        """The chunk with its encoded images decoded; a broken one is a bad sample."""
        if self.encoded is None:
            return self
        samples, views = len(self.labels_n), self.pixels.shape[1]
        pixels, faults = decode(self.pixels.flatten(0, 1), self.encoded, samples * views)
        broken = {row // views: fault for row, fault in faults.items()}
        ends = self.captions_n.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        gone = torch.tensor([sample in broken for sample in range(samples)])
        return replace(
            self,
            pixels=pixels.unflatten(0, (samples, views)),
            captions=[
                caption
                for sample, (start, end) in enumerate(zip(starts, ends, strict=True))
                if sample not in broken
                for caption in self.captions[start:end]
            ],
            captions_n=self.captions_n.masked_fill(gone, 0),
            labels_n=self.labels_n.masked_fill(gone, 0),
            content_n=self.content_n.masked_fill(gone, 0),
            valid_n=self.valid_n.masked_fill(gone, 0),
            skips=self.skips + [(self.keys[sample], BROKEN_IMAGE, fault) for sample, fault in broken.items()],
            encoded=None,
        )


class CacheBuilder:
    """Builds the files of shards.

    Args:
        index: All shards.
        teachers: The models.
        content: What is stored.
        folder: Folder of the files.
        batch_size: Samples decoded and encoded at once, each in all its views.
        workers: Decoding processes; 0: none.
        device: Device of the teachers.
    """

    def __init__(
        self,
        index: Sequence[ShardIndex],
        teachers: Sequence[FrozenModel],
        content: CacheContent,
        *,
        folder: Path,
        batch_size: int,
        workers: int,
        device: torch.device | str,
    ) -> None:
        self.index = index
        self.teachers = teachers
        self.content = content
        self.folder = folder
        self.batch_size = batch_size
        self.workers = workers
        self.device = torch.device(device)
        self.key = content.key(teachers, device=self.device)
        self._decode = DeviceDecoder(self.device) if content.decoder.on_device else None

    def missing(self, numbers: Sequence[int] | None = None) -> list[int]:
        """Those of the numbered shards (None: of all) that have no complete file with this key and the shard's content;
        stale and damaged files are logged."""
        missing = []
        for number in range(len(self.index)) if numbers is None else numbers:
            shard = self.index[number]
            fault = find_fault(self.folder, shard, self.key, thorough=True)
            if fault:
                missing.append(number)
                path = embedding_file(self.folder, shard)
                if path.exists():
                    log.warning("%s is %s: it will be replaced", path, fault)
        return missing

    def estimate(self, numbers: Sequence[int]) -> CacheEstimate:
        """Estimate disk space and time for shards from one chunk of the first shard with samples.

        Raises:
            InputError: That shard cannot be read.
        """
        seconds, captions = 0.0, float(self.content.captions)
        for number in [number for number in numbers if len(self.index[number])][:1]:
            self._encode(next(self._chunks([number], workers=0)))
            started = time.perf_counter()
            chunk = next(self._chunks([number], workers=0))
            decoded = time.perf_counter()
            self._encode(chunk)
            decoding, encoding = decoded - started, time.perf_counter() - decoded
            seconds = max(decoding / self.workers, encoding) if self.workers else decoding + encoding
            seconds /= len(chunk.labels_n)
            captions *= len(chunk.captions) / len(chunk.labels_n)
        per_sample = bytes_per_sample(
            [teacher.embed_dim for teacher in self.teachers],
            views=self.content.views.number,
            captions=captions,
            precision=self.content.precision,
            view_bytes=3 * math.prod(as_size(self.content.decoder.image_size)) if self.content.pixels else 0,
        )
        return CacheEstimate(
            samples=sum(len(self.index[number]) for number in numbers),
            shards=len(numbers),
            bytes_per_sample=per_sample,
            seconds_per_sample=seconds,
        )

    def build(self, numbers: Sequence[int], *, progress: Callable[[int], None] = lambda _: None) -> CacheBuild:
        """Write the files of shards, one after another.

        Args:
            numbers: Numbers of the shards.
            progress: Called with the number of samples done.

        Raises:
            InputError: A shard cannot be read: it gets no file, the files of earlier shards are complete.
            RunError: The disk is full, or a decoding process has died.
        """
        try:
            return self._build(numbers, progress)
        except RuntimeError as error:
            message = dead_worker_message(error)
            if message is None:
                raise
            raise RunError(f"{message}; the files written so far are complete") from error

    def _build(self, numbers: Sequence[int], progress: Callable[[int], None]) -> CacheBuild:
        done = CacheBuild()
        chunks = self._chunks(numbers, workers=self.workers)
        with _Writer(self) as writer:
            for number in numbers:
                writer.write(number, self._encode_shard(number, chunks, done, progress))
                done.written += 1
        return done

    def _encode_shard(
        self, number: int, chunks: Iterator[_Chunk], done: CacheBuild, progress: Callable[[int], None]
    ) -> dict[str, Tensor]:
        """The tensors of a shard's file; its samples are counted in ``done``."""
        shard = self.index[number]
        parts: list[dict[str, Tensor]] = []
        for start in range(0, len(shard), self.batch_size):
            chunk = next(chunks)
            assert (chunk.shard, chunk.start) == (number, start)
            for key, reason, detail in chunk.skips:
                done.skipped[reason] += 1
                log.warning("skipped %r in %s: %s %s", key, shown(shard.url), reason, detail)
            parts.append(self._encode(chunk))
            done.samples += len(chunk.labels_n)
            progress(done.samples)
        if not parts:
            parts = [self._encode(_no_samples(number, self.content))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _chunks(self, numbers: Sequence[int], *, workers: int) -> Iterator[_Chunk]:
        chunks = from_workers(
            _Chunks(self, numbers),
            workers=workers,
            max_pixels=self.content.decoder.max_pixels,
            pin_memory=self.device.type == "cuda",
            shards=[file_name(shard.url) for shard in self.index],
        )
        for chunk in chunks:
            yield chunk if self._decode is None else chunk.with_images(self._decode)

    @torch.no_grad()
    def _encode(self, chunk: _Chunk) -> dict[str, Tensor]:
        """A chunk's rows in their stored form, by name."""
        tensors = {"valid": chunk.valid_n, "content": chunk.content_n, "label": chunk.labels_n}
        if self.content.captions:
            tensors["captions"] = chunk.captions_n
        if self.content.pixels:
            tensors["pixels"] = chunk.pixels.cpu()
        rows, views = chunk.pixels.shape[:2]
        image_BCHW = chunk.pixels.flatten(0, 1).to(self.device, non_blocking=True)
        for number, teacher in enumerate(self.teachers):
            if isinstance(teacher, EmbeddingTable):
                stored = self._look_up(teacher, number, chunk)
                tensors |= self._packed(stored)
                continue
            parts = [teacher.encode_image(part) for part in image_BCHW.split(self.batch_size)] if rows else []
            image_nKD = torch.cat(parts) if parts else torch.empty(0, teacher.embed_dim)
            stored = {f"image.{number}": image_nKD.view(rows, views, teacher.embed_dim)}
            if self.content.captions:
                text_mD = torch.empty(0, teacher.embed_dim)
                if chunk.captions:
                    tokenizer = teacher.text_tokenizer.for_device(self.device)
                    tokens = tokenizer.grouped(chunk.captions, at_most=self.batch_size)
                    text_mD = tokens.map(lambda each: each.to(self.device)).encode(teacher.encode_tokens)
                stored[f"captions.{number}"] = text_mD
            tensors |= self._packed(stored)
        return tensors

    def _packed(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows in their stored form, by name."""
        packed = {name: pack(values, self.content.precision) for name, values in stored.items()}
        return {name + suffix: tensor for name, parts in packed.items() for suffix, tensor in parts.items()}

    def _look_up(self, teacher: EmbeddingTable, number: int, chunk: _Chunk) -> dict[str, Tensor]:
        """A chunk's features from a table, the same for every view; zeros for bad samples.

        Raises:
            InputError: a sample has no row, or several captions.
        """
        shard = file_name(self.index[chunk.shard].url).removesuffix(".tar")
        valid = chunk.valid_n.bool()
        keys = [key for key, good in zip(chunk.keys, valid.tolist(), strict=True) if good]
        views = chunk.pixels.shape[1]
        image_nKD = torch.zeros(len(valid), views, teacher.embed_dim)
        look_up = partial(teacher.look_up, shard, keys, owner=self.index[chunk.shard].digest)
        image_nKD[valid] = look_up(captions=False)[:, None]
        stored = {f"image.{number}": image_nKD}
        if self.content.captions:
            several = [key for key, count in zip(keys, chunk.captions_n[valid].tolist(), strict=True) if count != 1]
            if several:
                raise InputError(
                    f"teachers.{number}.model: sample {several[0]!r} of shard {shard} has no caption or several; "
                    "allowed: one a sample, as embeddings have one"
                )
            stored[f"captions.{number}"] = look_up(captions=True)
        return stored


class _Writer:
    """Writes one shard's file in a thread, while the next shard is encoded."""

    def __init__(self, builder: CacheBuilder) -> None:
        self._builder = builder
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._wait()

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write a shard's file, once that of the shard before is complete.

        Raises:
            RunError: That one could not be written.
        """
        self._wait()
        builder = self._builder
        self._last = self._pool.submit(write_embeddings, builder.folder, builder.index[number], tensors, builder.key)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()


class _Chunks(IterableDataset["_Chunk | InputError"]):
    """The chunks of shards in their order; worker w of W decodes chunks w, w + W, ..."""

    def __init__(self, builder: CacheBuilder, numbers: Sequence[int]) -> None:
        super().__init__()
        self.index, self.content, self.batch_size = builder.index, builder.content, builder.batch_size
        self.numbers = numbers

    def __iter__(self) -> Iterator[_Chunk | InputError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = SampleReader(self.index, self.content.decoder.wanted)
        starts = [
            (number, start) for number in self.numbers for start in range(0, len(self.index[number]), self.batch_size)
        ]
        try:
            for number, start in starts[worker::workers]:
                yield self._chunk(reader, number, start)
        except InputError as error:
            yield error
        finally:
            reader.close()

    def _chunk(self, reader: SampleReader, number: int, start: int) -> _Chunk:
        shard, views, decoder = self.index[number], self.content.views, self.content.decoder
        size = as_size(decoder.image_size)
        samples = range(start, min(start + self.batch_size, len(shard)))
        pixels = np.zeros((len(samples), views.number, 3, *size), np.uint8)
        valid, content, labels, count = (np.zeros(len(samples), dtype) for dtype in (np.uint8, *3 * [np.int64]))
        captions: list[str] = []
        skips = []
        keys = []
        encoded: dict[int, EncodedView] = {}
        ready = 0
        for at, sample in enumerate(samples):
            raw = reader.read(number, sample)
            keys.append(raw.key)
            try:
                seeds = [view_pixels(views.seed, shard.digest, sample, view) for view in range(views.number)]
                for view, decoded in enumerate(decoder.decode_views(raw, seeds)):
                    if isinstance(decoded.pixels, EncodedView):
                        encoded[at * views.number + view] = decoded.pixels
                    else:
                        pixels[ready, view] = decoded.pixels
            except BadSampleError as bad:
                if bad.reason == SHARD_UNREADABLE:  # perhaps only temporarily
                    raise InputError(
                        f"shard {shown(shard.url)}: {bad.detail}; "
                        "allowed: a readable shard that is unchanged since it was indexed"
                    ) from bad
                skips.append((raw.key, bad.reason, bad.detail))
                ready += 1
                continue
            ready += at * views.number not in encoded
            valid[at], labels[at] = 1, decoded.label
            content[at] = content_digest(raw, caption_key=decoder.caption_key, label_key=decoder.label_key)
            if decoded.label < 0 and decoder.has_named_label(raw):
                labels[at] = NAMED
            captions += decoded.captions
            count[at] = len(decoded.captions)
        return _Chunk(
            shard=number,
            start=start,
            pixels=torch.from_numpy(pixels[:ready]),
            captions=captions,
            captions_n=torch.from_numpy(count),
            labels_n=torch.from_numpy(labels),
            content_n=torch.from_numpy(content),
            valid_n=torch.from_numpy(valid),
            skips=skips,
            keys=keys,
            encoded=EncodedImages.pack(encoded),
        )


def _no_samples(number: int, content: CacheContent) -> _Chunk:
    size = as_size(content.decoder.image_size)
    return _Chunk(
        shard=number,
        start=0,
        pixels=torch.zeros(0, content.views.number, 3, *size, dtype=torch.uint8),
        captions=[],
        captions_n=torch.zeros(0, dtype=torch.int64),
        labels_n=torch.zeros(0, dtype=torch.int64),
        content_n=torch.zeros(0, dtype=torch.int64),
        valid_n=torch.zeros(0, dtype=torch.uint8),
        skips=[],
    )
