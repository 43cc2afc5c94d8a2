"""Exact nearest code, for T independent codebooks at once.

Shapes: T tokens (codebooks), N points for each, D dims, K codes per codebook.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CodebookError, ConfigError, MismatchError, one_line

if TYPE_CHECKING:
    from .box_search import BoxSearch

_FUSED_MAX_DIMS = 8  # more would not fit a GPU thread's registers
_THREAD_NS = 1_000_000  # work that a thread is started for, which takes 0.1 ms
_BLOCK_VALUES = 1 << 22  # distances held at once by the blocked product: 16 MiB in float32


def nearest_codes(coordinates: Tensor, codebooks: Tensor) -> Tensor:
    """The index of each point's nearest code by Euclidean distance; of equally near codes, the lowest index.

    Args:
        coordinates: (T,N,D) float32.
        codebooks: (T,K,D) float32 on the same device.

    Returns:
        (T,N) int64, in [0,K) even for a point that is not finite, whose index says nothing.

    Raises:
        CodebookError: the codebooks are not (T,K,D), or hold no code.
        MismatchError: the coordinates are not (T,N,D) of the same T and D.
    """
    _check_codebooks(codebooks)
    points = coordinates.shape[1] if coordinates.ndim == 3 else 0
    return NearestCodes(codebooks, _pick_backend(codebooks.device, codebooks.shape[1], codebooks.shape[2], points)).query(coordinates)


class NearestCodes:
    """A search structure over fixed codebooks; every backend finds the same codes, up to the rounding of equally near ones.

    - "boxes": compiled loops over small boxes of codes (box_search.py), on torch's number of threads. The fastest on a CPU for many codes of few
      dims. Keep this object while the codebooks stay the same, and `move` it when they change a bit: the boxes need not be cut again.
    - "scan": compiled loops over all codes, likewise. The fastest on a CPU for few codes, few points, or many dims.
    - "product": blocks of a matrix product; anywhere, any D.
    - "fused": one GPU kernel (Triton) that keeps each point's minimum in registers and writes no distances to memory.
    """

    def __init__(self, codebooks: Tensor, backend: str = "auto") -> None:
        """Prepare the search.

        Args:
            codebooks: (T,K,D) float32, finite; copied into boxes, or referred to.
            backend: "boxes", "scan", "product", "fused", or "auto" (by device, K and D).

        Raises:
            ConfigError: the backend asked for needs a package that is not installed.
            CodebookError: the codebooks are not (T,K,D), or hold no code.
        """
        _check_codebooks(codebooks)
        self.codebooks = codebooks.detach()
        self.backend = _pick_backend(codebooks.device, codebooks.shape[1], codebooks.shape[2]) if backend == "auto" else backend
        if self.backend == "fused" and not _has("triton"):
            raise ConfigError("the fused search needs Triton, which PyTorch's CUDA builds bring; use the backend product")
        if self.backend in ("boxes", "scan") and not _has("numba"):
            raise ConfigError(f"the backend {self.backend} needs Numba; install it, or use the backend product")
        self._boxes: BoxSearch | None = None
        if self.backend == "boxes":
            from .box_search import BoxSearch

            self._boxes = BoxSearch(_array(self.codebooks), _in_threads)

    def move(self, codebooks: Tensor) -> None:
        """Search these codebooks (T,K,D) from now on, of the same shape as before: cheaper than a new object where codes moved a little.

        Raises:
            MismatchError: they are of another shape.
        """
        if codebooks.shape != self.codebooks.shape:
            raise MismatchError(f"moved codebooks must keep their shape {tuple(self.codebooks.shape)}, not be {tuple(codebooks.shape)}; search anew")
        self.codebooks = codebooks.detach()
        if self._boxes is not None:
            self._boxes.move(_array(self.codebooks))

    @torch.no_grad()
    def query(self, coordinates: Tensor) -> Tensor:
        """coordinates (T,N,D) -> indices (T,N) int64 in [0,K), on the coordinates' device; that of a point that is not finite says nothing.

        Raises:
            MismatchError: T or D is not that of the codebooks.
        """
        tokens, _, dims = self.codebooks.shape
        if coordinates.ndim != 3 or (coordinates.shape[0], coordinates.shape[2]) != (tokens, dims):
            raise MismatchError(f"codebooks {tuple(self.codebooks.shape)} need coordinates ({tokens},N,{dims}), not {tuple(coordinates.shape)}")
        if coordinates.shape[1] == 0:
            return torch.empty(coordinates.shape[:2], dtype=torch.int64, device=coordinates.device)
        if self._boxes is not None:
            return torch.from_numpy(self._boxes.query(_array(coordinates))).to(coordinates.device)
        if self.backend == "scan":
            from .box_search import scan

            return torch.from_numpy(scan(_array(coordinates), _array(self.codebooks), _in_threads)).to(coordinates.device)
        if self.backend == "fused":
            from .fused_nearest import fused_nearest

            return fused_nearest(coordinates.float(), self.codebooks.float())
        return _nearest_by_product(coordinates.float(), self.codebooks.float())


def search_note(device: torch.device, dims: int) -> str:
    """Why codes of that many dims are not searched by the fused kernel on this GPU; "" where they are, and where it is not meant for them."""
    fault = _fused_fault(device, dims) if _is_for_fused(device, dims) else ""
    return f"the fused search of nearest codes is not to be had here ({fault}); going on with matrix products, somewhat slower" if fault else ""


def _check_codebooks(codebooks: Tensor) -> None:
    if codebooks.ndim != 3 or 0 in codebooks.shape:
        raise CodebookError(f"codebooks must be of shape (T,K,D) with at least one code each, not {tuple(codebooks.shape)}")


def _pick_backend(device: torch.device, codes: int, dims: int, points: int | None = None) -> str:
    """The fastest backend for N points and no more; without a number of points, for ever more of them."""
    if _is_for_fused(device, dims) and not _fused_fault(device, dims):
        return "fused"
    if device.type != "cpu" or not _has("numba"):
        return "product"
    # Where `benchmarks/bench_codebooks.py --part once` finds boxes faster, on points and codes without structure, which are the worst for boxes.
    return "boxes" if dims <= 12 and codes >= max(512, 256 * dims) and (points is None or points >= 128) else "scan"


def _is_for_fused(device: torch.device, dims: int) -> bool:
    return device.type == "cuda" and dims <= _FUSED_MAX_DIMS


@cache
def _fused_fault(device: torch.device, dims: int) -> str:
    """What one small search by the kernel fails with, "" where it works. That Triton is installed is not enough: its launcher needs a C compiler."""
    try:
        from .fused_nearest import fused_nearest

        point = torch.zeros(1, 1, dims, device=device)
        fused_nearest(point, point)
    except Exception as error:  # Python's, Triton's, the C compiler's and the driver's
        return f"{type(error).__name__}: {one_line(error)}"
    return ""


@cache
def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _array(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()


def _in_threads(work: Callable[[int, int], object], count: int, cost: int) -> None:
    """`work(first, stop)` on small runs of the `count` things to do, from this thread and as many more of torch's number as the cost (ns) pays for;
    compiled loops do not hold the interpreter. Who takes which run is a matter of luck, so that a busy core delays no one."""
    threads = min(torch.get_num_threads(), count, 1 + cost // _THREAD_NS)
    pieces = 1 if threads == 1 else min(count, 8 * threads)
    cuts = [count * piece // pieces for piece in range(pieces + 1)]
    runs = iter(list(pairwise(cuts)))

    def take() -> None:
        for first, stop in runs:
            work(first, stop)

    if threads == 1:
        take()
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="revq-nearest") as pool:
        others = [pool.submit(take) for _ in range(threads - 1)]
        take()
        for other in others:
            other.result()


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
