"""The rectifier network."""

from __future__ import annotations

import copy

import pytest
import torch

from revq.models.rectifier import Rectifier, update_ema


@pytest.mark.parametrize("block", ["conv", "efficientvit"])
def test_an_untrained_rectifier_changes_nothing(block: str) -> None:
    latents = torch.randn(2, 8, 16, 16)
    assert torch.equal(Rectifier(channels=8, width=32, depth=2, block=block)(latents), latents)


@pytest.mark.parametrize("block", ["conv", "efficientvit"])
def test_a_rectifier_learns_to_undo_a_known_distortion(block: str) -> None:
    torch.manual_seed(0)
    rectifier = Rectifier(channels=4, width=32, depth=1, block=block)
    optimizer = torch.optim.AdamW(rectifier.parameters(), lr=3e-3)
    for _ in range(60):
        latents = torch.randn(16, 4, 8, 8)
        loss = (rectifier(0.5 * latents) - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15  # untouched, the distortion is 0.25


def test_the_moving_average_lags_behind_but_follows() -> None:
    rectifier = Rectifier(channels=4, width=32, depth=1)
    average = copy.deepcopy(rectifier)
    with torch.no_grad():
        rectifier.conv_out.bias.add_(1.0)
    update_ema(average, rectifier, decay=0.999, step=10_000)
    assert torch.allclose(average.conv_out.bias, torch.full((4,), 0.001))
    update_ema(average, rectifier, decay=0.0, step=10_001)
    assert torch.equal(average.conv_out.bias, rectifier.conv_out.bias)
