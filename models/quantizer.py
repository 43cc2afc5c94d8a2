"""Multi-group quantizer: one codebook for each token position, how its codes are used, and how unused ones come back.

Shapes: B batch, T tokens, D dims per token, K codes per codebook.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .device import exact_products
from .nearest import NearestCodes, _exact_type


class MultiGroupQuantizer(nn.Module):
    """T codebooks of K codes; token t of every image is quantized by codebook t. Nothing here counts: usage is what `code_counts` says of indices."""

    def __init__(self, codebooks: Tensor) -> None:
        """codebooks: (T,K,D) float32."""
        super().__init__()
        self.codebooks = nn.Parameter(codebooks.float())
        self._search: NearestCodes | None = None
        self._searched: tuple[int, int] | None = None

    def encode(self, coordinates: Tensor) -> Tensor:
        """coordinates (B,T,D) -> indices (B,T) int64 of the nearest codes; the search structure is kept, and follows the codes.

        In float32's own products, also under autocast.

        Raises:
            MismatchError: T or D is not that of the codebooks.
        """
        codes = self.codebooks.data
        # What says that nothing has changed: the same memory at the same version. Inference tensors have none, and a fused optimizer counts none up.
        known = not (self.training or self.codebooks.is_inference())
        present = (codes.data_ptr(), self.codebooks._version) if known else None
        with exact_products(codes.device):
            if self._search is None or (self._search.codebooks.device, self._search.codebooks.shape) != (codes.device, codes.shape):
                self._search = NearestCodes(codes)
            elif present is None or present != self._searched:
                self._search.move(codes)
            self._searched = present
            return self._search.query(coordinates.transpose(0, 1)).T

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the search structure: a copy's codes count their versions anew."""
        return {**self.__dict__, "_search": None, "_searched": None}

    def decode(self, indices: Tensor) -> Tensor:
        """indices (B,T) in [0,K) -> coordinates (B,T,D); differentiable in the codebooks, whose gradient is the same bits each time.

        A code's gradient is a sum over the latents that chose it. Of the two ways to look codes up one sums in a fixed order on a CPU, where threads
        share the codebooks and not the latents, and the other on a GPU, where the latents are sorted by code; the other way round atomic additions
        come in any order (docs of torch.use_deterministic_algorithms).
        """
        if self.codebooks.is_cuda:
            return self.codebooks[torch.arange(indices.shape[1], device=indices.device), indices]
        chosen = indices.T.unsqueeze(2).expand(-1, -1, self.codebooks.shape[2])
        return self.codebooks.gather(1, chosen).transpose(0, 1)


def code_counts(indices: Tensor, codes: int) -> Tensor:
    """indices (B,T) -> (T,K) int64: how often each code is used."""
    counts = torch.zeros(indices.shape[1], codes, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(1, indices.T, torch.ones_like(indices.T))


def perplexity(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,) exp of the entropy of the codes' frequencies, between 1 and K; float64, on MPS float32."""
    frequency = counts.to(_exact_type(counts.device)) / counts.sum(1, keepdim=True).clamp_min(1)
    return (-torch.xlogy(frequency, frequency).sum(1)).exp()  # torch.special.entr is not on every device


def usage(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,) share of the codes used at least once, in [0,1]; float64, on MPS float32."""
    return (counts > 0).to(_exact_type(counts.device)).mean(1)


def dead_codes(counts: Tensor) -> Tensor:
    """(T,K) counts -> (T,) int64: codes of each codebook never used."""
    return (counts == 0).sum(1)


@torch.no_grad()
def reset_unused(codebooks: Tensor, counts: Tensor, *, seed: int, share: float = 0.2, noise: float = 0.1) -> Tensor:
    """The paper's non-activation reset, in place: unused codes move beside the most used codes of their codebook. Never waits for the device.

    The paper's noise of 0.1 is for coordinates of deviation 1; those of other transforms differ by orders of magnitude from token to token, so here
    it is a share of what the used codes of the codebook spread. (Where a single code is used, the moved ones coincide with it.)

    Args:
        codebooks: (T,K,D), changed in place.
        counts: (T,K) uses of each code since the last reset, over a whole epoch say; not changed.
        seed: of the noise, which is the same whatever the device.
        share: at most this share of K codes moves in each codebook.
        noise: deviation of the distance to the used code, relative to the root mean square deviation of the codes from their mean, by their counts.

    Returns:
        () int64 on the codebooks' device: how many codes moved.
    """
    tokens, codes, dims = codebooks.shape
    limit = int(share * codes)
    # Sums, not products of matrices: those round by where their operands lie in memory, and a resumed run must go on to the bit.
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).to(codebooks).unsqueeze(2)
    mean = (shares * codebooks).sum(1, keepdim=True)
    spread = (shares * (codebooks - mean).square()).sum(1, keepdim=True).mean(2, keepdim=True).sqrt()
    unused = (counts > 0).byte().argsort(dim=1, stable=True)[:, :limit]
    most_used = counts.argsort(dim=1, descending=True, stable=True)[:, :limit]
    moves = (counts.gather(1, unused) == 0) & (counts.gather(1, most_used) > 0)
    # From pinned memory, since a copy from any other makes the host wait.
    drawn = torch.randn(tokens, limit, dims, generator=torch.Generator().manual_seed(seed), pin_memory=codebooks.is_cuda)
    shift = noise * spread * drawn.to(codebooks.device, non_blocking=True)
    place, source = (index.unsqueeze(2).expand(-1, -1, dims) for index in (unused, most_used))
    moved = torch.where(moves.unsqueeze(2), codebooks.gather(1, source) + shift, codebooks.gather(1, place))
    codebooks.scatter_(1, place, moved)
    return moves.sum()
