"""k-means for many small problems: FAISS group by group (the reference), or all groups at once in torch.

Both fit points that are centred and scaled to deviation 1, since float32 distances cancel far from the origin; both end with one exact round: every
point to its nearest code by direct distance, every code to the mean of its points.

Shapes: G groups (tokens), N points for each, D dims, K codes.
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CodebookError, ConfigError
from .nearest import nearest_codes

BACKENDS = ("auto", "faiss", "torch")
_SETTLED_ERROR = 1e-4  # FAISS stops when a round improves the error by less than this share ...
_SETTLED_POINTS = 1e-3  # ... and torch when a round moves fewer points than this share to another code
_FIXED_POINT = 2.0**36


def pick_backend(name: str, device: torch.device) -> str:
    """ "faiss" or "torch" for what was asked; "auto" is FAISS on a GPU where faiss-gpu is, and on a CPU where Numba is not, else torch.

    On a CPU with Numba torch is 5 times faster than FAISS at the same error (benchmarks/bench_codebooks.py, two cores).

    Raises:
        ConfigError: FAISS was asked for and is not installed.
    """
    if name == "torch":
        return "torch"
    try:
        serves = faiss_uses(device)
    except ImportError as error:
        if name == "auto":
            return "torch"
        raise ConfigError("FAISS is not installed; install revq[cpu] (faiss-cpu) or revq[gpu] (faiss-gpu), or pass --backend torch") from error
    searched_in_boxes = device.type == "cpu" and importlib.util.find_spec("numba") is not None
    return "faiss" if name == "faiss" or (serves and not searched_in_boxes) else "torch"


def faiss_uses(device: torch.device) -> bool:
    """Whether the installed FAISS computes on this device; faiss-cpu always computes on the CPU."""
    import faiss

    return device.type == "cpu" or (device.type == "cuda" and hasattr(faiss, "StandardGpuResources"))


@torch.no_grad()
def kmeans(points: Tensor, codes: int, *, iterations: int, seeds: list[int], backend: str) -> Tensor:
    """Fit K codes to each group by Lloyd's iterations, from random distinct points; a group that has converged stops earlier.

    Where a group has fewer distinct points than codes, its error is zero and the codes left over are copies that no point uses.

    Args:
        points: (G,N,D) float32.
        codes: K, at most N.
        iterations: rounds of assignment and update, at most.
        seeds: G seeds, so that a group's codes do not depend on which other groups are fitted with it.
        backend: "faiss" or "torch".

    Returns:
        (G,K,D) float32 on the points' device; the same, bit for bit, whenever the arguments are.

    Raises:
        CodebookError: fewer points than codes, or points that are not finite.
    """
    if points.shape[1] < codes:
        raise CodebookError(f"{points.shape[1]} points cannot fill {codes} codes; ask for {points.shape[1]} codes or fewer, or give more points")
    scaled, centre, scale = _normalised(points)
    fitted = (_faiss_kmeans if backend == "faiss" else _torch_kmeans)(scaled, codes, iterations, seeds)
    fitted, _ = _updated(scaled, fitted, nearest_codes(scaled, fitted))
    return (fitted * scale + centre).to(points.dtype)


def _normalised(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """points (G,N,D) -> the same with mean 0 and mean square 1 over each group in float32, and mean (G,1,D) and scale (G,1,1) to go back."""
    exact = torch.float32 if points.device.type == "mps" else torch.float64
    centre = torch.stack([group.to(exact).mean(0, keepdim=True) for group in points])
    scale = torch.stack([(group.to(exact) - mean).square().mean().sqrt() for group, mean in zip(points, centre, strict=True)])
    if not bool(torch.isfinite(scale).all()):
        group = int((~torch.isfinite(scale)).nonzero()[0])
        raise CodebookError(f"group {group} of the points holds values that are not finite; check the store with revq info --verify")
    # Points that all coincide up to rounding are left at the origin, not blown up.
    scale = torch.where(scale > 1e-30, scale, 1.0)[:, None, None]
    scaled = torch.stack([((group - mean) / size).float() for group, mean, size in zip(points, centre, scale, strict=True)])
    return scaled, centre, scale


def _faiss_kmeans(points: Tensor, codes: int, iterations: int, seeds: list[int]) -> Tensor:
    """Group by group; on the CPU as many groups at a time as torch has threads, since one group is too small to share."""
    import faiss

    count, dims = points.shape[1:]
    # FAISS would otherwise take a sample of the points, and print a warning of its own where they are few.
    options: dict[str, Any] = {"niter": iterations, "min_points_per_centroid": 1, "max_points_per_centroid": count}
    # FAISS got it in 2026 (its pull request 4894, after 1.14.1); an older one goes through all rounds, and finds the same or a little better.
    if hasattr(faiss.ClusteringParameters(), "early_stop_threshold"):
        options["early_stop_threshold"] = _SETTLED_ERROR
    on_gpu = points.device.type != "cpu" and faiss_uses(points.device)
    resources = faiss.StandardGpuResources() if on_gpu else None

    def fit(group: np.ndarray, seed: int) -> Tensor:
        if not on_gpu:
            faiss.omp_set_num_threads(1)
        clustering = faiss.Kmeans(dims, codes, seed=seed, **options)
        if resources is not None:  # not `gpu=1`, which is the first GPU, whichever the points are on
            clustering.index = faiss.index_cpu_to_gpu(resources, points.device.index, clustering.index)
        clustering.train(np.ascontiguousarray(group))
        assert clustering.centroids is not None
        return torch.from_numpy(clustering.centroids.reshape(codes, dims).copy())

    groups = points.cpu().numpy()
    with ThreadPoolExecutor(1 if on_gpu else torch.get_num_threads(), thread_name_prefix="revq-kmeans") as pool:
        return torch.stack(list(pool.map(fit, groups, seeds))).to(points.device)


def _torch_kmeans(points: Tensor, codes: int, iterations: int, seeds: list[int]) -> Tensor:
    count, dims = points.shape[1:]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    starts = torch.stack([torch.randperm(count, generator=generator)[:codes] for generator in generators]).to(points.device)
    fitted = points.gather(1, starts.unsqueeze(2).expand(-1, -1, dims))
    going = torch.arange(len(points), device=points.device)
    before: Tensor | None = None
    for _ in range(iterations):
        indices = nearest_codes(points, fitted[going])
        updated, counts = _updated(points, fitted[going], indices)
        fitted[going] = _repair_empty(updated, counts)
        if before is not None:
            moved = (indices != before).sum(1)
            unsettled = (moved > _SETTLED_POINTS * count) | (counts == 0).any(1)
            if not bool(unsettled.all()):
                going, points, indices = going[unsettled], points[unsettled], indices[unsettled]
            if len(going) == 0:
                break
        before = indices
    return fitted


def _updated(points: Tensor, fitted: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """points (G,N,D) and their codes (G,N) -> mean of each code's points (G,K,D), unused codes as they were; and counts (G,K).

    Sums are of 64-bit fixed-point numbers, so that they come out the same in any order: a GPU adds in another one at each run. With mean square 1
    the sum of N coordinates is below N*sqrt(D): 27 bits for a hundred million points.
    """
    if points.device.type == "mps":  # has neither float64 nor index_add_ of int64
        means, counts = _updated(points.cpu(), fitted.cpu(), indices.cpu())
        return means.to(points.device), counts.to(points.device)
    counts = torch.zeros(fitted.shape[:2], dtype=torch.int64, device=points.device).scatter_add_(1, indices, torch.ones_like(indices))
    sums = torch.zeros(fitted.shape, dtype=torch.int64, device=points.device)
    for group, sum_, index in zip(points, sums, indices, strict=True):
        sum_.index_add_(0, index, (group.double() * _FIXED_POINT).round().long())
    means = (sums.double() / _FIXED_POINT / counts.clamp_min(1).unsqueeze(2)).float()
    return torch.where(counts.unsqueeze(2) > 0, means, fitted), counts


def _repair_empty(fitted: Tensor, counts: Tensor) -> Tensor:
    """Put each empty code right beside one of the fullest, as FAISS does, so that the next assignment splits that cluster."""
    empty = counts == 0
    if not bool(empty.any()):
        return fitted
    fullest = counts.argsort(dim=1, descending=True, stable=True)
    rank_of_empty = (empty.cumsum(1) - 1).clamp_min(0)
    donors = fullest.gather(1, rank_of_empty)
    copies = fitted.gather(1, donors.unsqueeze(2).expand_as(fitted))
    signs = 1 - 2 * (torch.arange(fitted.shape[2], device=fitted.device) % 2).to(fitted)
    return torch.where(empty.unsqueeze(2), copies * (1 + signs / 1024) + signs * 1e-6, fitted)
