"""Multi-group quantizer: one codebook for each token position.

Shapes: B batch, T tokens, D dims per token, K codes per codebook.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .nearest import NearestCodes


class MultiGroupQuantizer(nn.Module):
    """T codebooks of K codes; token t of every image is quantized by codebook t."""

    def __init__(self, codebooks: Tensor) -> None:
        """codebooks: (T,K,D) float32."""
        super().__init__()
        self.codebooks = nn.Parameter(codebooks.float())
        self._search: NearestCodes | None = None
        self._searched: tuple[int, torch.device] | None = None

    def encode(self, coordinates: Tensor) -> Tensor:
        """coordinates (B,T,D) -> indices (B,T) int64 of the nearest codes.

        A search structure costs more than one small search, so it is built only when the same codes are searched a second time;
        while codebooks train, they change at every step.
        """
        codes = self.codebooks.data
        present = (self.codebooks._version, codes.device)
        if present != self._searched:
            self._searched, self._search = present, None
            return NearestCodes(codes, "product").query(coordinates.transpose(0, 1)).T
        self._search = self._search or NearestCodes(codes)
        return self._search.query(coordinates.transpose(0, 1)).T

    def decode(self, indices: Tensor) -> Tensor:
        """indices (B,T) in [0,K) -> coordinates (B,T,D); differentiable in the codebooks."""
        tokens = torch.arange(indices.shape[1], device=indices.device)
        return self.codebooks[tokens, indices]


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """indices (B,T) -> (T,K) int64: how often each code is used."""
    counts = torch.zeros(indices.shape[1], codes, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.T, torch.ones_like(indices.T))


def perplexity(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,) exp of the entropy of the codes' frequencies, between 1 and K."""
    frequency = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(frequency).sum(1).exp()


def usage(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,) share of the codes used at least once, in [0,1]."""
    return (counts > 0).double().mean(1)
