"""States of torch's random generators, for checkpoints and recomputation."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clipdistill.distributed.collectives import rank


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the CPU's generator and, if there is one, the GPU's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore a ``random_state``."""
    torch.set_rng_state(state["cpu"].clone())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


class RandomState:
    """The generators of this rank, as a component of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state_dict(self) -> dict[str, Tensor]:
        """The states."""
        return random_state(self._device)

    def load_state_dict(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Restore this rank's state, if it was saved."""
        if rank() < len(states):
            set_random_state(states[rank()], self._device)
