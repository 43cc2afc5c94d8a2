"""The trained networks behind rFID, the inception score and LPIPS: loading them, running them in full float32, and keeping the originals' features.

Shapes: B batch, S image side in pixels. Images are uint8 (B,3,S,S) RGB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from ...errors import ConfigError, one_line
from ...files import write_bytes
from ...models.weight_keys import compare_weights

FEATURES = 2048
CLASSES = 1008
_LPIPS_AT_ONCE = 16  # VGG's first features of 64 images of 256 px would be gigabytes
_CPU_PIXELS_AT_ONCE = 8 * 128 * 128
_INCEPTION_PX = 149  # the side of its largest activations


def images_at_once(device: torch.device, side_px: int) -> int:
    """How many pictures of that side go through a network together: on a GPU all that there are, on a CPU 8 of 128 px.

    There more at once are no faster (they leave the caches), and their activations fill gigabytes: 64 channels of float32 at full size are 256 bytes
    a pixel, in several copies.
    """
    return max(1, _CPU_PIXELS_AT_ONCE // side_px**2) if device.type == "cpu" else 1 << 20


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Convolutions in full float32: cuDNN takes TF32 by default, so that the same pictures would score differently on another device."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def precision_flags() -> dict[str, Any]:
    """The switches of torch that change the last digits, as `full_float32` finds them."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": "switched off while measuring",
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


class Inception:
    """torch-fidelity's Inception: uint8 (B,3,S,S) -> features (B,2048) float32, and from those the logits of the inception score."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load the weights at `path`.

        Raises:
            ConfigError: the file cannot be read or holds another network's weights.
        """
        state = _read_weights(path, "Inception")
        with torch.device("meta"):
            expected = _EmptyInception("inception-v3-compat", [str(FEATURES)], str(path)).state_dict()
        _require(state, expected, f"{path} does not fit torch-fidelity's Inception network", "weights-inception-2015-12-05-6726825d.pth")
        network = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], str(path))
        self.device = device
        self.network: nn.Module = network.to(device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (B,3,S,S) -> pooled features (B,2048) float32."""
        parts = images.split(images_at_once(self.device, _INCEPTION_PX))
        with full_float32(self.device):
            return torch.cat([self.network(part)[0] for part in parts])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Pooled features (B,2048) -> logits without bias (B,1008), torch-fidelity's choice for the inception score."""
        return features @ self.network.fc.weight.T  # type: ignore[union-attr, operator]


class Lpips:
    """LPIPS version 0.1 over a trained trunk, by torchmetrics' network; the reference's features are computed once for all rows."""

    def __init__(self, trunk: Literal["alex", "vgg"], path: Path, device: torch.device) -> None:
        """Load the trunk "alex" or "vgg".

        Args:
            path: the trunk's weights in the torch hub cache, from where torchvision reads them.

        Raises:
            ConfigError: the file cannot be read or holds another network's weights.
        """
        title, name = {"alex": ("AlexNet", "alexnet"), "vgg": ("VGG16", "vgg16")}[trunk]
        state = _read_weights(path, title)
        with torch.device("meta"):
            expected = getattr(torchvision.models, name)(weights=None).state_dict()
        _require(state, expected, f"{path} does not fit torchvision's {title}", f"the published {path.name}")
        network: Any = LearnedPerceptualImagePatchSimilarity(net_type=trunk).net
        self.device = device
        self.network = network.to(device)

    @torch.no_grad()
    def distances(self, rows: Sequence[Tensor], reference: Tensor) -> list[Tensor]:
        """Each row's distance (B,) from the reference; images uint8 (B,3,S,S)."""
        at_once = min(_LPIPS_AT_ONCE, images_at_once(self.device, reference.shape[-1]))
        found = [self._distances([row[i : i + at_once] for row in rows], reference[i : i + at_once]) for i in range(0, len(reference), at_once)]
        return [torch.cat(pieces) for pieces in zip(*found, strict=True)]

    def _distances(self, rows: Sequence[Tensor], reference: Tensor) -> list[Tensor]:
        with full_float32(self.device):
            theirs = self._trunk(reference)
            return [self._distance(self._trunk(row), theirs) for row in rows]

    def _trunk(self, images: Tensor) -> list[Tensor]:
        """Features of every layer, each of length 1 along its channels."""
        features = self.network.net(self.network.scaling_layer(images.float() / 127.5 - 1))
        return [layer / torch.sqrt(1e-8 + layer.square().sum(1, keepdim=True)) for layer in features]

    def _distance(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        layers = zip(self.network.lins, ours, theirs, strict=True)
        return torch.stack([weigh((a - b).square()).mean((1, 2, 3)) for weigh, a, b in layers]).sum(0)


class FeatureCache:
    """Inception features of original crops on disk, by the fingerprint of the crops themselves: they can be missing, but never wrong.

    A file holds one batch, so another batch size finds nothing. Where the folder cannot be written, nothing is kept.
    """

    def __init__(self, folder: Path, weights_sha256: str) -> None:
        self.folder = folder
        self.weights_sha256 = weights_sha256
        self.reused = 0
        self.writable = True

    def features(self, inception: Inception, images: Tensor, digests: Sequence[bytes]) -> Tensor:
        """Features (B,2048) of `images`, whose SHA-256 are `digests`: from disk, or computed and kept."""
        network = f"{self.weights_sha256} {inception.device.type} torch {torch.__version__}"
        key = hashlib.sha256(network.encode() + b"".join(digests)).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            found = load_file(path)["features"]
            self.reused += len(found)
            return found.to(inception.device)
        except Exception:  # not there, or cut off by a full disk: both mean that it is computed
            features = inception.features(images)
        if self.writable:
            try:
                write_bytes(path, save({"features": features.cpu()}))
            except Exception:  # a cache that cannot be written is no reason to stop
                self.writable = False
        return features


def cache_folder(given: str | None) -> Path | None:
    """Where the originals' features are kept: `given`, else the user's cache folder; None where `given` is "off"."""
    if given == "off":
        return None
    if given is not None:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "revq" / "inception-features"


class _EmptyInception(FeatureExtractorInceptionV3):
    """The network before any weights: its constructor loads them."""

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        """Load nothing."""


def _read_weights(path: Path, title: str) -> Mapping[str, Tensor]:
    """The tensors of `path`, read without unpickling anything else, before a library unpickles it without that restriction."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on bytes of another kind torch's reader raises whatever it stumbles over, KeyError and IndexError too
        raise ConfigError(f"the {title} weights in {path} cannot be read ({one_line(error)}); delete the file, so that it is fetched anew") from error
    if not (isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())):
        raise ConfigError(f"{path} holds no {title} weights but a {type(state).__name__}; give the published checkpoint")
    return state


def _require(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], fault: str, published: str) -> None:
    if faults := compare_weights(expected, state):
        raise ConfigError(f"{fault} ({faults}); it must be {published}")
