"""The cost of an image tower, against arithmetic."""

import pytest
import torch

from clipdistill.evaluation import image_tower_cost
from clipdistill.models.loading import load_student


@pytest.mark.parametrize("gradient", [True, False])
def test_the_operations_of_a_vision_transformer_include_its_attention(gradient: bool) -> None:
    """2 operations a multiply-add: patches, then of each layer the projections, both products of attention, the MLP."""
    tower = load_student("ViT-S-16").requires_grad_(gradient)
    width, layers, patches = 384, 12, (224 // 16) ** 2
    tokens = patches + 1
    a_layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 4 * width
    expected = 2 * (patches * 16 * 16 * 3 * width + layers * a_layer + width * tower.embed_dim)
    cost = image_tower_cost(tower)
    assert cost["gflops"] == pytest.approx(expected / 1e9, rel=1e-3)
    assert cost["gflops"] == pytest.approx(9.2, abs=0.1)
    assert cost["parameters_m"] == pytest.approx(sum(each.numel() for each in tower.clip.visual.parameters()) / 1e6)
    assert torch.backends.mha.get_fastpath_enabled()
