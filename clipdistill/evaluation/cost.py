"""Cost of an image tower: parameters, operations, throughput."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.io.machine import device_time
from clipdistill.models.last_block import all_tokens
from clipdistill.models.towers import Tower


def images_per_second(tower: Tower, *, batch_size: int, seconds: float = 1.0) -> float:
    """Throughput of the image tower alone on random pixels, after one warm-up batch."""
    images = torch.randint(0, 256, (batch_size, 3, *tower.image_size), dtype=torch.uint8)
    device = tower.device
    images = images.to(device)
    with torch.no_grad():
        tower.encode_image(images)
        start, count = device_time(device), 0
        while device_time(device) - start < seconds:
            tower.encode_image(images)
            count += batch_size
    return count / (device_time(device) - start)


def image_tower_cost(tower: Tower) -> dict[str, float]:
    """Parameters (millions) and GFLOPs per image (2 per multiply-add), counted by torch's FlopCounterMode.

    The counter knows no fused attention of the CPU, nor the fast path of ``nn.MultiheadAttention``: both are off. The
    last block is counted for all tokens, as others compute it.
    """
    parameters = sum(parameter.numel() for parameter in tower.clip.visual.parameters())
    images = torch.zeros(1, 3, *tower.image_size, dtype=torch.uint8, device=tower.device)
    was_training = tower.training
    tower.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), all_tokens(tower.clip.visual), counter:
            tower.encode_image(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    tower.train(was_training)
    return {"parameters_m": parameters / 1e6, "gflops": counter.get_total_flops() / 1e9}
