"""The optimizer against torch's own, on the layouts that a run has."""

import copy

import pytest
import torch
from torch import nn

from clipdistill.training.optimizer import AdamW, match_layouts, parameter_groups


def net(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 5)).to(
        memory_format=layout
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, layout: torch.memory_format, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(6, 3, 6, 6).to(memory_format=layout)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_updates_are_those_of_the_plain_form(layout: torch.memory_format) -> None:
    """Also after a restore from a state of another layout, as a file may have it."""
    settings = AdamW(lr=0.01, weight_decay=0.2)
    model, plain = net(layout), net(torch.contiguous_format)
    optimizer = settings.make(model, torch.device("cpu"))
    reference = torch.optim.AdamW(
        parameter_groups(plain, 0.2), lr=0.01, betas=settings.betas, eps=settings.eps, foreach=False, fused=False
    )
    train(model, optimizer, layout, range(3))
    train(plain, reference, torch.contiguous_format, range(3))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    for saved in (torch.contiguous_format, torch.channels_last):
        resumed, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        for values in state["state"].values():
            for name, value in values.items():
                values[name] = value.to(memory_format=saved) if value.ndim == 4 else value
        restored = settings.make(resumed, torch.device("cpu"))
        restored.load_state_dict(state)
        match_layouts(restored)
        train(resumed, restored, layout, range(3, 6))
        again, other = copy.deepcopy(plain), copy.deepcopy(reference.state_dict())
        undisturbed = torch.optim.AdamW(
            parameter_groups(again, 0.2), lr=0.01, betas=settings.betas, eps=settings.eps, foreach=False, fused=False
        )
        undisturbed.load_state_dict(other)
        train(again, undisturbed, torch.contiguous_format, range(3, 6))
        for ours, theirs in zip(resumed.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
