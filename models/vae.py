"""The frozen VAE: loading it from anywhere, naming it beyond doubt, and one encode/decode for every class of autoencoder.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side in pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MismatchError, VAEError
from ..files import sha256_file, sha256_json
from .frozen import FrozenModule

EMBEDDED_VAE = "revq-tiny-f8c8"
_OFFLINE_HINT = "pass --vae a local folder in diffusers' format, FILE.py:FACTORY, or the embedded " + EMBEDDED_VAE


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
            VAEError: it cannot be found (offline, say), read, or does not encode and decode.
        """
        if ".py:" in spec:
            vae = _load_plugin(spec)
        elif spec == EMBEDDED_VAE:
            vae = _load_folder(Path(__file__).parent / EMBEDDED_VAE, spec)
        elif Path(spec).expanduser().is_dir():
            vae = _load_folder(Path(spec).expanduser(), str(Path(spec).expanduser().resolve()))
        else:
            vae = _load_hub(spec, revision)
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
        vae = cls.load(spec or identity["id"], device=device, revision=None if spec else identity["revision"])
        vae.require(identity)
        return vae

    def require(self, identity: Mapping[str, Any]) -> None:
        """Raise MismatchError, naming both fingerprints, unless this is the VAE that `identity` names."""
        if self.fingerprint != identity["fingerprint"]:
            raise MismatchError(
                f"expected the VAE {identity['id']} with fingerprint {identity['fingerprint']}, but {self.id} has fingerprint {self.fingerprint}; "
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
        output: Any = self.network.encode(images.float())  # type: ignore[operator]
        if hasattr(output, "latent_dist"):
            output = output.latent_dist.mode()
        elif not isinstance(output, Tensor):
            output = output.latent if hasattr(output, "latent") else output.latents
        return output.float()

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B,C,H,W) -> images (B,3,S,S) float32 clamped to [-1,1]; differentiable in the latents where gradients are on."""
        output: Any = self.network.decode(latents.float())  # type: ignore[operator]
        return (output if isinstance(output, Tensor) else output.sample).float().clamp(-1, 1)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C,H,W) of the latent of one image of that side, found by encoding a grey one.

        Raises:
            VAEError: the VAE does not take images of this side.
        """
        grey = torch.zeros(1, 3, image_size, image_size, device=self.device)
        try:
            latent = self.encode(grey)
        except (RuntimeError, ValueError) as error:
            raise VAEError(
                f"VAE {self.id} cannot encode {image_size} px images ({_one_line(error)}); choose an --image-size it was made for"
            ) from error
        if latent.ndim != 4:
            raise VAEError(f"VAE {self.id} gives latents of shape {tuple(latent.shape)}; revq needs (B,C,H,W)")
        channels, height, width = latent.shape[1:]
        return channels, height, width


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
    path = Path(file_name).expanduser()
    if not path.is_file():
        raise VAEError(f"VAE plug-in {path} does not exist; --vae takes FILE.py:FACTORY")
    module_spec = importlib.util.spec_from_file_location(f"revq_vae_plugin_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
        network = getattr(module, factory_name)()
    except Exception as error:  # the plug-in is the user's code: whatever it raises is told, not shown as ours
        raise VAEError(f"VAE plug-in {spec} failed with {type(error).__name__}: {_one_line(error)}") from error
    if not (isinstance(network, nn.Module) and callable(getattr(network, "encode", None)) and callable(getattr(network, "decode", None))):
        raise VAEError(f"VAE plug-in {spec} must return a torch.nn.Module with encode and decode, not {type(network).__name__}")
    return FrozenVAE(network, vae_id=f"{path.resolve()}:{factory_name}", revision=None, config_sha256=sha256_file(path))


def _load_folder(folder: Path, vae_id: str, revision: str | None = None) -> FrozenVAE:
    """A folder in diffusers' format: config.json and weights, or a pipeline with a `vae` sub-folder."""
    import diffusers

    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise VAEError(f"{folder} is no VAE in diffusers' format: its config.json cannot be read ({_one_line(error)})") from error
    class_name = config.get("_class_name", "")
    network_class = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if network_class is None or not hasattr(network_class, "from_pretrained"):
        raise VAEError(
            f"{folder}/config.json names the class {class_name!r}, which diffusers {diffusers.__version__} does not have; upgrade diffusers"
        )
    try:
        network = network_class.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers raises OSError, ValueError, RuntimeError and safetensors' own for a damaged folder
        raise VAEError(f"the VAE in {folder} cannot be loaded: {_one_line(error)}") from error
    settings = {name: value for name, value in config.items() if name not in {"_diffusers_version", "_name_or_path"}}
    return FrozenVAE(network, vae_id=vae_id, revision=revision, config_sha256=sha256_json(settings))


def _load_hub(repo_id: str, revision: str | None) -> FrozenVAE:
    """A model hub repository, from the local cache or a download."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "*.safetensors", "vae/*.json", "vae/*.safetensors"]
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, httpx's, requests' and the system's errors
        raise VAEError(f"VAE {repo_id!r} is no local folder and cannot be had from the model hub ({_one_line(error)}); {_OFFLINE_HINT}") from error
    return _load_folder(folder, repo_id, revision=folder.name)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
