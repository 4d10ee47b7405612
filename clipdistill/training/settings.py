"""The settings of the training loop."""

from typing import Annotated

from pydantic import Field

from clipdistill.losses import Implementation
from clipdistill.models.precision import Precision
from clipdistill.settings import Count, CountOrZero, Positive, Settings


class TrainSettings(Settings):
    """Length, precision, and intervals of training."""

    epochs: Positive | None = None
    """Length of the run in passes over the data; state this or ``steps``."""
    steps: Count | None = None
    """Length of the run in optimizer steps; state this or ``epochs``."""
    accumulate: Count = 1
    """Micro-batches per optimizer step; the result equals one batch of that many times the size, unless the model
    itself depends on its micro-batch (batch norm) or on random numbers (dropout)."""
    teacher_micro_batches: Count = 1
    """Micro-batches that the teachers encode at once, if memory allows; they keep nothing for a backward pass."""
    precision: Precision = "auto"
    """fp32 (matrix products in TF32 on a GPU), bf16 (autocast of the student; losses and weights stay float32), auto
    (bf16 on a GPU that computes in it, else fp32), or bf16-if-native (so also on a CPU)."""
    loss_implementation: Implementation = "auto"
    """Implementation of gkl and kl. plain: from the logit matrices; tiled, triton: directly from the features, without
    these matrices, in PyTorch and in CUDA kernels; auto: plain or tiled, the faster one for the size."""
    channels_last: bool = True
    """NHWC memory layout of convolutions: faster on most devices, correct on all."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then evaluated and exported; empty: off."""
    log_every: Count = 20
    """Optimizer steps between metrics records."""
    evaluate_every: Count | None = None
    """Optimizer steps between evaluations; empty: only at the end."""
    save_every: Count = 500
    """Optimizer steps between checkpoints (one is also written at each evaluated step, and at the end), which are
    written while the next steps run, from a copy in the host's memory."""
    keep: Count = 3
    """Number of newest checkpoints to keep."""
    keep_best: CountOrZero = 1
    """Number of best checkpoints to keep, by ``best_metric``; requires ``evaluate_every``. 0: none."""
    best_metric: str = "evaluation/mean"
    """Metric that ranks checkpoints: ``evaluation/SET/METRIC``, as in the metrics; or the mean over the sets of their
    main metrics, which are acc1, mean_average_precision (multi-label sets) and mean_recall@1 (retrieval)."""
    rank_timeout: Annotated[float, Field(ge=1)] = 600.0
    """Seconds that a process waits for the others before it ends the run; one that sends no heartbeat for half of
    them is given up. Work that the first process does alone, such as the export, may take longer."""
    trace: bool = False
    """Write the keys of every step's samples, and a digest of their pixels, to samples/ in the output."""
    threads: Count | None = None
    """CPU threads per process; empty: torch's default."""
    trackers: list[str] | None = None
    """Accelerate trackers in addition to metrics.jsonl; empty: tensorboard, if installed."""
