"""The rectifier: maps a quantized latent back toward the true one.

Shapes: B batch, C,H,W latent channels, rows, columns. Latents are standardised here, in and out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Rectifier(nn.Module):
    """A residual network over the latent grid; its last layer starts at zero, so an untrained rectifier changes nothing.

    Its blocks are plain residual convolutions, or the paper's EfficientViT (linear attention and a gated depthwise convolution, from
    diffusers).
    """

    def __init__(self, *, channels: int, width: int, depth: int, block: str = "conv") -> None:
        """Build it, randomly initialised but for the last layer.

        Args:
            channels: C of the latent.
            width: channels inside; a multiple of 32.
            depth: number of blocks.
            block: "conv" or "efficientvit".
        """
        super().__init__()
        self.settings: dict[str, Any] = {"channels": channels, "width": width, "depth": depth, "block": block}
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_block(block, width) for _ in range(depth)))
        self.norm = nn.GroupNorm(1, width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, quantized: Tensor) -> Tensor:
        """Quantized standardised latent (B,C,H,W) -> rectified standardised latent (B,C,H,W)."""
        hidden = self.blocks(self.conv_in(quantized))
        return quantized + self.conv_out(nn.functional.silu(self.norm(hidden)))


def _block(kind: str, width: int) -> nn.Module:
    if kind == "conv":
        return _ResidualConvolutions(width)
    from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock

    return EfficientViTBlock(width, norm_type="rms_norm")


class _ResidualConvolutions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(nn.functional.silu(self.conv1(self.norm(x))))


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move `ema`'s weights toward `module`'s: an exponential moving average that forgets its start quickly (decay grows with the step)."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(module.parameters()), 1 - decay)
