"""The training stream: an endless iterable of batches, and a loader with exact state.

Shapes: B samples per batch of one rank; C = 3 channels, RGB; H and W of the decoder.
"""

import hashlib
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clipdistill.data.class_lists import ClassLists
from clipdistill.data.embeddings import EmbeddingReader
from clipdistill.data.encoded import DeviceDecoder, EncodedImages
from clipdistill.data.image import EncodedView
from clipdistill.data.index import LazyIndex, ShardIndex
from clipdistill.data.plan import Layout, Plan, PreviousLayout, ResampledPlan
from clipdistill.data.reading import NO_VIEWS, ScheduledSample, Views, read_draws, read_partition
from clipdistill.data.sample import BROKEN_IMAGE, BadSampleError, DecodedSample, Decoder, SampleReader
from clipdistill.data.workers import WORKER_TIMEOUT, from_workers
from clipdistill.errors import InputError
from clipdistill.io.images import as_size
from clipdistill.io.urls import file_name, shown
from clipdistill.models.outputs import ModelOutputs
from clipdistill.models.tokens import TokenGroups

logger = logging.getLogger(__name__)

_STATE_VERSION = 4
_LAYOUT = tuple(field.name for field in fields(Layout))
_BAD_IN_A_ROW = 1000
MOST_LOGGED = 1000
"""Bad samples of one reason that are logged."""

_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Position of a worker in its partition.

    `batch` and `position` count the batches and samples of the epoch's partition that it yielded; `position` exceeds
    batches x batch_size by the bad samples, and the partition's length once bad samples made the partition repeat.
    In a resampled stream both count from the stream's beginning, and `draw` and `first` are those of `read_draws`.
    """

    epoch: int = 0
    batch: int = 0
    position: int = 0
    draw: int = 0
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A bad sample that was skipped."""

    url: str
    key: str
    reason: str
    detail: str


