"""Better tokens for one image at the same bits: search for those whose *decoded* picture is nearest to the image.

An encoder and a nearest-code search know nothing of each other's errors, nor of the picture. Here the quantized coordinates are decoded, the
picture is compared with the image, and the gradient goes back through the frozen decoder and the rectifier to the coordinates, straight through
the quantizer; the coordinates take a step and are quantized again. Nothing is trained and the decoder stays as it was: only encoding costs more. For
neural image compression this was done by Campos et al. (arXiv 1906.01223) and Yang, Bamler and Mandt (arXiv 2006.04240).

Shapes: B batch, S image side, T tokens per image, D dims per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .quantizer import MultiGroupQuantizer

Decode = Callable[[Tensor], Tensor]
"""Quantized coordinates (B,T,D) -> pictures (B,3,S,S) in [-1,1], with gradients."""
_IMAGES = 8  # at once: a decoder's activations are large


@torch.inference_mode(False)  # the gradient needs tensors of its own, whatever mode the caller is in
@torch.no_grad()
def refine_tokens(quantizer: MultiGroupQuantizer, decode: Decode, images: Tensor, coordinates: Tensor, steps: int) -> Tensor:
    """The best tokens met on a walk of `steps` steps from the encoder's coordinates.

    Args:
        images: (B,3,S,S) in [-1,1], on the quantizer's device.
        coordinates: (B,T,D) of the encoder's latents.
        steps: how often to decode, go back and quantize again; 0 gives the nearest codes.

    Returns:
        (B,T) int64; no image's pixels are further off than with its nearest codes.
    """
    if steps == 0:
        return quantizer.encode(coordinates)
    parts = zip(images.split(_IMAGES), coordinates.split(_IMAGES), strict=True)
    return torch.cat([_refine(quantizer, decode, some, start, steps) for some, start in parts])


def _refine(quantizer: MultiGroupQuantizer, decode: Decode, images: Tensor, coordinates: Tensor, steps: int) -> Tensor:
    best = indices = quantizer.encode(coordinates)
    least, gradient = _error_and_gradient(quantizer, decode, images, indices)
    # The quantization error is the natural length of a step: a much shorter one changes no code, a much longer one all of them. Half of it, down to
    # nothing in a cosine, did well on every transform (docs/notes/refined-tokens.md).
    unit = 0.5 * (quantizer.decode(indices) - coordinates).flatten(1).norm(dim=1)
    for step in range(steps):
        length = unit * 0.5 * (1 + math.cos(math.pi * step / steps)) / gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        coordinates = coordinates - length[:, None, None] * gradient
        indices = quantizer.encode(coordinates)
        error, gradient = _error_and_gradient(quantizer, decode, images, indices)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[:, None], indices, best)
    return best


def _error_and_gradient(quantizer: MultiGroupQuantizer, decode: Decode, images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error (B,) of each image's pixels, and its gradient (B,T,D) in the quantized coordinates."""
    quantized = quantizer.decode(indices).requires_grad_()
    with torch.enable_grad():
        errors = (decode(quantized) - images).square().mean((1, 2, 3))
        (gradient,) = torch.autograd.grad(errors.sum(), quantized)
    return errors.detach(), gradient
