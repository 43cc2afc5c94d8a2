"""Latents that are quantized once, because the codebooks do not change.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, T tokens, K codes per codebook.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...cache.batches import ResidentLatents
from ...models.quantizer import MultiGroupQuantizer, code_counts
from ...models.transform import LatentTransform
from ..events import Advance, Begin, Event

_BATCH = 256
_QUANTIZED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FrozenTokens:
    """The tokens of all latents; a batch is a look-up."""

    tokens: Tensor
    """(N,T) indices, int16 where K fits in it, else int32."""
    quantized: Tensor | None
    """(N,C,H,W) float32 quantized standardised latents: where they fit, even the way back from coordinates is spared. None where they do not."""
    counts: Tensor
    """(T,K) int64: how often each code is used."""

    @torch.no_grad()  # the codes are frozen: no gradient is to reach them
    def batch(self, index: Tensor, transform: LatentTransform, quantizer: MultiGroupQuantizer) -> Tensor:
        """(B,) positions -> (B,C,H,W) quantized standardised latents, without gradient."""
        index = index.to(self.tokens.device)
        if self.quantized is not None:
            return self.quantized.index_select(0, index)
        return transform.from_coordinates(quantizer.decode(self.tokens.index_select(0, index).long()))


def table_bytes(rows: int, latent_shape: tuple[int, ...], tokens: int, codes: int) -> int:
    """Memory of the table of that many latents, on the device."""
    quantized = 4 * rows * math.prod(latent_shape)
    return rows * tokens * _token_type(codes).itemsize + (quantized if quantized <= _QUANTIZED_BYTES else 0)


def quantize_once(
    latents: ResidentLatents, name: str, transform: LatentTransform, quantizer: MultiGroupQuantizer
) -> Generator[Event, None, FrozenTokens]:
    """Make the table of `latents`, those of the split `name`; yields progress. Beside the table it holds one batch of 256 at a time."""
    rows, device = len(latents), quantizer.codebooks.device
    tokens, codes, _ = quantizer.codebooks.shape
    keep = 4 * rows * math.prod(latents.latent_shape) <= _QUANTIZED_BYTES
    indices = torch.empty(rows, tokens, dtype=_token_type(codes), device=device)
    quantized = torch.empty(rows, *latents.latent_shape, device=device) if keep else None
    counts = torch.zeros(tokens, codes, dtype=torch.int64, device=device)
    yield Begin(task=f"quantize {name}", total=rows, unit="latents")
    for positions, batch in latents.sequential(_BATCH):
        first, last = int(positions[0]), int(positions[-1]) + 1
        found = quantizer.encode(transform(batch))
        indices[first:last] = found
        counts += code_counts(found, codes)
        if quantized is not None:
            with torch.no_grad():
                quantized[first:last] = transform.from_coordinates(quantizer.decode(found))
        yield Advance(done=last)
    return FrozenTokens(tokens=indices, quantized=quantized, counts=counts)


def _token_type(codes: int) -> torch.dtype:
    return torch.int16 if codes <= 1 << 15 else torch.int32