@dataclass(kw_only=True)
class Batch:
    """Samples of one rank for one step."""

    image_BCHW: Tensor
    """uint8, RGB, 0 to 255; normalised for each tower on the device."""
    captions: list[str]
    """One of each sample's captions, drawn anew in each epoch; an empty string if it has none."""
    labels_B: Tensor
    """int64; -1 if a sample has none."""
    keys: list[str]
    """Keys of the samples in their shards."""
    epoch: int = 0
    """Number of the epoch, from 0."""
    teachers: list[ModelOutputs] = field(default_factory=list)
    """Each teacher's stored features of exactly these pixels; empty without a teacher cache."""
    caption_tokens: list[TokenGroups] = field(default_factory=list)
    """Token ids of the captions, from each of the stream's tokenizers."""
    caption_ids_B: Tensor | None = None
    """int64 id of each caption, equal for equal captions; None unless captions are required."""
    _encoded: EncodedImages | None = field(default=None, repr=False)
    """Images that the loader decodes on the device; ``image_BCHW`` holds the others."""
    _urls: list[str] = field(default_factory=list, repr=False)
    _worker: int = field(default=0, repr=False)
    _cursor: Cursor = field(default=Cursor(), repr=False)
    _skips: list[Skip] = field(default_factory=list, repr=False)
    _opened: dict[int, str] = field(default_factory=dict, repr=False)
    _unreadable: dict[int, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device; asynchronous from pinned memory."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory; DataLoader calls this."""
        return self._with(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._with(note)
        return found

    def with_images(self, decode: DeviceDecoder) -> "Batch":
        """The batch with its encoded images decoded. A broken one is a bad sample: its row repeats one of the others.

        Raises:
            InputError: All are broken.
        """
        if self._encoded is None:
            return self
        image_BCHW, faults = decode(self.image_BCHW, self._encoded, len(self))
        batch = replace(self, image_BCHW=image_BCHW, _encoded=None)
        if not faults:
            return batch
        good = [row for row in range(len(self)) if row not in faults]
        if not good:
            raise InputError(
                f"shards: all {len(self)} images of a batch are broken; the last is that of {self.keys[-1]!r} in "
                f"{shown(self._urls[-1])}: {faults[len(self) - 1]}"
            )
        order = [good[row % len(good)] if row in faults else row for row in range(len(self))]
        skips = [
            Skip(url=self._urls[row], key=self.keys[row], reason=BROKEN_IMAGE, detail=fault)
            for row, fault in faults.items()
        ]
        return replace(
            batch,
            image_BCHW=image_BCHW[order],
            labels_B=self.labels_B[order],
            teachers=[teacher.map(lambda tensor: tensor[order]) for teacher in self.teachers],
            caption_tokens=[tokens.rows(order) for tokens in self.caption_tokens],
            caption_ids_B=None if self.caption_ids_B is None else self.caption_ids_B[order],
            captions=[self.captions[row] for row in order],
            keys=[self.keys[row] for row in order],
            _skips=self._skips + skips,
        )

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            image_BCHW=change(self.image_BCHW),
            labels_B=change(self.labels_B),
            teachers=[teacher.map(change) for teacher in self.teachers],
            caption_tokens=[tokens.map(change) for tokens in self.caption_tokens],
            caption_ids_B=None if self.caption_ids_B is None else change(self.caption_ids_B),
        )


class ImageTextStream(IterableDataset[Batch]):
    """An endless stream of batches for one rank, epoch after epoch. Iterate it through `StreamLoader`.

    Args:
        index: All shards, the same list on every rank; a `LazyIndex`, with the shards' sizes unless the stream is
            resampled.
        decoder: Required members of a sample, and their decoding.
        batch_size: Samples per rank and step.
        seed: With the epoch, determines all random numbers.
        shuffle: Window of the sample shuffle; 0: off (the order of shards still changes each epoch).
        views: Fixed augmentations of each sample, of which an epoch shows one; none: a new one each epoch.
        embeddings: Stored teachers' embeddings of the views; None: batches carry none.
        weights: How often an epoch holds each sample of the index, on average (`sampling_weights`); None: once.
        class_counts: Samples of each class in an epoch, if they were counted; for readers of the loader.
        tokenizers: Captions -> token ids, run in the decoding process.
        samples_per_epoch: None: an epoch is every sample once. A number: shards are drawn at random with
            replacement, and an epoch is that many samples.
        rank: Rank of this process, from 0 to `world_size` - 1.
        world_size: Number of ranks.
        num_workers: Decoding processes of this rank; 0: decode in this process.

    A bad sample is skipped, and the worker continues with the next one of its partition of the epoch; if the
    partition ends early as a result, the worker starts it again. So the number of steps stays the same, and
    only as many samples repeat as were skipped.

    An `InputError` in a worker is the stream's last item; `from_workers` raises it.

    Raises:
        InputError: The shards have too few samples for one step.
    """

    def __init__(
        self,
        index: Sequence[ShardIndex],
        decoder: Decoder,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: int = 1000,
        views: Views = NO_VIEWS,
        embeddings: EmbeddingReader | None = None,
        weights: NDArray[np.float64] | None = None,
        class_counts: Sequence[float] | None = None,
        tokenizers: Sequence[Callable[[Sequence[str]], TokenGroups]] = (),
        samples_per_epoch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, must be from 0 to {world_size - 1}")
        sizes = index.sizes if isinstance(index, LazyIndex) else [len(shard) for shard in index]
        if samples_per_epoch is not None and not isinstance(index, LazyIndex):
            raise ValueError("samples_per_epoch must be given with a LazyIndex")
        if samples_per_epoch is None and sizes is None:
            raise ValueError("a LazyIndex must have sizes, unless samples_per_epoch is given")
        if samples_per_epoch is not None and weights is not None:
            raise ValueError("weights must not be given with samples_per_epoch")
        self.index = index
        self.decoder = decoder
        self.views = views
        self.embeddings = embeddings
        self.class_counts = class_counts
        self.tokenizers = tokenizers
        self.rank = rank
        self.num_workers = num_workers
        self.plan: Plan | ResampledPlan
        layout: dict[str, Any] = {
            "batch_size": batch_size,
            "ranks": world_size,
            "workers": max(1, num_workers),
            "shuffle": shuffle,
        }
        if samples_per_epoch is None:
            self.plan = Plan(**layout, seed=seed, sizes=sizes or [], weights=weights)
        else:
            self.plan = ResampledPlan(**layout, seed=seed, shards=len(index), samples_per_epoch=samples_per_epoch)
        self.start_at(0, [Cursor()] * self.plan.workers)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in a full epoch; the same for every rank."""
        return self.plan.steps

    def start_at(self, step: int, cursors: Sequence[Cursor]) -> None:
        """Start the next iteration at batch `step` of the plan, each worker at its cursor."""
        self._start = step, list(cursors)

    def __iter__(self) -> Iterator[Batch | InputError]:  # type: ignore[override]
        info = get_worker_info()
        if (info.num_workers if info else 0) != self.num_workers:
            raise ValueError(f"num_workers is {self.num_workers}, must be the loader's")
        step, cursors = self._start
        worker = ((info.id if info else 0) + step) % self.plan.workers
        reader = SampleReader(self.index, self.decoder.wanted)
        try:
            if isinstance(self.plan, Plan):
                yield from self._epochs(self.plan, worker, cursors[worker], reader)
            else:
                yield from self._draws(self.plan, worker, cursors[worker], reader)
        except InputError as error:
            yield error
        finally:
            reader.close()

    def _epochs(self, plan: Plan, worker: int, cursor: Cursor, reader: SampleReader) -> Iterator[Batch]:
        """All batches of a worker, starting at a cursor."""
        while True:
            batches = plan.batches(cursor.epoch, worker)
            if cursor.batch < batches:
                samples = read_partition(
                    plan,
                    self.index,
                    reader,
                    epoch=cursor.epoch,
                    rank=self.rank,
                    worker=worker,
                    position=cursor.position,
                    views=self.views,
                )
                while cursor.batch < batches:
                    batch = self._batch(worker, cursor, samples, share=batches * plan.batch_size)
                    cursor = batch._cursor
                    yield self._with_shards(batch)
            cursor = Cursor(epoch=cursor.epoch + 1)

    def _draws(self, plan: ResampledPlan, worker: int, cursor: Cursor, reader: SampleReader) -> Iterator[Batch]:
        """All batches of a worker of a resampled stream, starting at a cursor."""
        assert isinstance(self.index, LazyIndex)
        samples = read_draws(
            plan,
            self.index,
            reader,
            rank=self.rank,
            worker=worker,
            draw=cursor.draw,
            first=cursor.first,
            position=cursor.position,
            views=self.views,
        )
        while True:
            epoch = plan.epoch_at(cursor.batch * plan.workers + worker)
            batch = self._batch(worker, replace(cursor, epoch=epoch), samples, share=None)
            cursor = batch._cursor
            yield self._with_shards(batch)

    def _with_shards(self, batch: Batch) -> Batch:
        """A batch with the shards of a lazy index that were opened for it."""
        if isinstance(self.index, LazyIndex):
            batch._opened, self.index.opened = self.index.opened, {}
            batch._unreadable, self.index.unreadable = self.index.unreadable, {}
        return batch

    def _decode(self, scheduled: ScheduledSample) -> DecodedSample:
        """A sample, with its pixels from the teacher cache if they are stored there."""
        stored = None
        if self.embeddings and scheduled.raw.fault is None:
            stored = self.embeddings.pixels(scheduled.shard, scheduled.sample, scheduled.view)
        if stored is not None:
            return self.decoder.read(scheduled.raw, stored)
        sample = self.decoder.decode(scheduled.raw, scheduled.rng())
        if isinstance(sample.pixels, EncodedView) and self.embeddings:
            self.embeddings.check_image(scheduled.shard, scheduled.sample)
        return sample

    def _batch(self, worker: int, cursor: Cursor, samples: Iterator[ScheduledSample], *, share: int | None) -> Batch:
        """The next batch, bad samples skipped; after `share` samples, if not None, the partition repeats."""
        size = self.plan.batch_size
        image_BCHW = np.empty((size, 3, *as_size(self.decoder.image_size)), np.uint8)
        encoded: dict[int, EncodedView] = {}
        captions: list[str] = []
        labels: list[int] = []
        keys: list[str] = []
        urls: list[str] = []
        skips: list[Skip] = []
        rows: list[list[ModelOutputs]] = []
        position, in_a_row = cursor.position, 0
        while len(keys) < size:
            scheduled = next(samples)
            raw = scheduled.raw
            try:
                sample = self._decode(scheduled)
            except BadSampleError as bad:
                in_a_row += 1
                if share is None or position < share:
                    skips.append(Skip(url=raw.url, key=raw.key, reason=bad.reason, detail=bad.detail))
                if in_a_row >= min(share or _BAD_IN_A_ROW, _BAD_IN_A_ROW):
                    raise InputError(
                        f"shards: {in_a_row} samples in a row, all bad, for worker {worker} of rank {self.rank} in "
                        f"epoch {cursor.epoch}; the last is {raw.key!r} in {shown(raw.url)}: "
                        f"{bad.reason} {bad.detail}".rstrip()
                    ) from bad
            else:
                in_a_row = 0
                if isinstance(sample.pixels, EncodedView):
                    encoded[len(keys)] = sample.pixels
                else:
                    image_BCHW[len(keys) - len(encoded)] = sample.pixels
                chosen = scheduled.choose(len(sample.captions)) if len(sample.captions) > 1 else 0
                captions.append(sample.captions[chosen] if sample.captions else "")
                labels.append(sample.label)
                keys.append(raw.key)
                urls.append(raw.url)
                if self.embeddings:
                    at = scheduled.shard, scheduled.sample, scheduled.view, chosen
                    rows.append(self.embeddings.read(*at, raw))
            position += 1
        return Batch(
            image_BCHW=torch.from_numpy(image_BCHW[: size - len(encoded)]),
            captions=captions,
            labels_B=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            epoch=cursor.epoch,
            teachers=[ModelOutputs.stack(of_teacher) for of_teacher in zip(*rows, strict=True)],
            caption_tokens=[tokenize(captions) for tokenize in self.tokenizers],
            caption_ids_B=caption_ids(captions) if self.decoder.require_captions else None,
            _encoded=EncodedImages.pack(encoded),
            _urls=urls if encoded else [],
            _worker=worker,
            _cursor=replace(
                cursor, batch=cursor.batch + 1, position=position, draw=scheduled.draw, first=scheduled.first
            ),
            _skips=skips,
        )


class StreamLoader:
    """Batches of a stream, prefetched by worker processes, with a state that counts those yielded.

    Iteration never ends; count the steps. A new iteration continues where the last one stopped.

    Args:
        stream: The stream to load.
        prefetch: Batches that each worker prepares ahead.
        pin_memory: Whether to copy batches into pinned memory, for a GPU.
        timeout: Seconds without a batch after which a worker counts as hanging.
        device: Where JPEGs are decoded that the workers leave encoded.

    Attributes:
        give_up: Asked, in another thread, about every second without a batch: whether to wait no longer.

    Raises:
        InputError: While iterating: a label is outside the class list, or a worker finds no usable sample.
        RunError: While iterating: a worker hangs.
    """

    def __init__(
        self,
        stream: ImageTextStream,
        *,
        prefetch: int = 2,
        pin_memory: bool = False,
        timeout: float = WORKER_TIMEOUT,
        device: torch.device | str = "cpu",
    ) -> None:
        self.give_up: Callable[[], bool] = lambda: False
        self._stream = stream
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._timeout = timeout
        self._decode = DeviceDecoder(device) if stream.decoder.on_device else None
        self._step = 0
        self._cursors = [Cursor()] * stream.plan.workers
        self._samples = 0
        self._skipped: Counter[str] = Counter()
        self._logged: dict[str, set[tuple[str, str]]] = {}
        self._opened: dict[int, str] = {}
        self._unreadable: dict[int, str] = {}
        self._live: weakref.ref[Generator[Batch, None, None]] | None = None

    @property
    def embeddings(self) -> EmbeddingReader | None:
        """Reader of the stored teachers' embeddings, None if there are none."""
        return self._stream.embeddings

    @property
    def class_lists(self) -> ClassLists | None:
        """Classes of the shards' labels, None if they are any numbers."""
        return self._stream.decoder.class_lists

    @property
    def class_counts(self) -> Sequence[float] | None:
        """Samples of each class of the prompts in an epoch, None if they were not counted."""
        return self._stream.class_counts

    def class_digests(self) -> list[str]:
        """What the labels of each shard stand for (`ClassLists.digests`); empty if they are any numbers."""
        index = self._stream.index
        urls = index.urls if isinstance(index, LazyIndex) else [shard.url for shard in index]
        return [] if self.class_lists is None else self.class_lists.digests(urls)

    @property
    def workers(self) -> int:
        """Number of decoding processes; 0: the samples are decoded in this process."""
        return self._stream.num_workers

    @property
    def shards(self) -> int:
        """Number of shards in the index."""
        return len(self._stream.index)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in a full epoch."""
        return self._stream.steps_per_epoch

    def batches_before(self, epochs: float) -> float:
        """Batches of this rank up to a point of the run, such as 2.5 epochs; counted from the last change of the
        number of ranks or workers."""
        return self._stream.plan.before(epochs)

    @property
    def samples(self) -> int:
        """Good samples that this rank has yielded so far."""
        return self._samples

    @property
    def skipped(self) -> dict[str, int]:
        """Bad samples skipped for the batches yielded so far, by reason; a sample counts once per epoch."""
        return dict(sorted(self._skipped.items()))

    @property
    def unreadable(self) -> dict[int, str]:
        """The errors of the shards that this rank wanted and could not read, by number; only of a `LazyIndex`, as
        otherwise all are indexed before."""
        return dict(self._unreadable)

    @property
    def opened(self) -> set[int]:
        """Numbers of the shards that this rank has read; see `unreadable`."""
        return set(self._opened)

    def shards_read(self) -> list[list[str]]:
        """File name and digest of the content of each shard; empty for one that this rank has not opened yet."""
        index = self._stream.index
        if isinstance(index, LazyIndex):
            return [[file_name(url), index.expected.get(number, "")] for number, url in enumerate(index.urls)]
        return [[file_name(shard.url), shard.content] for shard in index]

    def expect_shards(self, then: Sequence[Sequence[str]]) -> None:
        """Accept only the shards of an earlier run, wherever they are; those of a `LazyIndex` are compared when they
        are opened.

        Args:
            then: names and digests from `shards_read`, merged over its ranks (`merge_shards`).

        Raises:
            InputError: There are others, or their order changed.
        """
        index = self._stream.index
        if isinstance(index, LazyIndex):
            changes = _changes([[name, ""] for name, _ in then], [[file_name(url), ""] for url in index.urls])
            index.expected = {number: content for number, (_, content) in enumerate(then) if content}
        else:
            now = self.shards_read()
            known = [[name, content or now[number][1]] for number, (name, content) in enumerate(then[: len(now)])]
            same = len(then) == len(now) and [content for _, content in known] == [content for _, content in now]
            changes = "" if same else _changes(then, now)
        if changes:
            raise InputError(
                f"data.shards: not those of the saved run: {changes}; allowed: the same shards, in the same order, or "
                "another output"
            )

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        batches = self._iterate()
        # Weak reference: in a cycle with its loader, the iteration would keep its workers until garbage collection.
        self._live = weakref.ref(batches)
        return batches

    def close(self) -> None:
        """End the current iteration, if any, and its worker processes."""
        batches = self._live and self._live()
        if batches:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank after the last batch yielded, for JSON."""
        plan = self._stream.plan
        state = {
            "version": _STATE_VERSION,
            "rank": self._stream.rank,
            "seed": plan.seed,
            "layout": {name: getattr(plan, name) for name in _LAYOUT},
            "first_epoch": plan.first_epoch,
            "step": self._step,
            "cursors": [asdict(cursor) for cursor in self._cursors],
            "samples": self._samples,
            "skipped": self.skipped,
        }
        if isinstance(plan, Plan):
            return state | {"sizes": _digest_of(plan.sizes), "past": [asdict(past) for past in plan.past]}
        return state | {"samples_per_epoch": plan.samples_per_epoch, "restarts": plan.restarts}

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Resume from the states of all ranks that saved, in rank order, with any number of ranks and workers now.

        With the same numbers as before, the next batch is the one that would have followed, bit for bit. Otherwise,
        the epoch's unseen samples are redistributed: each is seen once, except a remainder smaller than one global
        batch. A resampled stream starts a new series of draws. Ends the current iteration. The shards must be those
        of the states: see `expect_shards`.

        Raises:
            InputError: The states belong to another seed, or do not cover all ranks.
        """
        before, now = self._plan_of(states[0]), self._stream.plan
        _check_same("ranks of the states", list(range(before.ranks)), [state["rank"] for state in states])
        _check_same("step of the states", {states[0]["step"]}, {state["step"] for state in states})
        self.close()
        if all(getattr(before, name) == getattr(now, name) for name in _LAYOUT):
            state = states[self._stream.rank]
            self._stream.plan = before
            self._step = state["step"]
            self._cursors = [Cursor(**cursor) for cursor in state["cursors"]]
            self._samples = state["samples"]
            self._skipped = Counter(state["skipped"])
            return
        step = states[0]["step"]
        epoch = before.epoch_at(step)
        if isinstance(before, ResampledPlan):
            assert isinstance(now, ResampledPlan)
            done = before.first_epoch + step / before.steps
            self._stream.plan = replace(now, first_epoch=done, restarts=before.restarts + 1)
        else:
            assert isinstance(now, Plan)
            past = PreviousLayout(
                **{name: getattr(before, name) for name in _LAYOUT},
                before=int(before.before(epoch)),
                positions=[
                    [cursor["position"] if cursor["epoch"] == epoch else 0 for cursor in state["cursors"]]
                    for state in states
                ],
            )
            earlier = before.past if epoch == before.first_epoch else ()
            self._stream.plan = replace(now, first_epoch=epoch, past=(*earlier, past))
        self._step = 0
        self._cursors = [Cursor(epoch=epoch)] * now.workers
        first = self._stream.rank == 0
        self._samples = sum(state["samples"] for state in states) if first else 0
        self._skipped = sum((Counter(state["skipped"]) for state in states), Counter()) if first else Counter()

    def _plan_of(self, state: Mapping[str, Any]) -> Plan | ResampledPlan:
        """The plan under which a state was saved; its seed must equal the current one."""
        _check_same("version", state.get("version"), _STATE_VERSION)
        now = self._stream.plan
        _check_same("seed", state["seed"], now.seed)
        _check_same("samples_per_epoch", state.get("samples_per_epoch"), getattr(now, "samples_per_epoch", None))
        layout = dict(state["layout"])
        if isinstance(now, ResampledPlan):
            return replace(now, **layout, first_epoch=state["first_epoch"], restarts=state["restarts"])
        _check_same("numbers of samples in the shards", state.get("sizes"), _digest_of(now.sizes))
        past = [PreviousLayout(**past) for past in state["past"]]
        return replace(now, **layout, first_epoch=state["first_epoch"], past=past)

    def _iterate(self) -> Generator[Batch, None, None]:
        self._stream.start_at(self._step, self._cursors)
        batches = from_workers(
            self._stream,
            workers=self._stream.num_workers,
            max_pixels=self._stream.decoder.max_pixels,
            prefetch=self._prefetch,
            pin_memory=self._pin_memory,
            timeout=self._timeout,
            shards=[name for name, _ in self.shards_read()],
            give_up=lambda: self.give_up(),
        )
        for raw in batches:
            batch = raw if self._decode is None else raw.with_images(self._decode)
            self._count(batch)
            yield batch

    def _count(self, batch: Batch) -> None:
        self._step += 1
        self._samples += len(batch)
        self._cursors[batch._worker] = batch._cursor
        index = self._stream.index
        if isinstance(index, LazyIndex):
            for number, content in batch._opened.items():
                index.check(number, content)
                self._opened[number] = content
                self._unreadable.pop(number, None)
            index.opened = {}
            self._unreadable |= batch._unreadable
        for skip in batch._skips:
            self._skipped[skip.reason] += 1
            logged = self._logged.setdefault(skip.reason, set())
            if (skip.url, skip.key) not in logged and len(logged) < MOST_LOGGED:
                logged.add((skip.url, skip.key))
                more = " (more of this reason are only counted)" if len(logged) == MOST_LOGGED else ""
                logger.warning("skipped %r in %s: %s %s%s", skip.key, shown(skip.url), skip.reason, skip.detail, more)


def caption_ids(captions: Sequence[str]) -> Tensor:
    """A 63-bit id of each caption, equal for equal captions on every rank."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big") >> 1 for digest in digests])


