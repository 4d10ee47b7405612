"""Cost of an image tower: parameters, operations, throughput."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from clipdistill.models.towers import Tower


def images_per_second(tower: Tower, *, batch_size: int, seconds: float = 1.0) -> float:
    """Throughput of the image tower alone on random pixels, after one warm-up batch."""
    images = torch.randint(0, 256, (batch_size, 3, *tower.image_size), dtype=torch.uint8)
    images = images.to(tower.device)
    with torch.no_grad():
        tower.encode_image(images)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            tower.encode_image(images)
            count += batch_size
    return count / (time.perf_counter() - start)


def image_tower_cost(tower: Tower) -> dict[str, float]:
    """Parameters (millions) and GFLOPs per image (2 per multiply-add), counted by torch's FlopCounterMode."""
    parameters = sum(parameter.numel() for parameter in tower.clip.visual.parameters())
    images = torch.zeros(1, 3, *tower.image_size, dtype=torch.uint8, device=tower.device)
    was_training = tower.training
    tower.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.encode_image(images)
    tower.train(was_training)
    return {"parameters_m": parameters / 1e6, "gflops": counter.get_total_flops() / 1e9}
