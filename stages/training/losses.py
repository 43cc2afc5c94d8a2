"""What train-rectifier minimises.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side in pixels. Losses are means over every value of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...models.transform import LatentTransform
from ...models.vae import FrozenVAE
from ..evaluation.networks import Lpips
from ..evaluation.weights import ALEXNET, LPIPS_SMALLEST_SIDE, find_weights


def latent_loss(rectified: Tensor, standardised: Tensor, scale: Tensor) -> Tensor:
    """Mean squared error of standardised latents (B,C,H,W), each position weighted by the transform's `scale` (C,H,W).

    The scale is 1 but for the decoder transform, where it says how much a position moves the picture.
    """
    return F.mse_loss(rectified * scale, standardised * scale)


@dataclass(frozen=True, kw_only=True)
class PictureLoss:
    """The loss through the frozen decoder: decode(rectified) against decode(cached latent). No image is read."""

    vae: FrozenVAE
    transform: LatentTransform
    lpips: nn.Module | None
    """LPIPS-Alex of images in [0,1]; None leaves it out."""
    lpips_weight: float
    micro_batch: int
    """Latents decoded at once, on each rank."""

    def __call__(self, rectified: Tensor, latents: Tensor) -> Tensor:
        """Rectified standardised latents and raw cached latents (B,C,H,W) -> mean squared error of [0,1] pixels, plus weight times LPIPS."""
        with torch.no_grad():
            target = self.vae.decode(latents)
        decoded = self.vae.decode(self.transform.unstandardize(rectified))
        loss = F.mse_loss(decoded, target) / 4
        if self.lpips is not None:
            loss = loss + self.lpips_weight * self.lpips((decoded + 1) / 2, (target + 1) / 2, normalize=True).mean()
        return loss


def open_lpips(image_size: int, device: torch.device) -> nn.Module:
    """The frozen LPIPS network, from torch's cache or a download.

    Raises:
        ConfigError: its published weights cannot be had, or the images are too small for it.
    """
    network: nn.Module = Lpips("alex", find_lpips(image_size), device).network
    return network.requires_grad_(False).eval()


def find_lpips(image_size: int) -> Path:
    """Where the weights of `open_lpips` are; raises ConfigError as it does."""
    if image_size < LPIPS_SMALLEST_SIDE:
        raise ConfigError(f"finish-lpips needs images of at least {LPIPS_SMALLEST_SIDE} px, and these have {image_size}; leave it at 0")
    found = find_weights(ALEXNET)
    if found.path is None:
        raise ConfigError(f"finish-lpips needs weights that are not here: {found.reason}; or leave it at 0")
    return found.path
