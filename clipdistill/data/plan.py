"""Which sample is seen when, and by whom: a pure function of (seed, epoch, ranks, workers).

An epoch strings the shards together in an order of its own, beginning somewhere inside one of them, and cuts
the string of T samples into equal parts of whole batches, one a rank:

    shard 5 | shard 0        | shard 3   | shard 1      | 5      T samples
    rank 0               | rank 1                | remainder     S * batch_size samples a rank
    worker 0 | worker 1  | worker 0 | worker 1   |               whole batches a worker

Every rank takes S = T // (ranks * batch_size) steps, however uneven the shards and however few. What the
epoch leaves out is the remainder: fewer than ranks * batch_size samples, others each epoch. A worker reads
its part from front to back, and gives it out shuffled within a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clipdistill.errors import InputError

Indices = NDArray[np.int64]

_SHARDS, _WINDOW, _PIXELS = 1, 2, 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What one worker of one rank does in one epoch. N samples, in the order of reading."""

    shard_N: Indices
    """Number of the sample's shard in the index."""
    sample_N: Indices
    """Number of the sample in its shard."""
    number_N: Indices
    """Number of the sample in the whole index, whatever the epoch."""
    order_N: Indices
    """The order of giving out: positions in the arrays above."""
    batches: int

    def __len__(self) -> int:
        return len(self.order_N)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The order of samples of all epochs.

    Raises:
        InputError: There are fewer samples than one batch for each rank needs.
    """

    sizes: Sequence[int]
    """Samples of each shard of the index."""
    batch_size: int
    """Samples a rank and step."""
    ranks: int
    workers: int
    """Workers of each rank, at least 1."""
    seed: int
    shuffle: int
    """Window of the sample shuffle; 0: off. From a worker's share on, the share is fully shuffled."""

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "ranks": 1, "workers": 1, "seed": 0, "shuffle": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        needed = self.ranks * self.batch_size
        if self.total < needed:
            raise InputError(
                f"shards: {self.total} samples in {len(self.sizes)} shards, but one step needs {needed} "
                f"({self.ranks} ranks x batch_size {self.batch_size}); allowed: fewer, or more samples"
            )

    @cached_property
    def total(self) -> int:
        """Samples of the whole index."""
        return sum(self.sizes)

    @property
    def steps(self) -> int:
        """Batches of each rank in an epoch."""
        return self.total // (self.ranks * self.batch_size)

    def batches(self, epoch: int, worker: int) -> int:
        """Batches of the epoch that a worker makes: batch g of the run is made by worker g % workers."""
        first = (worker - epoch * self.steps) % self.workers
        return len(range(first, self.steps, self.workers))

    def share(self, epoch: int, rank: int, worker: int) -> Share:
        """The samples of one worker of one rank in one epoch, and their order."""
        batches = self.batches(epoch, worker)
        before = sum(self.batches(epoch, other) for other in range(worker))
        first = (rank * self.steps + before) * self.batch_size
        position_N = np.arange(first, first + batches * self.batch_size)

        rng = generator(_SHARDS, self.seed, epoch)
        shards = rng.permutation(len(self.sizes))
        position_N = (position_N + rng.integers(self.total)) % self.total
        sizes = np.asarray(self.sizes, np.int64)
        ends = np.cumsum(sizes[shards])
        at_N = np.searchsorted(ends, position_N, side="right")
        shard_N = shards[at_N]
        sample_N = position_N - (ends[at_N] - sizes[shard_N])
        return Share(
            shard_N=shard_N,
            sample_N=sample_N,
            number_N=(np.cumsum(sizes) - sizes)[shard_N] + sample_N,
            order_N=window_shuffle(len(position_N), self.shuffle, generator(_WINDOW, self.seed, epoch, rank, worker)),
            batches=batches,
        )

    def pixels(self, epoch: int, number: int) -> np.random.Generator:
        """The generator that draws a sample's augmentation: the same whichever rank and worker decodes it."""
        return generator(_PIXELS, self.seed, epoch, number)


def generator(purpose: int, *numbers: int) -> np.random.Generator:
    """A generator of its own for each purpose and numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, *numbers])))


def window_shuffle(length: int, window: int, rng: np.random.Generator) -> Indices:
    """An order of 0 to length - 1 in which none comes `window` or more places early or late; 0 leaves all in
    place.

    Each index is moved back by a random part of the window. So whoever gives out index i needs to have read
    no further than i, and holds at most `window` samples that were read and not yet given out. A window of
    `length` or more is a plain permutation.
    """
    if window >= length:
        return rng.permutation(length)
    return np.argsort(np.arange(length) + rng.random(length) * window, kind="stable")
