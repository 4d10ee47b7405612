"""Steps and epochs completed by a run."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from clipdistill.config import Config
from clipdistill.data import StreamLoader
from clipdistill.errors import InputError

log = logging.getLogger(__name__)

_SETTINGS = {"accumulate": "train.accumulate", "batch_size": "data.batch_size"}


class Progress:
    """Steps, epochs, and the factors of the global batch.

    Args:
        config: of the run.
        loader: its stream.
        ranks: number of processes.

    Attributes:
        step: optimizer steps taken.
        epoch: epoch of the last batch.
        steps_per_epoch: optimizer steps of a full epoch, when the run began.
    """

    def __init__(self, config: Config, loader: StreamLoader, *, ranks: int) -> None:
        self.step = self.epoch = 0
        self.steps_per_epoch = loader.steps_per_epoch / config.train.accumulate
        accumulate, batch_size = config.train.accumulate, config.data.batch_size
        self._batch = {"ranks": ranks, "accumulate": accumulate, "batch_size": batch_size}

    def enter(self, epoch: int) -> bool:
        """Record the epoch of the next batch; True if it is a new one."""
        new = epoch != self.epoch
        self.epoch = epoch
        return new

    def state_dict(self) -> dict[str, Any]:
        """Steps, epochs and the global batch; the same on all ranks."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "batch": self._batch,
        }

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore a run's progress.

        Raises:
            InputError: a setting changed the global batch.
        """
        state, now = states[0], self._batch
        before = state["batch"]
        was, size = math.prod(before.values()), math.prod(now.values())
        if was != size:
            for name, key in _SETTINGS.items():
                if before[name] != now[name]:
                    raise InputError(
                        f"{key}: {now[name]}, but the run has {before[name]}; allowed: the same, or one that keeps the "
                        f"global batch of {was} samples with {now['ranks']} processes"
                    )
            log.warning("the global batch was %d samples with %d processes; it is now %d", was, before["ranks"], size)
        self.step, self.epoch, self.steps_per_epoch = state["step"], state["epoch"], state["steps_per_epoch"]
