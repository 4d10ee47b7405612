"""Cost of an image tower: parameters, operations, throughput."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.io.images import Size
from clipdistill.io.machine import device_time
from clipdistill.models.last_block import all_tokens
from clipdistill.models.towers import Tower


def images_per_second(tower: Tower, *, batch_size: int, seconds: float = 1.0) -> float:
    """Throughput of the image tower alone on random pixels, after one warm-up batch."""
    images = torch.randint(0, 256, (batch_size, 3, *tower.image_size), dtype=torch.uint8)
    return throughput(tower.encode_image, images.to(tower.device), seconds=seconds)


def throughput(forward: Callable[[Tensor], Any], images_BCHW: Tensor, *, seconds: float = 1.0) -> float:
    """Images per second of a function of a batch, after one warm-up batch, without gradients."""
    device = images_BCHW.device
    with torch.no_grad():
        forward(images_BCHW)
        start, count = device_time(device), 0
        while device_time(device) - start < seconds:
            forward(images_BCHW)
            count += len(images_BCHW)
    return count / (device_time(device) - start)


def image_tower_cost(tower: Tower) -> dict[str, float]:
    """Parameters (millions) and GFLOPs per image (2 per multiply-add), counted by torch's FlopCounterMode."""
    return module_cost(tower.clip.visual, tower.image_size, device=tower.device)


def module_cost(visual: nn.Module, size: Size, *, device: torch.device | str) -> dict[str, float]:
    """``image_tower_cost`` of an image tower by itself; on the meta device without memory and computation.

    The counter knows no fused attention of the CPU, nor the fast path of ``nn.MultiheadAttention``: both are off. The
    last block is counted for all tokens, as others compute it.

    Args:
        visual: the tower.
        size: height and width of its input.
        device: of its weights.
    """
    parameters = sum(parameter.numel() for parameter in visual.parameters())
    was_training = visual.training
    visual.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), all_tokens(visual), counter:
            visual(torch.zeros(1, 3, *size, device=device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    visual.train(was_training)
    return {"parameters_m": parameters / 1e6, "gflops": counter.get_total_flops() / 1e9}
