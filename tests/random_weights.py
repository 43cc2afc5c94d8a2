"""Networks of the metrics in their published file formats, with random weights: what the tests use in place of downloads."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchvision
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from revq.stages.weights import ALEXNET


class UntrainedInception(FeatureExtractorInceptionV3):
    """torch-fidelity's network before any weights: its constructor loads them, so loading does nothing here."""

    def load_state_dict(self, *_: object, **__: object) -> None:  # type: ignore[override]
        return None


def save_random_inception(path: Path) -> Path:
    """torch-fidelity's weight format around a He-normal network: the default initialisation shrinks every distance to 1e-15."""
    torch.save({}, path)
    network = UntrainedInception("inception-v3-compat", ["2048"], str(path))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)
    torch.save(network.state_dict(), path)
    return path


def save_random_alexnet(torch_home: Path) -> Path:
    """torchvision's weight format, where torch.hub looks for it."""
    path = torch_home / "hub" / "checkpoints" / ALEXNET.file_name
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path
