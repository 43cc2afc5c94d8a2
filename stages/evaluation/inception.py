"""The Inception network of 2015 that rFID, KID and the inception score are defined by, as torch-fidelity ported it.

Shapes: B batch, S image side in pixels. Images are uint8 (B,3,S,S) RGB.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .networks import full_float32, images_at_once, read_weights, require_weights

FEATURES = 2048
CLASSES = 1008
_LARGEST_PX = 149  # the side of its largest activations
_LAST_LAYER = ("fc.weight", "fc.bias")


class Inception:
    """uint8 (B,3,S,S) -> features (B,2048) float32, and from those the logits of the inception score."""

    name = "inception"

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load the weights at `path`; a file without the last layer gives features alone.

        Raises:
            ConfigError: the file cannot be read or holds another network's weights.
        """
        state = read_weights(path, "Inception")
        expected = empty_inception().state_dict()
        self.has_logits = any(name in state for name in _LAST_LAYER)
        needed = expected if self.has_logits else {name: tensor for name, tensor in expected.items() if name not in _LAST_LAYER}
        require_weights(state, needed, f"{path} does not fit torch-fidelity's Inception network", "weights-inception-2015-12-05-6726825d.pth")
        network = empty_inception(device="cpu")
        nn.Module.load_state_dict(network, dict(state), strict=False)  # `require_weights` has seen that all are there
        self.device = device
        self.network: nn.Module = network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (B,3,S,S) -> pooled features (B,2048) float32."""
        parts = images.split(images_at_once(self.device, _LARGEST_PX))
        with full_float32(self.device):
            return torch.cat([self.network(part)[0] for part in parts])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Pooled features (B,2048) -> logits without bias (B,1008), torch-fidelity's choice for the inception score."""
        return features @ self.network.fc.weight.T  # type: ignore[union-attr, operator]


def empty_inception(device: str = "meta") -> nn.Module:
    """The network without weights: `state_dict()` has their names and shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # here, for it takes seconds

    class Empty(FeatureExtractorInceptionV3):
        """The network before any weights: its constructor reads a file of them, here an empty one, and loads them."""

        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Load nothing."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device(device):
        return Empty("inception-v3-compat", [str(FEATURES)], nothing)
