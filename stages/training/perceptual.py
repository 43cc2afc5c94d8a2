"""The perceptual term of the decoder phase: how far apart two pictures are to a trained network.

Squared error of pixels rewards blur: it won decibels and lost rFID and LPIPS (docs/results.md). The network that trains is never one that
judges: a tokenizer would learn to please it.

Shapes: B pictures, S image side in pixels, F features. Pictures are float (B,3,S,S) in [-1,1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError, ConfigNotFoundError
from ...models.efficientnet_lite import load_efficientnet_lite
from ...models.lpips import LPIPS
from ...models.plugin import make_from_file
from ..evaluation.networks import read_weights, require_weights
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
        network = LPIPS("vgg")
        state = {name: tensor for name, tensor in read_weights(found.path, "VGG16").items() if not name.startswith("classifier.")}
        require_weights(state, network.trunk_state(), f"{found.path} does not fit torchvision's VGG16", f"the published {VGG16.file_name}")
        network.load_trunk(state)
        return _LpipsTerm(network.to(device))
    if spec == "efficientnet-lite2":
        packaged = find_packaged(spec)
        assert packaged.path is not None
        return FeatureTerm(spec, load_efficientnet_lite(spec, read_weights(packaged.path, spec), device))
    made, _, _ = make_from_file(spec, what="feature network", option="--perceptual", error=ConfigError, missing=ConfigNotFoundError)
    if not callable(getattr(made, "features", None)):
        raise ConfigError(f"--perceptual {spec} made a {type(made).__name__}, which has no method features(images)")
    if isinstance(made, nn.Module):
        made.to(device).eval().requires_grad_(False)
    return FeatureTerm(spec, made)


class _LpipsTerm:
    """LPIPS of pictures of at least 32 px; smaller ones are enlarged, for the trunk pools them away."""

    def __init__(self, network: LPIPS) -> None:
        self.network = network

    def __call__(self, decoded: Tensor, target: Tensor) -> Tensor:
        if (side := decoded.shape[-1]) < LPIPS_SMALLEST_SIDE:
            scale = -(-LPIPS_SMALLEST_SIDE // side)
            decoded, target = (F.interpolate(pictures, scale_factor=scale, mode="bilinear") for pictures in (decoded, target))
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
