"""Exact nearest code, for T independent codebooks at once.

Shapes: T tokens (codebooks), N points for each, D dims, K codes per codebook.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..errors import ConfigError

BACKENDS = ("auto", "tree", "product", "fused")
_TREE_MAX_DIMS = 8
_TREE_MIN_CODES = 512
_TREE_MIN_CODES_4 = 64  # up to 4 dims, where trees are better still
_FUSED_MAX_DIMS = 8  # more would not fit a GPU thread's registers
_LEAF_CODES = 32  # a twentieth faster to search than SciPy's 16
R = TypeVar("R")
_BLOCK_VALUES = 1 << 22  # distances held at once by the blocked product: 16 MiB in float32


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
    """A search structure over fixed codebooks; every backend finds the same codes, up to the rounding of equally near ones.

    - "tree": a k-d tree for each codebook, in float64, searched by torch's number of threads. The fastest on the CPU where D is small. Building
      costs about as much as searching K points, so keep this object while the codebooks stay the same.
    - "product": blocks of a matrix product; anywhere, any D.
    - "fused": one GPU kernel (Triton) that keeps each point's minimum in registers and writes no distances to memory.
    """

    def __init__(self, codebooks: Tensor, backend: str = "auto") -> None:
        """Prepare the search.

        Args:
            codebooks: (T,K,D) float32; copied into trees, or referred to.
            backend: "tree", "product", "fused", or "auto" (by device, D and K).

        Raises:
            ConfigError: the kernel was asked for and Triton is not installed.
        """
        self.codebooks = codebooks.detach()
        self.backend = _pick_backend(codebooks.device, *codebooks.shape[1:]) if backend == "auto" else backend
        if self.backend == "fused" and not _has_triton():
            raise ConfigError("the fused search needs Triton, which PyTorch's CUDA builds bring; use the backend product")
        if self.backend == "tree":
            values = self.codebooks.float().cpu().numpy()
            self._trees = [tree for part in _in_threads(lambda tokens: [_Tree(values[token]) for token in tokens], len(values)) for tree in part]

    @torch.no_grad()
    def query(self, coordinates: Tensor) -> Tensor:
        """coordinates (T,N,D) -> indices (T,N) int64, on the coordinates' device."""
        if coordinates.shape[1] == 0:
            return torch.empty(coordinates.shape[:2], dtype=torch.int64, device=coordinates.device)
        if self.backend == "tree":
            points = coordinates.double().cpu().contiguous().numpy()
            found = np.empty(points.shape[:2], np.int64)

            def search(tokens: range) -> None:
                for token in tokens:
                    found[token] = self._trees[token].query(points[token])

            _in_threads(search, len(points))
            return torch.from_numpy(found).to(coordinates.device)
        if self.backend == "fused":
            from .fused_nearest import fused_nearest

            return fused_nearest(coordinates.float(), self.codebooks.float())
        return _nearest_by_product(coordinates.float(), self.codebooks.float())


