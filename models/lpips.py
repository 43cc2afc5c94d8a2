"""LPIPS version 0.1 (Zhang et al. 2018): the distance of two pictures in the layers of a trained trunk, weighed by what people said.

The trunk's weights are the user's (`revq weights`), the weights of the layers come with torchmetrics. Differentiable, so that it can be
minimised as well as measured.

Shapes: B batch, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Trunk = Literal["alex", "vgg"]
TRUNKS: dict[Trunk, tuple[str, tuple[int, ...]]] = {"alex": ("alexnet", (1, 4, 7, 9, 11)), "vgg": ("vgg16", (3, 8, 15, 22, 29))}
"""By name: torchvision's network, and the layers of its `features` whose outputs are compared."""
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class LPIPS(nn.Module):
    """Distances (B,) of images (B,3,S,S) in [-1,1]; frozen, in evaluation mode. S is at least 32."""

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Trunk) -> None:
        """Make the network; the weights of its layers are loaded, those of the trunk are random until `load_trunk`."""
        super().__init__()
        from torchvision import models  # here, for it takes seconds, and many evaluations have no trunk

        name, self.taken = TRUNKS[trunk]
        self.features: nn.Sequential = getattr(models, name)(weights=None).features[: self.taken[-1] + 1]
        heads = torch.load(_published_heads(trunk), map_location="cpu", weights_only=True)
        self.heads = nn.ParameterList([heads[f"lin{i}.model.1.weight"].flatten() for i in range(len(self.taken))])
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def trunk_state(self) -> dict[str, Tensor]:
        """The trunk's tensors, under torchvision's names."""
        return {f"features.{name}": tensor for name, tensor in self.features.state_dict().items()}

    def load_trunk(self, state: Mapping[str, Tensor]) -> None:
        """Take the trunk's weights, under torchvision's names; the classifier's are passed over."""
        own = self.trunk_state()
        self.features.load_state_dict({name.removeprefix("features."): state[name] for name in own})

    def layers(self, images: Tensor) -> list[Tensor]:
        """Outputs (B,C,H,W) of the layers for images in [-1,1], each of length 1 along its channels."""
        values, found = (images - self.mean) / self.std, []
        for number, layer in enumerate(self.features):
            values = layer(values)
            if number in self.taken:
                found.append(values / torch.sqrt(1e-8 + values.square().sum(1, keepdim=True)))
        return found

    def distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The distance (B,) of what `layers` gave for either."""
        each = [((a - b).square() * head.view(-1, 1, 1)).sum(1).mean((1, 2)) for head, a, b in zip(self.heads, ours, theirs, strict=True)]
        return torch.stack(each).sum(0)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """Distance (B,) of images (B,3,S,S) in [-1,1] from the reference."""
        return self.distance(self.layers(images), self.layers(reference))


def _published_heads(trunk: Trunk) -> Path:
    """The file of the layers' weights inside torchmetrics, which is not imported: that takes seconds."""
    torchmetrics = find_spec("torchmetrics")
    assert torchmetrics is not None
    assert torchmetrics.origin is not None
    return Path(torchmetrics.origin).parent / "functional" / "image" / "lpips_models" / f"{trunk}.pth"
