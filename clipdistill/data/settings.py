"""The settings of the training stream."""

from typing import Annotated

from pydantic import Field

from clipdistill.data.image import Augmentation
from clipdistill.data.labels import Sampling
from clipdistill.data.workers import WORKER_TIMEOUT
from clipdistill.io.caches import DEFAULT_CACHE
from clipdistill.io.images import MAX_PIXELS
from clipdistill.io.machine import cores_per_process
from clipdistill.settings import Count, CountOrZero, Fraction, LocalPath, Settings

MOST_WORKERS = 16
"""More decoding processes are only started if the config says so: each holds batches in shared memory."""


class DataSettings(Settings):
    """The training stream."""

    shards: list[str] = Field(default_factory=list)
    """WebDataset shards: paths, globs, brace patterns, folders; local, http(s)://, s3:// or hf://."""
    batch_size: Count = 256
    """Samples per process and micro-batch. Global batch = processes x train.accumulate x batch_size."""
    image_size: Count | tuple[Count, Count] | None = None
    """Side, or height and width, in pixels, of the uint8 crop that all towers share; empty: the largest height and
    width of the towers' inputs."""
    workers: CountOrZero | None = None
    """Decoding processes for each training process; 0 decodes in the training process itself. Empty: 2; with a GPU,
    the cores of the machine divided among its training processes, at most 16."""
    worker_timeout: Annotated[float, Field(ge=1)] = WORKER_TIMEOUT
    """Seconds that the run waits for a batch of a decoding process before it names the process and ends."""
    views: CountOrZero = 0
    """Fixed augmentations of each sample, of which an epoch shows one; 0: a new one each epoch."""
    view_seed: CountOrZero = 0
    """Seed of the fixed augmentations, separate from ``seed``, so that runs of several seeds share a teacher cache."""
    shuffle: CountOrZero = 1000
    """Window of the sample shuffle, in samples; 0: off. The order of shards is shuffled each epoch in any case."""
    caption_key: str = "txt"
    """Source of the captions: ``txt``, one a line, or a field of the sample's json, a text or a list of texts. An epoch
    draws one of several."""
    label_key: str = "cls"
    """Source of the label, a class number or name: ``cls``, or a field of the sample's json."""
    labels_by_order: bool = False
    """Match the classes of a ``classnames.txt`` beside the shards with the prompts by order; default: by name."""
    sampling: Sampling | None = None
    """How often an epoch holds the samples of a class (needs ``labels: dataset``). square_root: in proportion to the
    square root of their number; class: each class equally often. A rare class's samples are then seen several times an
    epoch, and not all of a frequent one's. Empty: each sample once."""
    samples_per_epoch: Count | None = None
    """For sets too large for epochs: draw shards at random with replacement; an epoch is this many samples.
    Empty: an epoch is every sample once."""
    max_bad_share: Fraction = 0.01
    """Largest share of bad samples, and of shards that cannot be read; above it the run saves and stops. Samples are
    judged from the first 1,000 on. 1: never stop."""
    max_pixels: Count = MAX_PIXELS
    """Images of more pixels are refused before they are decoded."""
    cache: LocalPath = DEFAULT_CACHE
    """Folder for shard indexes and class embeddings, keyed by content."""
    augmentation: Augmentation = Field(default_factory=Augmentation)

    def decoding_processes(self, *, on_gpu: bool) -> int:
        """Number of decoding processes of this training process."""
        if self.workers is not None:
            return self.workers
        return min(cores_per_process(), MOST_WORKERS) if on_gpu else 2
