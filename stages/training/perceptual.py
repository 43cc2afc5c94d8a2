"""The perceptual term of the decoder phase: how far apart two pictures are to a trained network.

Squared error alone is least for a blurred picture: distortion and perceived quality trade against each other (Blau & Michaeli 2018, arXiv
1711.06077). The network that trains must be none that judges: a tokenizer would learn to please it.

Shapes: B pictures, S image side in pixels, F features. Pictures are float (B,3,S,S) in [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, ConfigNotFoundError
from ...models.efficientnet_lite import load_efficientnet_lite
from ...models.lpips import LPIPS
from ..evaluation.features import make_feature_network
from ..evaluation.networks import Lpips, read_weights
from ..evaluation.weights import LPIPS_SMALLEST_SIDE, VGG16, find_packaged, find_weights

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Decoded pictures and their targets -> mean distance (), differentiable in the first."""


def open_perceptual(spec: str, device: torch.device) -> Perceptual:
    """The term named `lpips-vgg`, `efficientnet-lite2` or `FILE.py:FACTORY`.

    Raises:
        ConfigError: its weights are not here, or the factory fails or makes no feature network.
    """
    if spec == "lpips-vgg":
        found = find_weights(VGG16, download=False)
        if found.path is None:
            raise ConfigNotFoundError(f"--perceptual {spec}: {found.reason}")
        return LpipsTerm(Lpips("vgg", found.path, device).network)
    if spec == "efficientnet-lite2":
        packaged = find_packaged(spec)
        assert packaged.path is not None
        return FeatureTerm(spec, load_efficientnet_lite(spec, read_weights(packaged.path, spec), device))
    return FeatureTerm(spec, make_feature_network(spec, "--perceptual", device)[0])


class LpipsTerm:
    """LPIPS of pictures that are large enough for its trunk."""

    def __init__(self, network: LPIPS) -> None:
        self.network = network

    def __call__(self, decoded: Tensor, target: Tensor) -> Tensor:
        if (side := decoded.shape[-1]) < LPIPS_SMALLEST_SIDE:
            raise ConfigError(f"--perceptual lpips-vgg needs pictures of at least {LPIPS_SMALLEST_SIDE} px, and these have {side}; leave it out")
        return self.network(decoded.float(), target.float()).mean()


class FeatureTerm:
    """Squared distance of a network's features, each of length 1: between 0 and 4."""

    def __init__(self, spec: str, network: object) -> None:
        self.spec, self.network = spec, network

    def __call__(self, decoded: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = self._features(target)
        ours = self._features(decoded)
        if decoded.requires_grad and not ours.requires_grad:
            raise ConfigError(f"--perceptual {self.spec}: features gives no gradients; let it run without torch.no_grad on float images in [0,255]")
        return (F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)).square().sum(1).mean()

    def _features(self, images: Tensor) -> Tensor:
        features = self.network.features((images.float() + 1) * 127.5)  # type: ignore[attr-defined]
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ConfigError(f"--perceptual {self.spec}: features must give a tensor ({len(images)},F) for {len(images)} images, and gave {shape}")
        return features
