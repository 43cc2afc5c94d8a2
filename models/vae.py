"""The frozen VAE: loading it from anywhere, naming it beyond doubt, and one encode/decode for every class of autoencoder.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side in pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError, VAEError, VAENotFoundError, one_line
from ..files import local_path, sha256_file, sha256_json
from .frozen import FrozenModule
from .vae_files import EMBEDDED_VAE, VAEFiles, load_network, open_folder, open_repository
from .vae_probe import read_latents, read_pictures, round_trip_shape

_WITHOUT_GRADIENTS = "without them there is --transform pca or standardize, and neither --decoder-steps nor --refine"


class FrozenVAE(FrozenModule):
    """A pre-trained image autoencoder in evaluation mode whose weights never change.

    Made by `FrozenVAE.load`. Images are (B,3,S,S) float32 in [-1,1]; latents are (B,C,H,W) float32, raw: not scaled, not normalised.
    `to(device)` moves it; another dtype is refused with a VAEError.
    """

    error = VAEError

    def __init__(self, network: nn.Module, *, vae_id: str, revision: str | None, config_sha256: str) -> None:
        """Wrap a loaded `network` that has `encode` and `decode`, diffusers' or a plug-in's.

        Args:
            vae_id: hub id, or where it lies on this machine as an absolute path (a folder, FILE.py:FACTORY).
            revision: commit of the hub repository; None where it did not come from the hub.
            config_sha256: hash of its configuration, or of the plug-in's source file.
        """
        super().__init__()
        self.network = network.float().eval().requires_grad_(False)
        self.id = vae_id
        self.revision = revision
        self.class_name = type(network).__name__
        self.config_sha256 = config_sha256
        self.weights_sha256 = _weights_sha256(self.network)
        self.settle()

    @classmethod
    def load(cls, spec: str, *, device: str | torch.device = "cpu", revision: str | None = None) -> FrozenVAE:
        """Load a VAE by hub id, local folder in diffusers' format, `FILE.py:FACTORY`, or the name of the embedded one.

        Args:
            spec: for example "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers", "/models/my-vae", "my_vae.py:load", "revq-tiny-f8c8".
            device: where its weights go.
            revision: branch, tag or commit on the hub; None means the default branch.

        Raises:
            VAEError: it cannot be found (offline, say) or read, its weights are not all there, or it does not encode and decode.
        """
        if ".py:" not in spec:
            return _load_files(spec, revision).to(device)
        vae = _load_plugin(spec)
        if _load_plugin(spec).weights_sha256 != vae.weights_sha256:
            raise VAEError(f"VAE plug-in {spec} gives other weights at each call: it makes some up, where it should load them all")
        return vae.to(device)

    @classmethod
    def load_recorded(cls, identity: Mapping[str, Any], *, spec: str | None = None, device: str | torch.device = "cpu") -> FrozenVAE:
        """Load the very VAE that `identity` names.

        Args:
            identity: what `identity()` gave when a store or tokenizer was made.
            spec: where to find it; None means under the id and revision recorded.
            device: where its weights go.

        Raises:
            VAEError: it cannot be loaded.
            MismatchError: it is another VAE.
        """
        where = spec or identity["id"]
        vae = _load_plugin(where) if ".py:" in where else _load_files(where, None if spec else identity["revision"])
        vae.require(identity)
        return vae.to(device)

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raise MismatchError, naming both fingerprints, unless this is the VAE that `identity` names."""
        if self.fingerprint == identity["fingerprint"]:
            return
        mine = self.identity()
        differing = [name for name in ("class_name", "config_sha256", "weights_sha256") if mine[name] != identity.get(name)]
        why = ""
        if differing == ["weights_sha256"]:
            why = "; class and configuration are the same, the weights alone are others"
            why += " (does the plug-in load them all?)" if ".py:" in self.id else ""
        raise MismatchError(
            f"expected the VAE {identity['id']} with fingerprint {identity['fingerprint']}, but {self.id} has fingerprint {self.fingerprint}{why}; "
            "pass the VAE that the latents were made with"
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over class, configuration and weights; the same wherever the files lie."""
        return sha256_json([self.class_name, self.config_sha256, self.weights_sha256])[:16]

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without weights."""
        return next((tensor.device for tensor in chain(self.network.parameters(), self.network.buffers())), torch.device("cpu"))

    def identity(self) -> dict[str, Any]:
        """JSON values that name this VAE: id, class_name, revision, config_sha256, weights_sha256, fingerprint."""
        return {
            "id": self.id,
            "class_name": self.class_name,
            "revision": self.revision,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
            "fingerprint": self.fingerprint,
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) of any float type in [-1,1] -> latents (B,C,H,W) float32; a posterior gives its mode, so an image has one latent.

        Raises:
            VAEError: the images are of an integer type, whose range is another one.
        """
        if not images.is_floating_point():
            raise VAEError(f"expected float images in [-1,1], found {images.dtype}; images.float() / 127.5 - 1 makes them of 0 to 255")
        return read_latents(self.network.encode(images.float())).float()  # type: ignore[operator]

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,H,W) -> images (B,3,S,S) float32 clamped to [-1,1]; differentiable in the latents where gradients are on.

        Raises:
            VAEError: gradients are on, and the network gives none.
        """
        images = read_pictures(self.network.decode(latents.float())).float().clamp(-1, 1)  # type: ignore[operator]
        if latents.requires_grad and torch.is_grad_enabled() and not images.requires_grad:
            raise VAEError(f"the decoder of VAE {self.id} gives no gradients (is it under torch.no_grad or inference_mode?); {_WITHOUT_GRADIENTS}")
        return images

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C,H,W) of the latent of one image of that side, found by encoding a grey one and decoding it again.

        Raises:
            VAEError: the VAE does not take images of this side, or does not give pictures of it back; the message says why, and what would do.
        """
        return round_trip_shape(self, image_size)


def _weights_sha256(network: nn.Module) -> str:
    """Hash over names, shapes and float32 values, so that a copy in another file format is the same VAE."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _load_plugin(spec: str) -> FrozenVAE:
    """`FILE.py:FACTORY`: run the file, call the factory."""
    file_name, _, factory_name = spec.rpartition(":")
    path = local_path(file_name)
    if not os.path.isfile(path):  # Path.is_file raises OSError where the name is too long
        raise VAENotFoundError(f"VAE plug-in {path} does not exist; --vae takes FILE.py:FACTORY")
    digest = sha256_file(path)
    try:
        network = getattr(_plugin_module(path, digest), factory_name)()
    except (Exception, SystemExit) as error:  # the plug-in is the user's code: whatever it raises is told, not shown as ours
        raise VAEError(f"VAE plug-in {spec} failed with {type(error).__name__}: {one_line(error)}") from error
    if not (isinstance(network, nn.Module) and callable(getattr(network, "encode", None)) and callable(getattr(network, "decode", None))):
        raise VAEError(f"VAE plug-in {spec} must return a torch.nn.Module with encode and decode, not {type(network).__name__}")
    return FrozenVAE(network, vae_id=f"{path.resolve()}:{factory_name}", revision=None, config_sha256=digest)


def _plugin_module(path: Path, digest: str) -> ModuleType:
    """The plug-in's file as a module, run once for each content: two loads give instances of one class, which can be pickled."""
    name = f"revq_vae_plugin_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_files(spec: str, revision: str | None) -> FrozenVAE:
    """The embedded VAE, a local folder or a hub repository."""
    folder = local_path(spec)
    if spec == EMBEDDED_VAE:
        return _make(open_folder(Path(__file__).parent / EMBEDDED_VAE), spec)
    if os.path.isdir(folder):  # Path.is_dir raises OSError where the name is too long
        return _make(open_folder(folder), str(folder.resolve()))
    return _make(open_repository(spec, revision), spec)


def _make(files: VAEFiles, vae_id: str) -> FrozenVAE:
    network, config = load_network(files)
    settings = {name: value for name, value in config.items() if name not in {"_diffusers_version", "_name_or_path"}}
    return FrozenVAE(network, vae_id=vae_id, revision=files.revision, config_sha256=sha256_json(settings))
