"""Raw samples in the order of giving out: read in the order of the shards, held undecoded until their turn.

At most one shuffle window of samples is held.
"""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count, islice
from typing import NamedTuple, TypeVar

import numpy as np

from clipdistill.data.index import LazyIndex
from clipdistill.data.plan import Plan, ResampledPlan
from clipdistill.data.sample import BadSampleError, RawSample, SampleReader
from clipdistill.errors import InputError

_EMPTY_DRAWS = 20

T = TypeVar("T")


class Given(NamedTuple):
    """A sample whose turn it is."""

    raw: RawSample
    rng: np.random.Generator
    """Draws its augmentation."""
    draw: int = 0
    """Of a resampled stream: the oldest draw that still has a sample to give out,"""
    first: int = 0
    """and the worker's number of that draw's first sample."""


def read_share(
    plan: Plan, reader: SampleReader, *, epoch: int, rank: int, worker: int, position: int
) -> Iterator[Given]:
    """A worker's share of an epoch from a position of its order on, over and over."""
    share = plan.share(epoch, rank, worker)
    position %= len(share)
    while True:
        held: dict[int, RawSample] = {}
        unread = iter(np.sort(share.order_N[position:]).tolist())
        for wanted in share.order_N[position:].tolist():
            while wanted not in held:
                here = next(unread)
                held[here] = reader.read(int(share.shard_N[here]), int(share.sample_N[here]))
            yield Given(held.pop(wanted), plan.pixels(epoch, int(share.number_N[wanted])))
        position = 0


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
) -> Iterator[Given]:
    """A worker's samples from a position of its order on, without end.

    A shard that cannot be indexed stands as one bad sample, an empty one as none.

    Args:
        plan: Which shards are drawn, and the order of their samples.
        index: The shards.
        reader: Reads their samples.
        rank: The worker's rank.
        worker: The worker.
        draw: Where to begin: all before this draw was given out before `position`.
        first: Number of the draw's first sample among all of the worker.
        position: Samples that were given out so far.

    Raises:
        InputError: While iterating: draw after draw is empty.
    """
    whole = _in_order(plan, index, rank, worker, draw, first, lambda *_: None)
    gone = {number for number, *_ in islice(whole, position - first)}

    def read(number: int, shard: int, sample: int, fault: InputError | None) -> RawSample | None:
        if number in gone:
            return None
        if fault:
            return RawSample(url=index.urls[shard], key="", fault=BadSampleError("shard unreadable", str(fault)))
        return reader.read(shard, sample)

    order = _in_order(plan, index, rank, worker, draw, first, read)
    for number, raw, oldest, oldest_first in islice(order, position - first, None):
        assert raw is not None
        yield Given(raw, plan.pixels(rank, worker, number), oldest, oldest_first)


def _in_order(
    plan: ResampledPlan,
    index: LazyIndex,
    rank: int,
    worker: int,
    draw: int,
    first: int,
    read: Callable[[int, int, int, InputError | None], T],
) -> Iterator[tuple[int, T, int, int]]:
    """Number of each sample in the order of giving out, what `read` said when its place in its shard was
    reached, and the oldest open draw."""
    waiting: list[tuple[float, int, int, T]] = []
    left: deque[list[int]] = deque()
    number, empty = first, 0
    for current in count(draw):
        shard = plan.shard(rank, worker, current)
        fault = None
        try:
            samples = len(index[shard])
        except InputError as error:
            samples, fault = 1, error
        empty = 0 if samples else empty + 1
        if empty > _EMPTY_DRAWS * len(index):
            raise InputError(f"shards: {empty} draws of {len(index)} shards in a row brought no sample; allowed: some")
        left.append([current, number, samples])
        for sample, key in enumerate(plan.keys(rank, worker, current, number, samples).tolist()):
            while waiting and waiting[0][0] <= number:
                _, turn, of_draw, content = heappop(waiting)
                left[of_draw - left[0][0]][2] -= 1
                while not left[0][2]:
                    left.popleft()
                yield turn, content, left[0][0], left[0][1]
            heappush(waiting, (key, number, current, read(number, shard, sample, fault)))
            number += 1
