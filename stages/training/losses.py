"""What train-rectifier minimises.

Shapes: B batch, C,H,W latent channels, rows, columns. Losses are means over every value of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.transform import LatentTransform
from ...models.vae import FrozenVAE
from .perceptual import Perceptual


def latent_loss(rectified: Tensor, standardised: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error of standardised latents (B,C,H,W), each position weighted by the transform's `scale` (C,H,W).

    The scale is 1 but for the decoder transform, where it says how much a position moves the picture.
    """
    return F.mse_loss(rectified * scale, standardised * scale)


@dataclass(frozen=True, kw_only=True)
class PixelLoss:
    """The loss through the frozen decoder: decode(rectified) against decode(cached latent). No image is read."""

    vae: FrozenVAE
    transform: LatentTransform
    micro_batch: int
    """Latents decoded at once, on each rank."""
    perceptual: Perceptual | None = None
    perceptual_weight: float = 0.0

    def __call__(self, rectified: Tensor, latents: Tensor) -> Tensor:
        """Rectified standardised latents and raw cached latents (B,C,H,W) -> mean squared error of pixels in [0,1], plus the perceptual term."""
        with torch.no_grad():
            target = self.vae.decode(latents)
        decoded = self.vae.decode(self.transform.unstandardize(rectified))
        squares = F.mse_loss(decoded, target) / 4
        return squares if self.perceptual is None else squares + self.perceptual_weight * self.perceptual(decoded, target)
