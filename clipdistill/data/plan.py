"""Assignment of samples to steps, ranks and workers: a pure function of (seed, epoch, ranks, workers).

Each epoch concatenates the shards in a random order, starting at a random sample, and cuts the sequence of T
samples into equal parts of full batches, one per rank:

    shard 5 | shard 0        | shard 3   | shard 1      | 5      T samples
    rank 0               | rank 1                | remainder     S * batch_size samples per rank
    worker 0 | worker 1  | worker 0 | worker 1   |               full batches per worker

Every rank takes S = T // (ranks * batch_size) steps, however uneven or few the shards. The epoch leaves out
only the remainder: fewer than ranks * batch_size samples, different ones each epoch. A worker reads its part
sequentially, and yields it shuffled within a window.

If a run resumes with another number of ranks or workers, the samples already yielded are removed from the
sequence, and the rest is cut again.

Samples may have weights: an epoch then holds a sample more or less often, in a row in its shard, and has the same
length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clipdistill.errors import InputError

Indices = NDArray[np.int64]

_SHARDS, _WINDOW, _PIXELS, _DRAWS, _VIEWS, _CAPTIONS, _REPEATS = 1, 2, 3, 4, 5, 6, 7


@dataclass(frozen=True, kw_only=True, eq=False)
class Partition:
    """The N samples of one worker of one rank in one epoch, in reading order."""

    shard_N: Indices
    """Number of the sample's shard in the index."""
    sample_N: Indices
    """Number of the sample in its shard."""
    number_N: Indices
    """Number of the sample in the entire index, the same in every epoch."""
    repeat_N: Indices
    """How often the sample stands before in the epoch; 0 unless samples have weights."""
    order_N: Indices
    """Order of yielding: positions in the arrays above."""
    batches: int

    def __len__(self) -> int:
        return len(self.order_N)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks, workers and batch size over which the samples are distributed."""

    batch_size: int
    """Samples per rank and step."""
    ranks: int
    workers: int
    """Workers of each rank, at least 1."""
    shuffle: int
    """Window of the sample shuffle; 0: off. A window at least as long as a worker's part shuffles it fully."""

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "ranks": 1, "workers": 1, "shuffle": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")

    @property
    def global_batch(self) -> int:
        """Samples of all ranks in one step."""
        return self.ranks * self.batch_size

    def turns(self, *, steps: int, before: int, worker: int) -> int:
        """Number of batches that a worker makes in the `steps` after `before`: every batch g with
        g % workers = worker."""
        return len(range((worker - before) % self.workers, steps, self.workers))

    def part(self, *, samples: int, before: int, rank: int, worker: int) -> tuple[int, int]:
        """Start of a worker's part of a sequence of samples, and its length in batches."""
        steps = samples // self.global_batch
        made = [self.turns(steps=steps, before=before, worker=other) for other in range(worker + 1)]
        return (rank * steps + sum(made[:worker])) * self.batch_size, made[worker]


