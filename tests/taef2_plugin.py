"""A VAE plug-in: TAEF2's published weights in a network written from its description. `--vae tests/taef2_plugin.py:load`.

The weights are read from REVQ_SHARED (default ../shared); images in [-1,1], latents (B,32,S/8,S/8) unscaled.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def conv(in_channels: int, out_channels: int, **options: object) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, **options)  # type: ignore[arg-type]


class Block(nn.Module):
    """y = relu(branch(x) + x), 64 channels; with `pooled`, x first takes in a grouped bottleneck."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        self.pool: nn.Module | None = None
        if pooled:
            self.pool = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(), nn.Conv2d(256, 64, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def encoder() -> nn.Sequential:
    def down() -> nn.Conv2d:
        return conv(64, 64, stride=2, bias=False)

    pooled = [Block(pooled=True) for _ in range(3)]
    return nn.Sequential(
        conv(3, 64), Block(), down(), Block(), Block(), Block(), down(), Block(), Block(), Block(), down(), *pooled, conv(64, 32)
    )  # fmt: skip


def decoder() -> nn.Sequential:
    def up() -> list[nn.Module]:
        return [nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]

    pooled = [Block(pooled=True) for _ in range(3)]
    blocks = [Block() for _ in range(7)]
    return nn.Sequential(
        SoftClamp(), conv(32, 64), nn.ReLU(), *pooled, *up(), *blocks[:3], *up(), *blocks[3:6], *up(), blocks[6], conv(64, 3)
    )  # fmt: skip


class TAEF2(nn.Module):
    """The weights take images in [0,1]; revq's are in [-1,1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder()
        self.decoder = decoder()

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder((images + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 2 - 1


class Shifted(TAEF2):
    """The same pictures from latents times `factor` plus an offset for each channel."""

    def __init__(self, factor: float, offset: list[float]) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("offset", torch.tensor(offset)[:, None, None])

    def encode(self, images: Tensor) -> Tensor:
        return self.factor * super().encode(images) + self.offset

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode((latents - self.offset) / self.factor)


def with_weights(network: TAEF2) -> TAEF2:
    folder = Path(os.environ.get("REVQ_SHARED", "../shared")) / "vae" / "taef2"
    for part in ("encoder", "decoder"):
        state = {name: tensor.float() for name, tensor in load_file(folder / f"{part}.safetensors").items()}
        getattr(network, part).load_state_dict(state)
    return network


def load() -> TAEF2:
    return with_weights(TAEF2())


def load_at_1000() -> TAEF2:
    return with_weights(Shifted(1.0, [1000.0] * 32))


def load_with_one_channel_at_1000() -> TAEF2:
    return with_weights(Shifted(1.0, [0.0] * 5 + [1000.0] + [0.0] * 26))


def load_at_300000() -> TAEF2:
    return with_weights(Shifted(0.5, [300_000.0] * 32))


def load_tiny() -> TAEF2:
    return with_weights(Shifted(1e-6, [0.0] * 32))


def load_large_and_far() -> TAEF2:
    return with_weights(Shifted(1000.0, [10_000.0] * 32))
