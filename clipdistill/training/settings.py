"""The settings of the training loop."""

from typing import Annotated, Literal

from pydantic import Field

from clipdistill.losses import Implementation
from clipdistill.settings import Count, CountOrZero, Positive, Settings


class TrainSettings(Settings):
    """How long, how often, how precisely."""

    epochs: Positive | None = None
    """Length of the run in passes over the data; state this or ``steps``."""
    steps: Count | None = None
    """Length of the run in optimizer steps; state this or ``epochs``."""
    accumulate: Count = 1
    """Micro-batches an optimizer step; the result equals one batch of that many times the size, save where the model
    itself looks at its micro-batch (batch norm) or at chance (dropout)."""
    teacher_micro_batches: Count = 1
    """Micro-batches that the teachers, which keep nothing for a backward pass, see at once, where memory allows."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 (autocast of the student; losses and weights stay float32)."""
    loss_implementation: Implementation = "auto"
    """Of gkl and kl. plain: by way of the matrices of logits; tiled, triton: straight from the features, without these
    matrices, in PyTorch and in CUDA kernels; auto: whichever is faster for the size."""
    channels_last: bool = True
    """Memory layout of convolutions: faster on most devices, never wrong."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and exported; empty: off."""
    log_every: Count = 20
    """Optimizer steps between two records of the metrics."""
    evaluate_every: Count | None = None
    """Optimizer steps between two evaluations; empty: at the end only."""
    save_every: Count = 500
    """Optimizer steps between two checkpoints (one is also written of each step that is evaluated, and at the end)."""
    keep: Count = 3
    """Newest checkpoints that are kept."""
    keep_best: CountOrZero = 1
    """Checkpoints that are kept for their ``best_metric``, where ``evaluate_every`` has it measured; 0: none."""
    best_metric: str = "evaluation/mean"
    """What makes a checkpoint one of the best: ``evaluation/SET/METRIC``, as in the metrics; or the mean over the sets
    of their main metrics, which are acc1, mean_average_precision (multi-label sets) and mean_recall@1 (retrieval)."""
    rank_timeout: Annotated[float, Field(ge=1)] = 600.0
    """Seconds that a process waits for the others before it ends the run; in half of them, one that gives no sign of
    life is given up. Work that the first process does alone, such as the export, may take longer."""
    trace: bool = False
    """Write the keys of every step's samples, and a digest of their pixels, to samples/ in the output."""
    threads: Count | None = None
    """CPU threads of a process; empty: what torch chooses."""
    trackers: list[str] | None = None
    """Accelerate trackers beside metrics.jsonl; empty: tensorboard where it is installed."""
