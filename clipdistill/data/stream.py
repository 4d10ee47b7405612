"""The training stream: an endless iterable of batches, and the loader whose state is exact.

Shapes: B samples a batch of one rank; C = 3 channels, RGB; H = W = image_size.
"""

import logging
import signal
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clipdistill.data.image import Augmentation
from clipdistill.data.index import ShardIndex, fingerprint
from clipdistill.data.plan import Plan, Share
from clipdistill.data.sample import BadSampleError, Decoder, RawSample, SampleReader
from clipdistill.data.urls import shown
from clipdistill.errors import InputError

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a worker is: the next batch of its share of the epoch, and the next sample of the share's order.

    `position` runs ahead of batches x batch_size by the bad samples, past the share's end where they made it
    begin again.
    """

    epoch: int = 0
    batch: int = 0
    position: int = 0


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A bad sample that was passed over."""

    number: int
    url: str
    key: str
    reason: str
    detail: str


@dataclass(kw_only=True)
class Batch:
    """One step's samples of one rank."""

    image_BCHW: Tensor
    """uint8, RGB, 0 to 255: to be normalised for each tower on the device."""
    captions: list[str]
    """Empty where a sample has none."""
    labels_B: Tensor
    """int64; -1 where a sample has none."""
    keys: list[str]
    """The samples' names in their shards."""
    _worker: int = field(default=0, repr=False)
    _cursor: Cursor = field(default=Cursor(), repr=False)
    _skips: list[Skip] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device; from pinned memory without waiting for the copy."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory; DataLoader calls this."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, image_BCHW=change(self.image_BCHW), labels_B=change(self.labels_B))


