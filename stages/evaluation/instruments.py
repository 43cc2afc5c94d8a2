"""The networks that measure an evaluation, opened together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...models.lpips import Trunk
from .features import FeatureNetwork, OtherFeatures
from .inception import Inception
from .networks import Lpips
from .weights import FoundWeights


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """The networks that measure."""

    inception: Inception | None
    lpips: Mapping[str, Lpips]
    """By name of their metric."""
    other: OtherFeatures | None = None
    """The network of `--features`."""

    def feature_networks(self) -> dict[str, FeatureNetwork]:
        """What measures features, by name."""
        return {network.name: network for network in (self.inception, self.other) if network is not None}


def open_instruments(weights: Mapping[str, FoundWeights], other: OtherFeatures | None, device: torch.device) -> Instruments:
    """The networks of these weights, by metric as in `find_metric_weights`; those without a file are left out.

    Raises:
        ConfigError: a file cannot be read, or holds another network's weights.
    """
    # VGG takes a gigabyte while its published file is read, more than all the rest: so it comes first.
    trunks: dict[str, Trunk] = {"lpips_vgg": "vgg", "lpips_alex": "alex"}
    lpips = {name: Lpips(trunk, path, device) for name, trunk in trunks.items() if (path := weights[name].path)}
    return Instruments(inception=Inception(path, device) if (path := weights["rfid"].path) else None, lpips=lpips, other=other)
