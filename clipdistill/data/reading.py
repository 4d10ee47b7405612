"""Raw samples in the shuffled order: read in shard order, and held undecoded until they are yielded.

At most one shuffle window of samples is held.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np

from clipdistill.data.index import LazyIndex, OtherShardError, ShardIndex
from clipdistill.data.plan import Plan, ResampledPlan, view_pixels
from clipdistill.data.sample import RawSample, SampleReader
from clipdistill.data.shard_format import SHARD_UNREADABLE, BadSampleError
from clipdistill.errors import InputError

_EMPTY_DRAWS = 20

T = TypeVar("T")


class ScheduledSample(NamedTuple):
    """A sample scheduled to be yielded."""

    raw: RawSample
    rng: Callable[[], np.random.Generator]
    """Makes the random generator of its augmentation."""
    choose: Callable[[int], int]
    """Draws one of a number of captions."""
    shard: int
    """Number of its shard in the index."""
    sample: int
    """Number of the sample in its shard."""
    view: int = 0
    """Number of the fixed view to show, if it has any."""
    draw: int = 0
    """In a resampled stream, the oldest draw with samples left."""
    first: int = 0
    """In a resampled stream, the worker's number of that draw's first sample."""


class Views(NamedTuple):
    """Fixed augmentations of each sample."""

    number: int
    """Number of views; 0: none, a new augmentation each time."""
    seed: int
    """Seed of the views."""


NO_VIEWS = Views(0, 0)


def read_partition(
    plan: Plan,
    index: Sequence[ShardIndex],
    reader: SampleReader,
    *,
    epoch: int,
    rank: int,
    worker: int,
    position: int,
    views: Views = NO_VIEWS,
) -> Iterator[ScheduledSample]:
    """A worker's partition of an epoch, starting at a position of its order, repeated endlessly.

    Args:
        plan: The samples and their order.
        index: The shards.
        reader: Reads the samples.
        epoch: The epoch.
        rank: The worker's rank.
        worker: The worker.
        position: Samples yielded so far.
        views: The samples' fixed views.
    """
    partition = plan.partition(epoch, rank, worker)
    position %= len(partition)
    while True:
        held: dict[int, RawSample] = {}
        unread = iter(np.sort(partition.order_N[position:]).tolist())
        for wanted in partition.order_N[position:].tolist():
            while wanted not in held:
                here = next(unread)
                held[here] = reader.read(int(partition.shard_N[here]), int(partition.sample_N[here]))
            shard, sample, number, repeat = (
                int(of_N[wanted])
                for of_N in (partition.shard_N, partition.sample_N, partition.number_N, partition.repeat_N)
            )
            raw, view, rng = held.pop(wanted), 0, partial(plan.pixels, epoch, number, repeat)
            if views.number and raw.fault is None:
                view = plan.view(epoch, number, repeat, views.number)
                rng = partial(view_pixels, views.seed, index[shard].digest, sample, view)
            yield ScheduledSample(raw, rng, partial(plan.caption, epoch, number, repeat), shard, sample, view)
        position = 0


class _Turn(NamedTuple):
    """A worker's sample number `number`, and its location."""

    number: int
    shard: int
    sample: int


def read_draws(
    plan: ResampledPlan,
    index: LazyIndex,
    reader: SampleReader,
    *,
    rank: int,
    worker: int,
    draw: int,
    first: int,
    position: int,
    views: Views = NO_VIEWS,
) -> Iterator[ScheduledSample]:
    """A worker's samples, starting at a position of its order, without end.

    A shard that cannot be indexed counts as one bad sample, an empty one as none.

    Args:
        plan: The draws of shards, and the order of their samples.
        index: The shards.
        reader: Reads the samples.
        rank: The worker's rank.
        worker: The worker.
        draw: The first draw to read: all earlier draws were yielded completely before `position`.
        first: Number of the draw's first sample among all samples of the worker.
        position: Samples yielded so far.
        views: The samples' fixed views.

    Raises:
        InputError: While iterating: too many consecutive draws are empty, or a shard is not the one that was read
            before.
    """
    whole = _in_order(plan, index, rank, worker, draw, first, lambda *_: None)
    yielded = {turn.number for turn, *_ in islice(whole, position - first)}

    def read(turn: _Turn, fault: InputError | None) -> RawSample | None:
        if turn.number in yielded:
            return None
        if fault:
            return RawSample(url=index.urls[turn.shard], key="", fault=BadSampleError(SHARD_UNREADABLE, str(fault)))
        return reader.read(turn.shard, turn.sample)

    order = _in_order(plan, index, rank, worker, draw, first, read)
    for turn, raw, oldest, oldest_first in islice(order, position - first, None):
        assert raw is not None
        view, rng = 0, partial(plan.pixels, rank, worker, turn.number)
        if views.number and raw.fault is None:
            view = plan.view(rank, worker, turn.number, views.number)
            rng = partial(view_pixels, views.seed, index[turn.shard].digest, turn.sample, view)
        choose = partial(plan.caption, rank, worker, turn.number)
        yield ScheduledSample(raw, rng, choose, turn.shard, turn.sample, view, oldest, oldest_first)


def _in_order(
    plan: ResampledPlan,
    index: LazyIndex,
    rank: int,
    worker: int,
    draw: int,
    first: int,
    read: Callable[[_Turn, InputError | None], T],
) -> Iterator[tuple[_Turn, T, int, int]]:
    """Each sample in the shuffled order, the result of `read` when its place in its shard was reached, and the
    oldest unfinished draw with the number of its first sample."""
    waiting: list[tuple[float, _Turn, int, T]] = []
    left: deque[list[int]] = deque()
    number, empty = first, 0
    for current in count(draw):
        shard = plan.shard(rank, worker, current)
        fault = None
        try:
            samples = len(index[shard])
        except OtherShardError:
            raise
        except InputError as error:
            samples, fault = 1, error
        empty = 0 if samples else empty + 1
        if empty > _EMPTY_DRAWS * len(index):
            raise InputError(
                f"shards: {empty} draws in a row from {len(index)} shards yielded no sample; "
                "allowed: shards with samples"
            )
        left.append([current, number, samples])
        for sample, key in enumerate(plan.keys(rank, worker, current, number, samples).tolist()):
            while waiting and waiting[0][0] <= number:
                _, ripe, of_draw, content = heappop(waiting)
                left[of_draw - left[0][0]][2] -= 1
                while not left[0][2]:
                    left.popleft()
                yield ripe, content, left[0][0], left[0][1]
            turn = _Turn(number, shard, sample)
            heappush(waiting, (key, turn, current, read(turn, fault)))
            number += 1