def _digest_of(sizes: Sequence[int]) -> str:
    return hashlib.sha256(str(list(sizes)).encode()).hexdigest()[:16]


def _check_same(name: str, then: object, now: object) -> None:
    if then != now:
        raise InputError(f"stream state: {name} was {then!r} and is {now!r}; allowed: the same value")


def merge_shards(records: Sequence[Sequence[Sequence[str]]]) -> list[list[str]]:
    """The records of `StreamLoader.shards_read` of several ranks as one."""
    shards = zip(*records, strict=True)
    return [[ranks[0][0], next((content for _, content in ranks if content), "")] for ranks in shards]


def _changes(then: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    """Description of the differences between two lists of names and digests; empty if there are none."""
    missing = Counter(map(tuple, then)) - Counter(map(tuple, now))
    added = Counter(map(tuple, now)) - Counter(map(tuple, then))
    before, after = {name for name, _ in missing}, {name for name, _ in added}
    changes = [f"{name!r} changed" for name in sorted(before & after)]
    changes += [f"{name!r} is gone" for name in sorted(before - after)]
    changes += [f"{name!r} is new" for name in sorted(after - before)]
    if not changes and list(map(tuple, then)) != list(map(tuple, now)):
        return "their order changed"
    more = [f"and {len(changes) - _NAMED} more"] if len(changes) > _NAMED else []
    return ", ".join(changes[:_NAMED] + more)
