"""Batches on their way to the device."""

import torch

from clipdistill.data import Batch


class Transfer:
    """Copies batches from pinned memory to a GPU on a stream of its own, while the kernels of earlier steps, which the
    host has queued, still run. On other devices, a plain copy.

    Args:
        device: of the student.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; its tensors can be used at once on the current stream."""
        if self._stream is None:
            return batch.to(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        current.wait_stream(self._stream)
        for tensor in moved.tensors():
            tensor.record_stream(current)  # else its memory would be reused before the step has run
        return moved
