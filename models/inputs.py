"""What a tokenizer is given, checked and brought to one form; whatever it cannot mean is a TokenizerError of one line.

Each check waits once for the device: a batch that is not finite would come out as token 0, and an index out of range as another code.

Shapes: B batch, C,H,W latent channels, rows, columns, S image side, T tokens per image, K codes per codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TokenizerError

_LARGEST = 2.0  # resizing with a sharp filter oversteps [-1,1] a little; nothing oversteps it by half of its width but another scale


def checked_images(images: Tensor, image_size: int, device: torch.device) -> Tensor:
    """Images (B,3,S,S), floats in [-1,1] or uint8 in 0..255, of any layout -> float32 in [-1,1] on `device`.

    Raises:
        TokenizerError: they are of another shape, type or range, or not finite.
    """
    shape = f"(B,3,{image_size},{image_size})"
    images = _on_device(images, "images", device)
    if images.ndim != 4 or images.shape[1:] != (3, image_size, image_size):
        mend = "images[None] makes a batch of one image" if images.ndim == 3 else "resize and crop them first"
        raise TokenizerError(f"expected images of shape {shape} in [-1,1], found {tuple(images.shape)}; {mend}")
    if images.dtype == torch.uint8:
        return images.float().div_(127.5).sub_(1)
    if not images.is_floating_point():
        raise TokenizerError(f"expected images of floats in [-1,1] or of uint8, found {images.dtype}; images.to(torch.uint8) if they hold 0 to 255")
    images = images.float()
    if len(images) == 0:
        return images
    lowest, highest = torch.stack(images.aminmax()).tolist()
    if not -_LARGEST <= lowest <= highest <= _LARGEST:  # nor where one is NaN
        _require_finite(images, "image")
        raise TokenizerError(
            f"expected images in [-1,1], found values from {lowest:.4g} to {highest:.4g}; those of 0 to 255 are images / 127.5 - 1, or given as uint8"
        )
    return images


def checked_latents(latents: Tensor, latent_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Raw latents (B,C,H,W) of any float type -> float32 on `device`.

    Raises:
        TokenizerError: they are of another shape or type, or not finite.
    """
    latents = _on_device(latents, "latents", device)
    if latents.ndim != 4 or latents.shape[1:] != latent_shape or not latents.is_floating_point():
        expected = ",".join(map(str, latent_shape))
        raise TokenizerError(f"expected float latents of shape (B,{expected}), found {tuple(latents.shape)} {latents.dtype}; they are the VAE's, raw")
    latents = latents.float()
    if not bool(latents.isfinite().all()):
        _require_finite(latents, "latent")
    return latents


def checked_indices(indices: Tensor, tokens: int, codes: int, device: torch.device) -> Tensor:
    """Indices (B,T) in [0,K) of any integer type -> int64 on `device`.

    Raises:
        TokenizerError: they are of another shape or type, or out of range.
    """
    indices = _on_device(indices, "indices", device)
    not_whole = indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    if indices.ndim != 2 or indices.shape[1] != tokens or not_whole:
        mend = "; indices[None] makes a batch of one image" if indices.shape == (tokens,) and not not_whole else ""
        raise TokenizerError(f"expected integer indices of shape (B,{tokens}), found {tuple(indices.shape)} {indices.dtype}{mend}")
    indices = indices.long()  # uint8 would select as a mask does
    if len(indices) == 0:
        return indices
    lowest, highest = torch.stack(indices.aminmax()).tolist()
    if lowest < 0 or highest >= codes:
        raise TokenizerError(f"expected indices in [0,{codes}), found {lowest} to {highest}; are they another tokenizer's?")
    return indices


def _on_device(values: Tensor, name: str, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor):
        raise TokenizerError(f"expected {name} as a torch.Tensor, found {type(values).__name__}; torch.as_tensor makes one of an array or a list")
    if values.layout != torch.strided or values.is_nested:
        raise TokenizerError(f"expected {name} as a dense tensor, found a {'nested' if values.is_nested else values.layout} one")
    if "meta" in (values.device.type, device.type):
        where = f"the {name} are" if values.device.type == "meta" else "the tokenizer is"
        raise TokenizerError(f"{where} on the meta device, where nothing has a value; load them to a real one")
    return values.to(device)


def _require_finite(values: Tensor, name: str) -> None:
    finite = values.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        number = int((~finite).nonzero()[0])
        mend = "; under autocast to float16 a VAE may overflow, use bfloat16" if name == "latent" else ""
        raise TokenizerError(f"{name} {number} of the batch holds values that are not finite (NaN or infinity), which no token stands for{mend}")