def _pick_backend(device: torch.device, codes: int, dims: int) -> str:
    if device.type == "cuda" and dims <= _FUSED_MAX_DIMS and _has_triton():
        return "fused"
    tree = dims <= _TREE_MAX_DIMS and codes >= (_TREE_MIN_CODES_4 if dims <= 4 else _TREE_MIN_CODES)
    return "tree" if device.type == "cpu" and tree else "product"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _in_threads(work: Callable[[range], R], tokens: int) -> list[R]:
    """`work` on one run of tokens for each of torch's threads; SciPy's trees work without holding the interpreter, what is around them does not."""
    threads = max(1, min(torch.get_num_threads(), tokens))
    cuts = [tokens * part // threads for part in range(threads + 1)]
    runs = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
    if threads == 1:
        return [work(runs[0])]
    with ThreadPoolExecutor(threads, thread_name_prefix="revq-nearest") as pool:
        return list(pool.map(work, runs))


class _Tree:
    """A k-d tree over one codebook's distinct codes that answers with the lowest index among the nearest."""

    def __init__(self, codebook: np.ndarray) -> None:
        # Sorting rows costs three times what the tree costs; sorting one sum of each row tells almost always that no two are equal.
        sums = codebook.astype(np.float64) @ np.sqrt(np.arange(2, codebook.shape[1] + 2))
        self.first = np.arange(len(codebook))
        if len(np.unique(sums)) < len(codebook):
            codebook, self.first = np.unique(codebook, axis=0, return_index=True)
        self.tree = cKDTree(codebook, leafsize=_LEAF_CODES)

    def query(self, points: np.ndarray) -> np.ndarray:
        """(N,D) float64 -> (N,) indices."""
        if len(self.first) == 1:
            return np.zeros(len(points), dtype=np.int64) + self.first[0]
        distances, neighbours = self.tree.query(points, k=2)
        indices = self.first[neighbours[:, 0]]
        # The tree names any of several equally near codes. That is rare, so those points are compared with every code.
        for tied in np.flatnonzero(distances[:, 0] == distances[:, 1]):
            squared = np.square(self.tree.data - points[tied]).sum(axis=1)
            indices[tied] = self.first[squared == squared.min()].min()
        return indices


def _nearest_by_product(coordinates: Tensor, codebooks: Tensor) -> Tensor:
    """Scores |c|^2/2 - xc in blocks. That form cancels in float32, so wherever a second code comes within its rounding error of the best
    one, the point is compared with every code by direct distance."""
    tokens, points, dims = coordinates.shape
    codes = codebooks.shape[1]
    exact = _exact_type(coordinates.device)
    centre = codebooks.to(exact).mean(1, keepdim=True)
    centred = (codebooks.to(exact) - centre).float()
    half_norms = centred.square().sum(2).div(2)
    longest = half_norms.amax(1).mul(2).sqrt()
    together = max(1, min(tokens, _BLOCK_VALUES // codes))
    rows = max(1, _BLOCK_VALUES // (together * codes))
    indices = torch.empty(tokens, points, dtype=torch.int64, device=coordinates.device)
    unsure = torch.empty(tokens, points, dtype=torch.bool, device=coordinates.device)
    for first in range(0, tokens, together):
        group = slice(first, first + together)
        for start in range(0, points, rows):
            block = (group, slice(start, start + rows))
            part = (coordinates[block].to(exact) - centre[group]).float()
            scores = torch.baddbmm(half_norms[group].unsqueeze(1), part, centred[group].transpose(1, 2), alpha=-1)
            best, indices[block] = scores.min(2)
            # Each score is off by at most (D+3) half units in the last place of |c|(|x|+|c|), and so is the best one; doubled for safety.
            reach = longest[group].unsqueeze(1)
            slack = (dims + 3) * 2.0**-22 * reach * (part.norm(dim=2) + reach)
            unsure[block] = (scores <= (best + slack).unsqueeze(2)).sum(2) > 1
    if bool(unsure.any()):
        token, point = unsure.nonzero(as_tuple=True)
        indices[token, point] = _nearest_directly(coordinates[token, point], token, codebooks)
    return indices


def _nearest_directly(points: Tensor, token: Tensor, codebooks: Tensor) -> Tensor:
    """points (M,D) and the codebook (M,) of each -> (M,) int64, by differences in float64; the lowest index of equally near codes."""
    exact = _exact_type(points.device)
    rows = max(1, _BLOCK_VALUES // codebooks[0].numel() // 4)
    codes = torch.arange(codebooks.shape[1], device=points.device)
    parts = []
    for some, owner in zip(points.split(rows), token.split(rows), strict=True):
        squared = (some.to(exact).unsqueeze(1) - codebooks[owner].to(exact)).square().sum(2)
        nearest = squared == squared.amin(1, keepdim=True)
        parts.append(torch.where(nearest, codes, codebooks.shape[1]).amin(1).clamp_max(codebooks.shape[1] - 1))
    return torch.cat(parts)


def _exact_type(device: torch.device) -> torch.dtype:
    """MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
