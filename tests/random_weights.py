"""Networks of the metrics in their published file formats, with random weights: what the tests use in place of downloads."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchvision

from revq.stages.evaluation.inception import empty_inception
from revq.stages.evaluation.weights import ALEXNET, VGG16


def he_normal(network: torch.nn.Module) -> None:
    """Convolutions that keep the size of what passes through them: the default initialisation shrinks every distance to 1e-15."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data.normal_(0, math.sqrt(2 / module.weight[0].numel()), generator=generator)


def save_random_inception(path: Path) -> Path:
    """torch-fidelity's weight format around a He-normal network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = empty_inception(device="cpu")
    he_normal(network)
    torch.save(network.state_dict(), path)
    return path


def save_random_alexnet(torch_home: Path) -> Path:
    """torchvision's weight format, where torch.hub looks for it."""
    path = torch_home / "hub" / "checkpoints" / ALEXNET.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), path)
    return path


def save_random_vgg16(torch_home: Path) -> Path:
    """As above. The half gigabyte of the classifier, which LPIPS does not use, is one zero seen many times."""
    path = torch_home / "hub" / "checkpoints" / VGG16.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    he_normal(features)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    for layer, (rows, columns) in {"0": (4096, 25088), "3": (4096, 4096), "6": (1000, 4096)}.items():
        state[f"classifier.{layer}.weight"] = torch.zeros(1).expand(rows, columns)
        state[f"classifier.{layer}.bias"] = torch.zeros(1).expand(rows)
    torch.save(state, path)
    return path