@dataclass(frozen=True, kw_only=True)
class PreviousLayout(Layout):
    """Progress of an earlier layout in an epoch."""

    before: int
    """Batches of a rank that the layout yielded before the epoch."""
    positions: Sequence[Sequence[int]]
    """For each rank and worker, the samples of its partition that were yielded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Layout):
    """The order of samples of all epochs.

    Raises:
        InputError: Fewer samples than one batch per rank.
    """

    sizes: Sequence[int]
    """Samples of each shard of the index."""
    seed: int
    weights: NDArray[np.float64] | None = None
    """How often an epoch holds each sample of the index, on average; their sum is the number of samples. None: once.
    An epoch holds a sample of weight 2.3 twice or three times."""
    first_epoch: int = 0
    """Epoch in which this layout begins."""
    past: Sequence[PreviousLayout] = ()
    """Earlier layouts of its first epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, must be at least 0")
        if self.total < self.global_batch:
            raise InputError(
                f"shards: {self.total} samples in {len(self.sizes)} shards, but one step needs {self.global_batch} "
                f"({self.ranks} ranks x batch_size {self.batch_size}); allowed: a smaller batch, or more samples"
            )

    @cached_property
    def total(self) -> int:
        """Samples of the entire index."""
        return sum(self.sizes)

    @property
    def steps(self) -> int:
        """Batches of each rank in a full epoch."""
        return self.total // self.global_batch

    def steps_of(self, epoch: int) -> int:
        """Batches of each rank in an epoch: fewer in the first if an earlier layout began it."""
        return self._left(epoch) // self.global_batch

    def before(self, epochs: float) -> float:
        """Batches of each rank from this layout's start to a point of the run, such as 2.5 epochs."""
        whole = int(epochs)
        if whole < self.first_epoch:
            return 0
        if whole == self.first_epoch:
            done = self.total - self._left(whole)
            return max(0.0, (epochs - whole) * self.steps - done / self.global_batch)
        later = whole - self.first_epoch - 1 + (epochs - whole)
        return self.steps_of(self.first_epoch) + later * self.steps

    def epoch_at(self, step: int) -> int:
        """The epoch of batch `step` of this layout."""
        first = self.steps_of(self.first_epoch)
        return self.first_epoch if step < first else self.first_epoch + 1 + (step - first) // self.steps

    def batches(self, epoch: int, worker: int) -> int:
        """Batches of the epoch that a worker makes."""
        return self.turns(steps=self.steps_of(epoch), before=int(self.before(epoch)), worker=worker)

    def partition(self, epoch: int, rank: int, worker: int) -> Partition:
        """The samples of one worker of one rank in one epoch, and their order."""
        first, batches = self.part(samples=self._left(epoch), before=int(self.before(epoch)), rank=rank, worker=worker)
        position_N = np.arange(first, first + batches * self.batch_size)
        past = self.past if epoch == self.first_epoch else ()
        if past:
            position_N = self._rest[position_N]

        rng = generator(_SHARDS, self.seed, epoch)
        shards = rng.permutation(len(self.sizes))
        position_N = (position_N + rng.integers(self.total)) % self.total
        sizes = np.asarray(self.sizes, np.int64)
        ends = np.cumsum(sizes[shards])
        repeat_N = np.zeros_like(position_N)
        if self.weights is not None:
            position_N, repeat_N = self._repeated(self.weights, shards, epoch, position_N)
        at_N = np.searchsorted(ends, position_N, side="right")
        shard_N = shards[at_N]
        sample_N = position_N - (ends[at_N] - sizes[shard_N])
        return Partition(
            shard_N=shard_N,
            sample_N=sample_N,
            number_N=(np.cumsum(sizes) - sizes)[shard_N] + sample_N,
            repeat_N=repeat_N,
            order_N=self._order(self, len(position_N), epoch, rank, worker, len(past)),
            batches=batches,
        )

    def pixels(self, epoch: int, number: int, repeat: int) -> np.random.Generator:
        """Random generator of a sample's augmentation: the same whichever rank and worker decodes it."""
        return generator(_PIXELS, self.seed, epoch, number, *_if_repeated(repeat))

    def view(self, epoch: int, number: int, repeat: int, views: int) -> int:
        """Number of the fixed view that a sample shows: each once in `views` epochs, or in as many repeats."""
        return (epoch + number + repeat) % views

    def caption(self, epoch: int, number: int, repeat: int, captions: int) -> int:
        """Number of the caption that a sample of several shows in an epoch, drawn uniformly."""
        return int(generator(_CAPTIONS, self.seed, epoch, number, *_if_repeated(repeat)).integers(captions))

    def _repeated(
        self, weights: NDArray[np.float64], shards: Indices, epoch: int, position_N: Indices
    ) -> tuple[Indices, Indices]:
        """Positions in the sequence of all samples, of positions in that of the weighted epoch; and their repeats.

        The repeats of the samples come from one random number (systematic sampling, Madow 1949): each is its weight,
        rounded up or down, and they add up to the length of the epoch.
        """
        starts = np.cumsum(self.sizes) - self.sizes
        order = np.concatenate([np.arange(starts[shard], starts[shard] + self.sizes[shard]) for shard in shards])
        ends = np.cumsum(weights[order])
        ends *= self.total / ends[-1]
        until = np.floor(ends + generator(_REPEATS, self.seed, epoch).random()).astype(np.int64)
        until[-1] = self.total
        at_N = np.searchsorted(until, position_N, side="right")
        before = np.concatenate([[0], until])
        return at_N, position_N - before[at_N]

    def _left(self, epoch: int) -> int:
        """Number of samples of an epoch that this layout distributes."""
        return len(self._rest) if self.past and epoch == self.first_epoch else self.total

    @cached_property
    def _rest(self) -> Indices:
        """Positions in the first epoch's sequence that no earlier layout yielded."""
        rest = np.arange(self.total)
        for number, past in enumerate(self.past):
            waiting = np.ones(len(rest), bool)
            for rank, positions in enumerate(past.positions):
                for worker, position in enumerate(positions):
                    first, batches = past.part(samples=len(rest), before=past.before, rank=rank, worker=worker)
                    order = self._order(past, batches * past.batch_size, self.first_epoch, rank, worker, number)
                    waiting[first + order[:position]] = False
            rest = rest[waiting]
        return rest

    def _order(self, layout: Layout, length: int, epoch: int, rank: int, worker: int, number: int) -> Indices:
        """The order in which a worker of the epoch's layout `number` yields its part."""
        again = [number] if number else []
        return window_shuffle(length, layout.shuffle, generator(_WINDOW, self.seed, epoch, rank, worker, *again))


