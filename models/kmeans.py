"""k-means for many small problems: FAISS one group at a time, or all groups at once in torch.

Shapes: G groups (tokens), N points for each, D dims, K codes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import CodebookError, ConfigError
from .nearest import nearest_codes

BACKENDS = ("auto", "faiss", "torch")


def pick_backend(name: str, device: torch.device) -> str:
    """ "faiss" or "torch" for what was asked: "auto" takes FAISS on the CPU where it is installed, torch on other devices.

    Raises:
        ConfigError: FAISS was asked for and is not installed.
    """
    if name == "torch" or (name == "auto" and device.type != "cpu"):
        return "torch"
    try:
        import faiss  # noqa: F401
    except ImportError as error:
        raise ConfigError("FAISS is not installed; install revq[cpu] (faiss-cpu) or revq[gpu] (faiss-gpu), or pass --backend torch") from error
    return "faiss"


def kmeans(points: Tensor, codes: int, *, iterations: int, seeds: list[int], backend: str) -> Tensor:
    """Fit K codes to each group by Lloyd's iterations, from random distinct points.

    Args:
        points: (G,N,D) float32.
        codes: K, at most N.
        iterations: rounds of assignment and update.
        seeds: G seeds, so that a group's codes do not depend on which other groups are fitted with it.
        backend: "faiss" or "torch".

    Returns:
        (G,K,D) float32 on the points' device.

    Raises:
        CodebookError: fewer points than codes.
    """
    if points.shape[1] < codes:
        raise CodebookError(
            f"{points.shape[1]} latents cannot fill {codes} codes; use --codes {points.shape[1]} or fewer, or encode more images or views"
        )
    return (_faiss_kmeans if backend == "faiss" else _torch_kmeans)(points, codes, iterations, seeds)


def _faiss_kmeans(points: Tensor, codes: int, iterations: int, seeds: list[int]) -> Tensor:
    import faiss

    count, dims = points.shape[1:]
    centroids = []
    for group, seed in zip(points.float().cpu().numpy(), seeds, strict=True):
        # FAISS would otherwise take a sample of the points, and print a warning of its own where they are few.
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": count}
        clustering = faiss.Kmeans(dims, codes, niter=iterations, seed=seed, gpu=False, **limits)
        clustering.train(np.ascontiguousarray(group))
        assert clustering.centroids is not None
        centroids.append(torch.from_numpy(clustering.centroids.reshape(codes, dims).copy()))
    return torch.stack(centroids).to(points.device)


def _torch_kmeans(points: Tensor, codes: int, iterations: int, seeds: list[int]) -> Tensor:
    groups, count, dims = points.shape
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = torch.stack([torch.randperm(count, generator=generator)[:codes] for generator in generators]).to(points.device)
    centroids = points.gather(1, starts.unsqueeze(2).expand(-1, -1, dims))
    for _ in range(iterations):
        indices = nearest_codes(points, centroids)
        counts = torch.zeros(groups, codes, device=points.device).scatter_add_(1, indices, torch.ones_like(indices, dtype=torch.float32))
        sums = torch.zeros_like(centroids).scatter_add_(1, indices.unsqueeze(2).expand(-1, -1, dims), points)
        updated = sums / counts.clamp_min(1).unsqueeze(2)
        centroids = _repair_empty(updated, counts)
    return centroids


def _repair_empty(centroids: Tensor, counts: Tensor) -> Tensor:
    """Put each empty code right beside one of the fullest, as FAISS does, so that the next assignment splits that cluster."""
    empty = counts == 0
    if not bool(empty.any()):
        return centroids
    fullest = counts.argsort(dim=1, descending=True, stable=True)
    rank_of_empty = (empty.cumsum(1) - 1).clamp_min(0)
    donors = fullest.gather(1, rank_of_empty)
    copies = centroids.gather(1, donors.unsqueeze(2).expand_as(centroids))
    signs = 1 - 2 * (torch.arange(centroids.shape[2], device=centroids.device) % 2).to(centroids)
    return torch.where(empty.unsqueeze(2), copies * (1 + signs / 1024) + signs * 1e-6, centroids)
