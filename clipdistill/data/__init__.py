"""Shards to batches: streamed, deterministic, resumable to the sample.

The pipeline, one small function or generator per stage; on the right, the inputs that determine its result:

    patterns      urls.expand_urls          -> shard URLs
    URLs          index.index_shards        -> start of each sample                (shards; cached on disk)
    index         plan.Plan.partition       -> which samples, in which order       (seed, epoch, rank, worker)
    order         reading.read_partition    -> raw samples; the window is held     (partition, position)
    bytes         sample.SampleReader       -> members of one sample               (tar.walk)
    raw sample    sample.Decoder            -> caption, label; image.render: view  (seed, epoch, sample)
    samples       stream.ImageTextStream    -> Batch, without the bad ones         (in each worker process)
    batches       stream.StreamLoader       -> Batch, in the run's order           (counts what was yielded)

A resampled stream replaces stages two to four with `index.LazyIndex`, `plan.ResampledPlan` and
`reading.read_draws`.

Nothing here depends on Accelerate, and the loader must not be passed to `accelerator.prepare`: the plan
distributes the samples over the ranks. Only images, text and json are decoded; nothing is unpickled, and no
shell is run for a URL.
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
