"""Shards to batches: streamed, deterministic, resumable to the sample.

The chain, each link a small function or generator of its own module; on the right what it is a function of:

    patterns      urls.expand_urls          -> shard URLs
    URLs          index.index_shards        -> where each sample begins            (shards; kept on disk)
    index         plan.Plan.partition       -> which samples, in which order       (seed, epoch, rank, worker)
    order         reading.read_partition    -> raw samples; the window is held     (partition, position)
    bytes         sample.SampleReader       -> members of one sample               (tar.walk)
    raw sample    sample.Decoder            -> caption, label; image.render: view  (seed, epoch, sample)
    samples       stream.ImageTextStream    -> Batch, past the bad ones            (in each worker process)
    batches       stream.StreamLoader       -> Batch, in the run's order           (counts what was yielded)

A resampled stream has `index.LazyIndex`, `plan.ResampledPlan` and `reading.read_draws` in the place of the
second to fourth link.

Nothing here knows of Accelerate, and the loader must not be given to `accelerator.prepare`: ranks share the
samples out by the plan. Only images, text and json are decoded; nothing is unpickled, and no shell is run for
a URL.
"""

from clipdistill.data.image import Augmentation
from clipdistill.data.index import LazyIndex, ShardIndex, index_shards
from clipdistill.data.stream import Batch, ImageTextStream, StreamLoader
from clipdistill.io.urls import expand_urls

__all__ = [
    "Augmentation",
    "Batch",
    "ImageTextStream",
    "LazyIndex",
    "ShardIndex",
    "StreamLoader",
    "expand_urls",
    "index_shards",
]