class ImageTextStream(IterableDataset[Batch]):
    """An endless stream of batches for one rank, epoch after epoch. Iterate it through `StreamLoader`.

    Args:
        index: All shards, the same list on every rank.
        batch_size: Samples a rank and step.
        image_size: Side of the pixels, which all towers share.
        augmentation: Random changes of the image; None: the central square, always the same.
        seed: With the epoch, of everything random.
        shuffle: Window of the sample shuffle; 0: off (the order of shards changes each epoch all the same).
        rank: This process among `world_size`.
        world_size: Number of ranks.
        num_workers: Decoding processes of this rank; 0: none, decode in this one.
        caption_key: `txt`, or a field of the sample's json.
        label_key: `cls`, or a field of the sample's json.
        require_captions: Whether a sample without a caption is bad.
        require_labels: Whether a sample without a label is bad.
        num_classes: Length of the class list that labels index; None: labels are not checked.
        max_pixels: Images of more pixels are refused before they are decoded.

    A bad sample is passed over, and the worker goes on with the next of its share of the epoch; where the
    share ends early for that, it begins again with the share's first. So the number of steps stays, and only
    that many samples repeat.

    An `InputError` in a worker comes as the stream's last item, since DataLoader would bury its line in a
    traceback.

    Raises:
        InputError: The shards have too few samples for one step.
    """

    def __init__(
        self,
        index: Sequence[ShardIndex],
        *,
        batch_size: int,
        image_size: int,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008 (frozen)
        seed: int = 0,
        shuffle: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        caption_key: str = "txt",
        label_key: str = "cls",
        require_captions: bool = False,
        require_labels: bool = False,
        num_classes: int | None = None,
        max_pixels: int = 89_478_485,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be from 0 to {world_size - 1}")
        self.index = index
        self.rank = rank
        self.num_workers = num_workers
        self.plan = Plan(
            sizes=[len(shard) for shard in index],
            batch_size=batch_size,
            ranks=world_size,
            workers=max(1, num_workers),
            seed=seed,
            shuffle=shuffle,
        )
        self.decoder = Decoder(
            image_size=image_size,
            augmentation=augmentation,
            caption_key=caption_key,
            label_key=label_key,
            require_captions=require_captions,
            require_labels=require_labels,
            num_classes=num_classes,
            max_pixels=max_pixels,
        )
        self.start_at(0, [Cursor()] * self.plan.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in an epoch; every rank has as many."""
        return self.plan.steps

    def start_at(self, step: int, cursors: Sequence[Cursor]) -> None:
        """Let the next iteration begin with batch `step` of the run, each worker at its cursor."""
        self._start = step, list(cursors)

    def __iter__(self) -> Iterator[Batch | InputError]:  # type: ignore[override]
        info = get_worker_info()
        if (info.num_workers if info else 0) != self.num_workers:
            raise ValueError(f"num_workers is {self.num_workers}, must be the loader's")
        step, cursors = self._start
        worker = ((info.id if info else 0) + step) % self.plan.workers
        reader = SampleReader(self.index, self.decoder.wanted)
        try:
            yield from self._batches(worker, cursors[worker], reader)
        except InputError as error:
            yield error
        finally:
            reader.close()

    def _batches(self, worker: int, cursor: Cursor, reader: SampleReader) -> Iterator[Batch]:
        """All batches of a worker from a cursor on."""
        while True:
            if cursor.batch < self.plan.batches(cursor.epoch, worker):
                share = self.plan.share(cursor.epoch, self.rank, worker)
                raws = _given_out(share, cursor.position, reader)
                while cursor.batch < share.batches:
                    batch = self._batch(worker, cursor, share, raws)
                    cursor = batch._cursor
                    yield batch
            cursor = Cursor(epoch=cursor.epoch + 1)

    def _batch(self, worker: int, cursor: Cursor, share: Share, raws: Iterator[tuple[int, RawSample]]) -> Batch:
        """The next batch of a share, past its bad samples."""
        size, side = self.plan.batch_size, self.decoder.image_size
        image_BCHW = np.empty((size, 3, side, side), np.uint8)
        captions: list[str] = []
        labels: list[int] = []
        keys: list[str] = []
        skips: list[Skip] = []
        position, failures = cursor.position, 0
        while len(keys) < size:
            number, raw = next(raws)
            try:
                sample = self.decoder.decode(raw, self.plan.pixels(cursor.epoch, number))
            except BadSampleError as bad:
                failures += 1
                if position < len(share):
                    skips.append(Skip(number=number, url=raw.url, key=raw.key, reason=bad.reason, detail=bad.detail))
                if failures >= len(share):
                    raise InputError(self._nothing_usable(worker, cursor, share, raw, bad)) from bad
            else:
                failures = 0
                image_BCHW[len(keys)] = sample.pixels
                captions.append(sample.caption)
                labels.append(sample.label)
                keys.append(raw.key)
            position += 1
        return Batch(
            image_BCHW=torch.from_numpy(image_BCHW),
            captions=captions,
            labels_B=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            _worker=worker,
            _cursor=replace(cursor, batch=cursor.batch + 1, position=position),
            _skips=skips,
        )

    def _nothing_usable(self, worker: int, cursor: Cursor, share: Share, raw: RawSample, bad: BadSampleError) -> str:
        first, last = (shown(self.index[share.shard_N[end]].url) for end in (0, -1))
        return (
            f"shards: none of the {len(share)} samples of worker {worker} of rank {self.rank} in epoch "
            f"{cursor.epoch} can be used ({first} to {last}); {raw.key!r}: {bad.reason} {bad.detail}".rstrip()
        )


def _given_out(share: Share, position: int, reader: SampleReader) -> Iterator[tuple[int, RawSample]]:
    """A share's samples from a position of its order on, over and over; each with its number in the index.

    Samples are read in the order of the shards, and held, undecoded, until their turn: at most one shuffle
    window.
    """
    position %= len(share)
    while True:
        held: dict[int, RawSample] = {}
        unread = iter(np.sort(share.order_N[position:]).tolist())
        for wanted in share.order_N[position:].tolist():
            while wanted not in held:
                here = next(unread)
                held[here] = reader.read(int(share.shard_N[here]), int(share.sample_N[here]))
            yield int(share.number_N[wanted]), held.pop(wanted)
        position = 0


class StreamLoader:
    """Batches of a stream, made ahead by worker processes, with a state that knows which were handed out.

    Iterating never ends; count the steps. A new iteration goes on where the last one was left.

    Args:
        stream: What to load.
        prefetch: Batches that each worker makes ahead.
        pin_memory: Whether batches come in pinned memory, for a GPU.

    Raises:
        InputError: While iterating: the data contradict the class list, or a worker finds nothing usable.
    """

    def __init__(self, stream: ImageTextStream, *, prefetch: int = 2, pin_memory: bool = False) -> None:
        self._stream = stream
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._step = 0
        self._cursors = [Cursor()] * stream.plan.workers
        self._skipped: Counter[str] = Counter()
        self._logged: set[int] = set()
        self._live: weakref.ref[Generator[Batch, None, None]] | None = None
        self._fingerprint = fingerprint(stream.index)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in an epoch."""
        return self._stream.steps_per_epoch

    @property
    def skipped(self) -> dict[str, int]:
        """Bad samples among the batches handed out so far, by reason; a sample counts once an epoch."""
        return dict(sorted(self._skipped.items()))

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        batches = self._iterate()
        # Weakly: in a cycle with its loader, the iteration would keep its workers until garbage collection.
        self._live = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End the iteration under way, if any, and its worker processes."""
        batches = self._live and self._live()
        if batches:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch handed out, of this rank, for JSON."""
        return {
            "version": _STATE_VERSION,
            "epoch": self._step // self.steps_per_epoch,
            "step": self._step,
            **self._identity(),
            "cursors": [asdict(cursor) for cursor in self._cursors],
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after a state: the next batch is the one that would have followed, bit for bit. Ends an
        iteration.

        Raises:
            InputError: The state is that of other shards, or of a stream of other ranks, workers, batch
                size...
        """
        if state.get("version") != _STATE_VERSION:
            raise InputError(f"stream state: version is {state.get('version')!r}, allowed: {_STATE_VERSION}")
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise InputError(
                    f"stream state: {name} was {state.get(name)!r} and is {mine!r}; "
                    "allowed: to resume with the same shards, seed, batch size, shuffle, ranks and workers"
                )
        self.close()
        self._step = state["step"]
        self._cursors = [Cursor(**cursor) for cursor in state["cursors"]]
        self._skipped = Counter(state["skipped"])

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the stream that it goes on in."""
        plan = self._stream.plan
        return {
            "seed": plan.seed,
            "rank": self._stream.rank,
            "ranks": plan.ranks,
            "workers": plan.workers,
            "batch_size": plan.batch_size,
            "shuffle": plan.shuffle,
            "shards": self._fingerprint,
        }

    def _iterate(self) -> Generator[Batch, None, None]:
        self._stream.start_at(self._step, self._cursors)
        workers = self._stream.num_workers
        loader = wds.WebLoader(
            self._stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._prefetch if workers else None,
            pin_memory=self._pin_memory,
            worker_init_fn=partial(_start_worker, max_pixels=self._stream.decoder.max_pixels),
            generator=torch.Generator(),  # DataLoader draws a seed from the global generator otherwise
        )
        for item in loader:
            if isinstance(item, InputError):
                raise item
            self._hand_out(item)
            yield item

    def _hand_out(self, batch: Batch) -> None:
        self._step += 1
        self._cursors[batch._worker] = batch._cursor
        for skip in batch._skips:
            self._skipped[skip.reason] += 1
            if skip.number not in self._logged:
                self._logged.add(skip.number)
                logger.warning("skipped %r in %s: %s %s", skip.key, shown(skip.url), skip.reason, skip.detail)


def _start_worker(_: int, *, max_pixels: int) -> None:
    """Set a worker process up: one thread, Ctrl-C left to the training process, Pillow's own limit of
    pixels."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Image.MAX_IMAGE_PIXELS = max_pixels
