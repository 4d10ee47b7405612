"""Shards to batches: streamed, deterministic, resumable to the sample.

The chain, each link a small function or generator of its own module; on the right what it is a function of:

    patterns      urls.expand_urls          -> shard URLs
    URLs          index.index_shards        -> where each sample begins            (shards; kept on disk)
    index         plan.Plan.share           -> which samples, in which order       (seed, epoch, rank, worker)
    order         stream._given_out         -> raw samples; the window is held     (share, position)
    bytes         sample.SampleReader       -> members of one sample               (tar.walk)
    raw sample    sample.Decoder            -> caption, label; image.render: view  (seed, epoch, sample)
    samples       stream.ImageTextStream    -> Batch, past the bad ones            (in each worker process)
    batches       stream.StreamLoader       -> Batch, in the run's order           (knows what was handed out)

Nothing here knows of Accelerate, and the loader must not be given to `accelerator.prepare`: ranks share the
samples out by the plan. Only images, text and json are decoded; nothing is unpickled, and no shell is run for
a URL.
"""

from clipdistill.data.image import Augmentation
from clipdistill.data.index import ShardIndex, index_shards
from clipdistill.data.stream import Batch, ImageTextStream, StreamLoader
from clipdistill.data.urls import expand_urls

__all__ = [
    "Augmentation",
    "Batch",
    "ImageTextStream",
    "ShardIndex",
    "StreamLoader",
    "expand_urls",
    "index_shards",
]
