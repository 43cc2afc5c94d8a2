"""EfficientNet-Lite, an ImageNet classifier small enough to judge by on a CPU (Tan & Le 2019, without squeeze-and-excitation, ReLU6 throughout).

It is a judge of another kind than the Inception network of rFID: trained otherwise, and on the one question whether the class of a picture is
still seen. Weights: `revq weights efficientnet-lite0`.

Shapes: B batch, H,W image sides in pixels, F = 1280 features, L = 1000 classes of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
"""(blocks, kernel, stride, expansion, channels) of each stage at width and depth 1."""
_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class EfficientNetLite(nn.Module):
    """uint8 (B,3,H,W) -> features (B,1280) -> logits (B,1000). Frozen, in evaluation mode."""

    SCALES: ClassVar[Mapping[str, tuple[float, float, int]]] = {"efficientnet-lite0": (1.0, 1.0, 224), "efficientnet-lite2": (1.1, 1.2, 260)}
    """By name: width, depth, and the side in pixels that a picture is resized to."""

    def __init__(self, name: str) -> None:
        """Make the network of that name, one of `SCALES`, with random weights."""
        super().__init__()
        width, depth, self.side_px = self.SCALES[name]
        self.conv_stem, self.bn0 = _SameConv(3, _STEM, 3, stride=2), _norm(_STEM)
        blocks, channels = [], _STEM
        for number, (repeats, kernel, stride, expansion, out) in enumerate(_STAGES):
            out = _rounded(out * width)
            ends = number in {0, len(_STAGES) - 1}  # the first and the last stage stay as they are in every depth
            for repeat in range(repeats if ends else -int(-repeats * depth // 1)):
                blocks.append(_Block(channels, out, kernel, stride if repeat == 0 else 1, expansion))
                channels = out
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _SameConv(channels, _HEAD, 1), _norm(_HEAD)
        self.fc = nn.Linear(_HEAD, _CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 or float images (B,3,H,W) in [0,255] -> pooled features (B,1280); differentiable in float images."""
        side = (self.side_px, self.side_px)
        values = (F.interpolate(images.float(), side, mode="bilinear", antialias=True) - 127) / 128  # as TensorFlow's own preprocessing
        values = F.relu6(self.bn0(self.conv_stem(values)))
        for block in self.blocks:
            values = block(values)
        return F.relu6(self.bn1(self.conv_head(values))).mean((2, 3))

    def features(self, images: Tensor) -> Tensor:
        """As `forward`."""
        return self(images)

    def logits(self, features: Tensor) -> Tensor:
        """Features (B,1280) -> logits (B,1000)."""
        return self.fc(features)


class _Block(nn.Module):
    """Expand, convolve each channel by itself, project; the input is added where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands, self.adds = expansion != 1, stride == 1 and channels == out
        if self.expands:
            self.expand_conv, self.bn0 = _SameConv(channels, wide, 1), _norm(wide)
        self.depthwise_conv, self.bn1 = _SameConv(wide, wide, kernel, stride=stride, groups=wide), _norm(wide)
        self.project_conv, self.bn2 = _SameConv(wide, out, 1), _norm(out)

    def forward(self, values: Tensor) -> Tensor:
        wide = F.relu6(self.bn0(self.expand_conv(values))) if self.expands else values
        wide = F.relu6(self.bn1(self.depthwise_conv(wide)))
        done = self.bn2(self.project_conv(wide))
        return done + values if self.adds else done


class _SameConv(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow's SAME does: where the sum is odd, one more at the right and at the bottom."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        before_after: list[int] = []
        for side in (values.shape[-1], values.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            before_after += [total // 2, total - total // 2]
        return super().forward(F.pad(values, before_after) if any(before_after) else values)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _rounded(channels: float) -> int:
    """To a multiple of 8, never more than a tenth down."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def load_efficientnet_lite(name: str, state: Mapping[str, Tensor], device: torch.device) -> EfficientNetLite:
    """The network `name` with these weights, which must be its own (`models.weight_keys.compare_weights` tells)."""
    network = EfficientNetLite(name)
    network.load_state_dict(dict(state))
    return network.to(device)
