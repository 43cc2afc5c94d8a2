"""One batch of images through a tokenizer, every way that an evaluation compares, and what that costs.

Shapes: B batch, S image side in pixels, C,H,W latent channels, rows, columns, T tokens per image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import TokenizerError, VAEError
from ...models.tokenizer import ReVQTokenizer
from .metrics import ROWS, to_signed, to_uint8
from .networks import full_float32, images_at_once


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What became of one batch."""

    rows: dict[str, Tensor]
    """uint8 (B,3,S,S): original, vae, quantized, rectified."""
    latents: Tensor
    """(B,C,H,W) raw, of the encoder."""
    indices: Tensor
    """(B,T) int64."""
    latent_errors: dict[str, dict[str, Tensor]]
    """By row "quantized" and "rectified": mean squared error (B,) of the standardised latent, plain, and of the coordinates."""
    seconds: dict[str, float]
    """ "encode": images to indices; "decode": indices to images, with the rectifier where there is one."""


def reconstruct(tokenizer: ReVQTokenizer, originals: Tensor, keys: Sequence[str], *, bf16: bool = False, refine: int = 0) -> Reconstruction:
    """Decode uint8 images (B,3,S,S) in every way.

    Args:
        keys: names of the images, for the error.
        bf16: decode in bfloat16; the encoder, and so the tokens, stay in float32.
        refine: steps of the search for better tokens, as in `ReVQTokenizer.encode`.

    Raises:
        VAEError, TokenizerError: a decoded value is not finite.
    """
    at_once = images_at_once(tokenizer.device, tokenizer.image_size)
    parts = [
        _reconstruct(tokenizer, originals[i : i + at_once], keys[i : i + at_once], bf16=bf16, refine=refine)
        for i in range(0, len(originals), at_once)
    ]
    return Reconstruction(
        rows={row: torch.cat([part.rows[row] for part in parts]) for row in ROWS},
        latents=torch.cat([part.latents for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        latent_errors={
            row: {name: torch.cat([part.latent_errors[row][name] for part in parts]) for name in errors}
            for row, errors in parts[0].latent_errors.items()
        },
        seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
    )


@torch.no_grad()
def _reconstruct(tokenizer: ReVQTokenizer, originals: Tensor, keys: Sequence[str], *, bf16: bool, refine: int) -> Reconstruction:
    """`reconstruct` of as many images as go through the networks at once. Decoded pictures become uint8 one row after the other."""
    device = tokenizer.device
    with full_float32(device):
        started = _now(device)
        images = to_signed(originals)
        latents = tokenizer.vae.encode(images)
        indices = tokenizer.tokens_of(images, latents.float(), refine=refine)
        encoded = _now(device)
        approximate = {"rectified": tokenizer.decode_latents(indices, rectify=True)}
        pictures = _decode(tokenizer, approximate["rectified"], bf16)
        finished = _now(device)
        rows = {"rectified": _finite_uint8(pictures, "rectified", keys)}
        rows["vae"] = _finite_uint8(_decode(tokenizer, latents, bf16), "vae", keys)
        if tokenizer.rectifier is None:
            approximate["quantized"], rows["quantized"] = approximate["rectified"], rows["rectified"]
        else:
            approximate["quantized"] = tokenizer.decode_latents(indices, rectify=False)
            rows["quantized"] = _finite_uint8(_decode(tokenizer, approximate["quantized"], bf16), "quantized", keys)
    errors = {row: latent_errors(tokenizer, approximate[row], latents) for row in ("quantized", "rectified")}
    seconds = {"encode": encoded - started, "decode": finished - encoded}
    return Reconstruction(rows={"original": originals, **rows}, latents=latents, indices=indices, latent_errors=errors, seconds=seconds)


def latent_errors(tokenizer: ReVQTokenizer, approximate: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Mean squared error (B,) float64 on the CPU between raw latents (B,C,H,W), standardised; and of their coordinates, which with the `decoder`
    transform is that in the decoder's metric."""
    error = (approximate - latents.float()) / tokenizer.transform.std
    coordinates = tokenizer.transform.to_coordinates(error)
    return {"latent_mse": error.square().mean((1, 2, 3)).cpu().double(), "decoder_mse": coordinates.square().mean((1, 2)).cpu().double()}


@torch.no_grad()
def check_round_trip(tokenizer: ReVQTokenizer, originals: Tensor, indices: Tensor, *, bf16: bool = False, refine: int = 0) -> dict[str, int]:
    """Stored tokens must give the picture that encode and decode give at once.

    The indices (B,T) go through bytes, as a model's training data would store them, and are decoded; the images are encoded and decoded again.

    Returns:
        {"images", "largest_difference" in levels of 255}; the difference is 0 where the device is deterministic.
    """
    stored = indices.cpu().numpy().astype("<u4").tobytes()
    restored = torch.from_numpy(np.frombuffer(stored, "<u4").astype(np.int64)).reshape(indices.shape)
    with full_float32(tokenizer.device), _autocast(tokenizer.device, bf16):
        ours = to_uint8(tokenizer.decode(restored))
    with full_float32(tokenizer.device):
        again = tokenizer.encode(to_signed(originals), refine=refine)
        with _autocast(tokenizer.device, bf16):
            theirs = to_uint8(tokenizer.decode(again))
    return {"images": len(originals), "largest_difference": int((ours.int() - theirs.int()).abs().max())}


def _decode(tokenizer: ReVQTokenizer, latents: Tensor, bf16: bool) -> Tensor:
    with _autocast(tokenizer.device, bf16):
        return tokenizer.vae.decode(latents)


def _autocast(device: torch.device, bf16: bool) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _finite_uint8(decoded: Tensor, row: str, keys: Sequence[str]) -> Tensor:
    finite = decoded.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        key = keys[int((~finite).nonzero()[0])]
        error = VAEError if row == "vae" else TokenizerError
        raise error(f"the {row} row of image {key} decodes to values that are not finite; its metrics would mean nothing")
    return to_uint8(decoded)


def decode_to_uint8(tokenizer: ReVQTokenizer, latents: Tensor, *, bf16: bool = False) -> Tensor:
    """Raw latents (B,C,H,W) -> uint8 (B,3,S,S), as in `reconstruct`."""
    parts = latents.split(images_at_once(tokenizer.device, tokenizer.image_size))
    with torch.no_grad(), full_float32(tokenizer.device):
        return torch.cat([to_uint8(_decode(tokenizer, part, bf16)) for part in parts])
