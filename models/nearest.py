"""Exact nearest code, for T independent codebooks at once.

Shapes: T tokens (codebooks), N points for each, D dims, K codes per codebook.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

_TREE_MAX_DIMS = 8
_TREE_MIN_CODES = 512
_BLOCK_VALUES = 1 << 24  # distances held at once by the blocked product: 64 MiB in float32


def nearest_codes(coordinates: Tensor, codebooks: Tensor) -> Tensor:
    """The index of each point's nearest code by Euclidean distance; of equally near codes, the lowest index.

    Args:
        coordinates: (T,N,D) float32.
        codebooks: (T,K,D) float32 on the same device.

    Returns:
        (T,N) int64.
    """
    return NearestCodes(codebooks).query(coordinates)


class NearestCodes:
    """A search structure over fixed codebooks: k-d trees on the CPU where D is small, else a blocked matrix product.

    The trees win over all-pairs distances from a few hundred codes up (a factor that grows with K); they are built once, so
    keep this object while the codebooks stay the same.
    """

    def __init__(self, codebooks: Tensor, backend: str = "auto") -> None:
        """Prepare the search.

        Args:
            codebooks: (T,K,D) float32; copied into trees, or referred to.
            backend: "tree", "product", or "auto" (by device, D and K).
        """
        self.codebooks = codebooks.detach()
        _, codes, dims = codebooks.shape
        small = codebooks.device.type == "cpu" and dims <= _TREE_MAX_DIMS and codes >= _TREE_MIN_CODES
        self.backend = ("tree" if small else "product") if backend == "auto" else backend
        self._trees = [_Tree(codebook) for codebook in self.codebooks.float().cpu().numpy()] if self.backend == "tree" else []

    @torch.no_grad()
    def query(self, coordinates: Tensor) -> Tensor:
        """coordinates (T,N,D) -> indices (T,N) int64, on the coordinates' device."""
        if self.backend == "tree":
            points = coordinates.float().cpu().numpy()
            found = np.stack([tree.query(group) for tree, group in zip(self._trees, points, strict=True)])
            return torch.from_numpy(found).to(coordinates.device)
        return _nearest_by_product(coordinates.float(), self.codebooks.float())


class _Tree:
    """A k-d tree over one codebook's distinct codes that answers with the lowest index among the nearest."""

    def __init__(self, codebook: np.ndarray) -> None:
        distinct, self.first = np.unique(codebook, axis=0, return_index=True)
        self.tree = cKDTree(distinct)

    def query(self, points: np.ndarray) -> np.ndarray:
        if len(self.first) == 1:
            return np.zeros(len(points), dtype=np.int64) + self.first[0]
        distances, neighbours = self.tree.query(points, k=2)
        indices = self.first[neighbours[:, 0]].astype(np.int64)
        # The tree names any of several equally near codes. That is rare, so those points are compared with every code.
        for tied in np.flatnonzero(distances[:, 0] == distances[:, 1]):
            squared = np.square(self.tree.data - points[tied].astype(np.float64)).sum(axis=1)
            indices[tied] = self.first[squared == squared.min()].min()
        return indices


def _nearest_by_product(coordinates: Tensor, codebooks: Tensor) -> Tensor:
    """Distances by |c|^2 - 2xc in blocks; the four best are then compared by direct distance in float64, since that form cancels in float32."""
    tokens, points, dims = coordinates.shape
    codes = codebooks.shape[1]
    centre = codebooks.mean(1, keepdim=True)
    centred = codebooks - centre
    exact = torch.float32 if coordinates.device.type == "mps" else torch.float64
    half_norms = centred.square().sum(2).div(2).unsqueeze(1)
    block = max(1, _BLOCK_VALUES // max(1, tokens * codes))
    indices = torch.empty(tokens, points, dtype=torch.int64, device=coordinates.device)
    for start in range(0, points, block):
        part = coordinates[:, start : start + block]
        scores = torch.baddbmm(half_norms, part - centre, centred.transpose(1, 2), alpha=-1)
        candidates = scores.topk(min(4, codes), dim=2, largest=False).indices.sort(dim=2).values
        chosen = codebooks.gather(1, candidates.flatten(1).unsqueeze(2).expand(-1, -1, dims)).unflatten(1, candidates.shape[1:])
        distances = (part.to(exact).unsqueeze(2) - chosen.to(exact)).square().sum(3)
        indices[:, start : start + block] = candidates.gather(2, distances.argmin(2, keepdim=True)).squeeze(2)
    return indices
