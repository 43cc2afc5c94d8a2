"""The discrete image tokenizer: transform, codebooks and rectifier around a frozen VAE that it names but does not hold.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side, T tokens per image, D dims per token, K codes per codebook.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import TokenizerError, TokenizerNotFoundError, one_line
from ..files import local_path, write_bytes, write_json
from ..lock import naming_writer, writer_of
from .frozen import FrozenModule
from .inputs import checked_images, checked_indices, checked_latents
from .quantizer import MultiGroupQuantizer
from .rectifier import Rectifier
from .refine import refine_tokens
from .transform import blank_transform
from .vae import FrozenVAE
from .weight_keys import compare_weights

TOKENIZER_KIND = "revq-tokenizer"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.safetensors"


class ReVQTokenizer(FrozenModule, PyTorchModelHubMixin):
    """Images to token indices and back.

        tokenizer = ReVQTokenizer.from_pretrained("runs/mine/tokenizer")
        indices = tokenizer.encode(images)     # (B,3,S,S) in [-1,1] -> (B,T) int64
        images = tokenizer.decode(indices)     # (B,T) -> (B,3,S,S) in [-1,1]

    The VAE is loaded at first use, and must have the fingerprint that the tokenizer was trained with. Its weights are not among the tokenizer's,
    but it goes where the tokenizer goes. Everything stays in float32 (`half()` is refused) and in evaluation mode. Under `torch.autocast` VAE and
    rectifier compute in the lower precision; the coordinates and the search for their codes do not.
    """

    error = TokenizerError

    def __init__(self, config: dict[str, Any]) -> None:
        """Build the modules that `config` (the content of config.json) describes; weights come from `load_state_dict`.

        Args:
            config: tokens, codes, latent_shape, image_size, transform (its kind), rectifier (settings or None), vae (identity), and more.
        """
        super().__init__()
        self.config = config
        self.latent_shape: tuple[int, int, int] = tuple(config["latent_shape"])
        self.image_size: int = config["image_size"]
        self.tokens: int = config["tokens"]
        self.codes: int = config["codes"]
        self.dims = math.prod(self.latent_shape) // self.tokens
        self.transform = blank_transform(self.latent_shape, self.tokens, config["transform"])
        self.quantizer = MultiGroupQuantizer(torch.zeros(self.tokens, self.codes, self.dims))
        self.rectifier = Rectifier(**config["rectifier"]) if config["rectifier"] else None
        self.vae_identity: dict[str, Any] = config["vae"]
        self._vae: list[FrozenVAE] = []  # in a list, so that its weights are not among this module's
        self._vae_given = False
        self._vae_spec: str | None = None
        self.requires_grad_(False)
        self.settle()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *, vae: str | FrozenVAE | None = None, device: str | torch.device = "cpu", **hub_options: Any
    ) -> ReVQTokenizer:
        """Load a tokenizer from a folder or from the model hub.

        Args:
            path: a folder that `save_pretrained` wrote, or a hub id.
            vae: where to find the VAE if not under the id that the tokenizer names: hub id, folder, FILE.py:FACTORY, or one already loaded.
            device: where the tokenizer and the VAE compute.
            hub_options: revision, token, cache_dir, local_files_only for the model hub.

        Raises:
            TokenizerError: no tokenizer there (then it is a FileNotFoundError too), or a damaged one.
            MismatchError: the given VAE is another one.
        """
        with naming_writer(path, lambda: writer_of(path, around=True)):
            tokenizer = cls._find(path, hub_options)
        tokenizer.to(device)
        if isinstance(vae, FrozenVAE):
            vae.require(tokenizer.vae_identity)
            tokenizer._vae, tokenizer._vae_given = [vae.to(device)], True
        else:
            tokenizer._vae_spec = vae
        return tokenizer

    @classmethod
    def _find(cls, path: str | Path, hub_options: dict[str, Any]) -> ReVQTokenizer:
        folder = local_path(path)
        try:
            found: ReVQTokenizer = super().from_pretrained(str(folder if os.path.isdir(folder) else path), **hub_options)
        except TokenizerError:
            raise
        except Exception as error:  # the hub client has its own errors, for a name that is no folder and cannot be downloaded
            where = f"no tokenizer at {path}: no such folder, and not to be had from the model hub"
            raise TokenizerNotFoundError(f"{where} ({one_line(error)})") from error
        return found

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict[str, Any] | None = None, **hub_options: Any) -> ReVQTokenizer:
        if not config or config.get("kind") != TOKENIZER_KIND:
            raise TokenizerError(f"{model_id} is no revq tokenizer: it needs a config.json of kind {TOKENIZER_KIND!r}; train-rectifier writes one")
        if config.get("format_version", 0) > FORMAT_VERSION:
            raise TokenizerError(f"{model_id} has tokenizer format {config['format_version']}, this revq reads up to {FORMAT_VERSION}; upgrade revq")
        try:
            options = {name: hub_options[name] for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
            local = os.path.isdir(model_id)
            file = os.path.join(model_id, WEIGHTS_NAME) if local else hf_hub_download(model_id, WEIGHTS_NAME, **options)
            weights = load_file(file)
        except Exception as error:  # safetensors, torch and the hub client each have their own
            raise TokenizerError(f"the tokenizer in {model_id} cannot be loaded: {WEIGHTS_NAME}: {one_line(error)}") from error
        try:
            with torch.device("cpu"):  # also within another torch.device, on which weights would have no value (meta)
                tokenizer = cls(config)
        except Exception as error:  # of whichever module a setting is missing or does not suit
            raise TokenizerError(f"the tokenizer in {model_id} cannot be loaded: config.json: {type(error).__name__}: {one_line(error)}") from error
        if faults := compare_weights(tokenizer.state_dict(), weights):
            raise TokenizerError(f"the tokenizer in {model_id} is not all there: {WEIGHTS_NAME}: {faults}; copy or train it again")
        tokenizer.load_state_dict(weights)
        return tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write model card, weights and config.json, each whole or not at all; the config, by which a tokenizer is known, last."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_bytes(save_directory / "README.md", model_card(self.config).encode())
        write_bytes(save_directory / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
        write_json(save_directory / "config.json", self.config)

    @property
    def bits_per_image(self) -> float:
        """T * log2(K)."""
        return self.tokens * math.log2(self.codes)

    @property
    def device(self) -> torch.device:
        """Where the tokenizer computes."""
        return self.transform.mean.device

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over every weight and the settings that shape the tokens."""
        digest = hashlib.sha256(json.dumps([self.config[name] for name in ("tokens", "codes", "latent_shape", "image_size", "rectifier")]).encode())
        digest.update(str(self.vae_identity["fingerprint"]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def vae(self) -> FrozenVAE:
        """The frozen VAE, loaded at first use.

        Raises:
            VAEError: it cannot be loaded.
            MismatchError: it is not the one that this tokenizer was trained with.
        """
        if not self._vae:
            with torch.device("cpu"):  # as the tokenizer
                self._vae = [FrozenVAE.load_recorded(self.vae_identity, spec=self._vae_spec, device=self.device)]
        if self._vae[0].device != self.device:  # another tokenizer that shares it took it along
            self._vae[0].to(self.device)
        return self._vae[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for vae in self._vae:
            vae._apply(fn, recurse)
        return self

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As torch's, without the VAE, whose weights no state dict would fill again: it is loaded anew at its next use."""
        self._vae, self._vae_given = [], False
        return super().to_empty(device=device, recurse=recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without a VAE that can be loaded by its name again; a plug-in's classes do not exist in a worker process."""
        return self.__dict__ if self._vae_given else {**self.__dict__, "_vae": []}

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """Raw latents (B,C,H,W) -> indices (B,T) int64 in [0,K).

        Raises:
            TokenizerError: the latents are of another shape, or not finite.
        """
        return self.quantizer.encode(self.transform(checked_latents(latents, self.latent_shape, self.device)))

    @torch.no_grad()
    def decode_latents(self, indices: Tensor, *, rectify: bool = True) -> Tensor:
        """indices (B,T) of any integer type -> raw latents (B,C,H,W); `rectify=False` leaves out the rectifier.

        Raises:
            TokenizerError: the indices have another shape, or are out of range.
        """
        return self.latents_of(self.quantizer.decode(checked_indices(indices, self.tokens, self.codes, self.device)), rectify=rectify)

    def latents_of(self, quantized: Tensor, *, rectify: bool = True) -> Tensor:
        """Quantized coordinates (B,T,D) -> raw latents (B,C,H,W); differentiable in the coordinates."""
        standardised = self.transform.from_coordinates(quantized)
        if rectify and self.rectifier is not None:
            standardised = self.rectifier(standardised)
        return self.transform.unstandardize(standardised)

    @torch.no_grad()
    def encode(self, images: Tensor, *, refine: int = 0) -> Tensor:
        """Images (B,3,S,S), floats in [-1,1] or uint8 in 0..255 -> indices (B,T) int64.

        Args:
            refine: steps of a search for the tokens whose decoded picture is nearest to the image (`models/refine.py`): more decibels at the same
                bits, for as many passes through the decoder and back. 0 takes the codes nearest to the encoder's latent.

        Raises:
            TokenizerError: the images have another shape, type or range, or they or their latents are not finite; `refine` is no number of steps.
        """
        if isinstance(refine, bool) or not isinstance(refine, int) or refine < 0:
            raise TokenizerError(f"expected refine as a number of steps, 0 or more, found {refine!r}")
        images = checked_images(images, self.image_size, self.device)
        if len(images) == 0:  # not every VAE takes a batch of none
            return torch.empty(0, self.tokens, dtype=torch.int64, device=self.device)
        latents = checked_latents(self.vae.encode(images), self.latent_shape, self.device)
        return self.tokens_of(images, latents, refine=refine)

    def tokens_of(self, images: Tensor, latents: Tensor, *, refine: int) -> Tensor:
        """Checked images (B,3,S,S) in [-1,1] and their raw latents (B,C,H,W) -> indices (B,T); `refine` as `encode` takes it."""
        return refine_tokens(self.quantizer, lambda quantized: self.vae.decode(self.latents_of(quantized)), images, self.transform(latents), refine)

    @torch.no_grad()
    def decode(self, indices: Tensor, *, rectify: bool = True) -> Tensor:
        """indices (B,T) of any integer type -> images (B,3,S,S) in [-1,1].

        Raises:
            TokenizerError: the indices have another shape, or are out of range.
        """
        latents = self.decode_latents(indices, rectify=rectify)
        return self.vae.decode(latents) if len(latents) else latents.new_empty(0, 3, self.image_size, self.image_size)

    def reconstruct(self, images: Tensor, *, rectify: bool = True, refine: int = 0) -> Tensor:
        """Images (B,3,S,S), as `encode` takes them -> the images (B,3,S,S) in [-1,1] that their tokens decode to."""
        return self.decode(self.encode(images, refine=refine), rectify=rectify)


def model_card(config: dict[str, Any]) -> str:
    """README.md of a tokenizer folder: what it is, how to use it, how well it does."""
    tokens, codes, size = config["tokens"], config["codes"], config["image_size"]
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in (config.get("metrics") or {}).items())
    measured = f"\nMeasured on latents that training did not see:\n\n| | |\n|---|---|\n{rows}\n" if rows else ""
    return f"""---
library_name: revq
tags: [image-tokenizer, vector-quantization, revq]
---

# A ReVQ tokenizer

{tokens} tokens of {codes} codes ({tokens * math.log2(codes):.0f} bits) for an image of {size} x {size} px, made from the frozen VAE
`{config["vae"]["id"]}` (fingerprint `{config["vae"]["fingerprint"]}`) with the `{config["transform"]}` transform.
The VAE's weights are not in this folder.

```python
from revq import ReVQTokenizer

tokenizer = ReVQTokenizer.from_pretrained("path/to/this/folder")
indices = tokenizer.encode(images)  # (B,3,{size},{size}) in [-1,1] -> (B,{tokens})
images = tokenizer.decode(indices)
```
{measured}
Method: Quantize-then-Rectify, arXiv 2507.10547.
"""