@dataclass(frozen=True, kw_only=True)
class ResampledPlan(Layout):
    """An endless stream: each worker draws shards with replacement.

    Raises:
        InputError: No shards, or an epoch is shorter than a step.
    """

    shards: int
    """Number of shards to draw from."""
    seed: int
    samples_per_epoch: int
    """Length of an epoch; the stream itself does not depend on it."""
    restarts: int = 0
    """Number of changes of the number of ranks or workers: each starts a new series of draws."""
    first_epoch: float = 0.0
    """Epochs before the last change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shards < 1:
            raise InputError("shards: none; allowed: one or more")
        if self.samples_per_epoch < self.global_batch:
            raise InputError(
                f"samples_per_epoch: {self.samples_per_epoch}, but one step takes {self.global_batch} "
                f"({self.ranks} ranks x batch_size {self.batch_size}); allowed: that many or more"
            )

    @property
    def steps(self) -> int:
        """Batches of each rank in an epoch."""
        return self.samples_per_epoch // self.global_batch

    def before(self, epochs: float) -> float:
        """Batches of each rank from this layout's start to a point of the run, such as 2.5 epochs."""
        return max(0.0, (epochs - self.first_epoch) * self.steps)

    def epoch_at(self, step: int) -> int:
        """The epoch of batch `step` of this layout."""
        return int(self.first_epoch + step / self.steps)

    def shard(self, rank: int, worker: int, draw: int) -> int:
        """The shard of a worker's draw."""
        return int(self._generator(_DRAWS, rank, worker, draw).integers(self.shards))

    def keys(self, rank: int, worker: int, draw: int, first: int, samples: int) -> NDArray[np.float64]:
        """Sort key of each sample of a draw, whose first is the worker's sample number `first`: the sample's
        number plus a random part of the window. Samples are yielded in ascending order of the keys."""
        noise = self._generator(_WINDOW, rank, worker, draw).random(samples)
        return first + np.arange(samples) + noise * self.shuffle

    def pixels(self, rank: int, worker: int, number: int) -> np.random.Generator:
        """Random generator of the augmentation of a worker's sample."""
        return self._generator(_PIXELS, rank, worker, number)

    def view(self, rank: int, worker: int, number: int, views: int) -> int:
        """Number of the fixed view that a sample shows, drawn uniformly."""
        return int(self.pixels(rank, worker, number).integers(views))

    def caption(self, rank: int, worker: int, number: int, captions: int) -> int:
        """Number of the caption that a sample of several shows, drawn uniformly."""
        return int(self._generator(_CAPTIONS, rank, worker, number).integers(captions))

    def _generator(self, purpose: int, *numbers: int) -> np.random.Generator:
        return generator(purpose, self.seed, self.restarts, *numbers)


def _if_repeated(repeat: int) -> tuple[int, ...]:
    return (repeat,) if repeat else ()


def view_pixels(seed: int, shard_digest: str, sample: int, view: int) -> np.random.Generator:
    """Random generator of a fixed view of a sample: independent of the shard's location and of the other shards."""
    return generator(_VIEWS, seed, int(shard_digest, 16), sample, view)


def generator(purpose: int, *numbers: int) -> np.random.Generator:
    """An independent random generator for each purpose and numbers."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([purpose, *numbers])))


def window_shuffle(length: int, window: int, rng: np.random.Generator) -> Indices:
    """A permutation of 0 to length - 1 that moves every index by less than `window` places; 0 is the
    identity.

    Each index is delayed by a random part of the window. So a reader that yields index i needs to have read no
    further than i, and holds at most `window` samples that were read and not yet yielded. A window of `length`
    or more is a uniform permutation.
    """
    if window >= length:
        return rng.permutation(length)
    return np.argsort(np.arange(length) + rng.random(length) * window, kind="stable")
