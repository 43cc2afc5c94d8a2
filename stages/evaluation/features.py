"""Networks whose features tell two sets of pictures apart: the Inception network of rFID, and any other that is named beside it.

Shapes: B batch, S image side in pixels, F features, L classes. Images are uint8 (B,3,S,S) RGB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...errors import ConfigError, ConfigNotFoundError, one_line
from ...files import local_path, sha256_json, write_bytes
from ...models.efficientnet_lite import load_efficientnet_lite
from ...models.plugin import make_from_file
from .inception import Inception
from .networks import full_float32, images_at_once, read_weights
from .weights import find_packaged

EFFICIENTNET = "efficientnet-lite0"
_PROBE_PX = 64


class FeatureNetwork(Protocol):
    """What measures features; `Inception` is one."""

    name: str
    device: torch.device
    has_logits: bool

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B,3,S,S) -> (B,F)."""

    def logits(self, features: Tensor) -> Tensor:
        """(B,F) -> (B,L); only where `has_logits`."""


class OtherFeatures:
    """A network that a user named, with its answers checked. Its metrics are fd_NAME, kid_NAME and, with logits, agreement_NAME."""

    def __init__(self, spec: str, device: torch.device) -> None:
        """Load `efficientnet-lite0`, or what `FILE.py:FACTORY` makes: `features(images)` and, optional, `logits(features)`.

        Raises:
            ConfigError: no such file, a factory that fails, or features that are not finite numbers (B,F).
        """
        self.spec, self.device = spec, device
        if spec == EFFICIENTNET:
            found = find_packaged(spec)
            assert found.path is not None
            self.network: Any = load_efficientnet_lite(spec, read_weights(found.path, spec), device)
            self.name, self.sha256 = "efficientnet_lite0", str(found.sha256)
            self._side_px = self.network.side_px
        else:
            self.network, self.sha256 = make_feature_network(spec, "--features", device)
            self.name, self._side_px = type(self.network).__name__.lower(), 299
            if self.name == Inception.name:
                raise ConfigError(
                    f"--features {spec} made a {type(self.network).__name__}, which is rFID's own network by name; name its class otherwise"
                )
        self.weights_known = spec == EFFICIENTNET
        """Whether `sha256` tells its weights too: those of a user's file may come from anywhere."""
        self.has_logits = callable(getattr(self.network, "logits", None))
        probe = (
            torch.arange(3 * _PROBE_PX**2, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(1, 3, _PROBE_PX, _PROBE_PX).repeat(2, 1, 1, 1)
        )
        features = self._answer("features", probe.to(device), 2, None)
        self.size = features.shape[1]
        self.classes = self.logits(features).shape[1] if self.has_logits else None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """uint8 (B,3,S,S) -> float32 (B,F).

        Raises:
            ConfigError: the network fails, or answers with something else.
        """
        parts = images.split(images_at_once(self.device, self._side_px))
        return torch.cat([self._answer("features", part, len(part), self.size) for part in parts])

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """(B,F) -> float32 (B,L). Raises as `features`."""
        return self._answer("logits", features, len(features), None)

    def _answer(self, method: str, given: Tensor, count: int, size: int | None) -> Tensor:
        try:
            with full_float32(self.device):
                answer = getattr(self.network, method)(given)
        except Exception as error:  # the user's code
            raise ConfigError(f"--features {self.spec}: {method} failed with {type(error).__name__}: {one_line(error)}") from error
        shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != count or (size or answer.shape[1]) != answer.shape[1]:
            wanted = f"({count},{size or 'F'})" if method == "features" else f"({count},L)"
            raise ConfigError(f"--features {self.spec}: {method} must give a tensor {wanted} for a batch of {count}, and gave {shape}")
        if not bool(answer.isfinite().all()):
            raise ConfigError(f"--features {self.spec}: {method} gave values that are not finite")
        return answer.float()


def make_feature_network(spec: str, option: str, device: torch.device) -> tuple[Any, str]:
    """What `FILE.py:FACTORY` makes, frozen on `device` where it is a module, and the SHA-256 of file and factory; `option` took it, for messages.

    Raises:
        ConfigError: no such file, a factory that fails, or an object without features(images).
    """
    network, _, digest = make_from_file(spec, what="feature network", option=option, error=ConfigError, missing=ConfigNotFoundError)
    if not callable(getattr(network, "features", None)):
        raise ConfigError(f"{option} {spec} made a {type(network).__name__}, which has no method features(images)")
    if isinstance(network, nn.Module):
        network.to(device).eval().requires_grad_(False)
    return network, sha256_json([digest, spec.rpartition(":")[2]])


class FeatureCache:
    """Features of original crops on disk, by the fingerprint of the crops themselves: they can be missing, but never wrong.

    A file holds one batch, so another batch size finds nothing. Where the folder cannot be written, nothing is kept.
    """

    def __init__(self, folder: Path, weights_sha256: str) -> None:
        self.folder = folder
        self.weights_sha256 = weights_sha256
        self.reused = 0
        self.writable = True

    def features(self, network: FeatureNetwork, images: Tensor, digests: Sequence[bytes]) -> Tensor:
        """Features (B,F) of `images`, whose SHA-256 are `digests`: from disk, or computed and kept."""
        measured = f"{self.weights_sha256} {network.device.type} torch {torch.__version__}"
        key = hashlib.sha256(measured.encode() + b"".join(digests)).hexdigest()
        path = self.folder / key[:2] / f"{key}.safetensors"
        try:
            found = load_file(path)["features"]
            self.reused += len(found)
            return found.to(network.device)
        except Exception:  # not there, or cut off by a full disk: both mean that it is computed
            features = network.features(images)
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
        return local_path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "revq" / "inception-features"
