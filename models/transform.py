"""Invertible affine maps from latents to the coordinates that are quantized.

Shapes: B batch, C,H,W latent channels, rows, columns, P = C*H*W, T tokens per image, D = P/T dims per token.
The axes are one dense matrix up to P = 4096; above, one for each of G spatial blocks of Q = P/G positions, and T/G tokens belong to each block.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import CodebookError
from .device import exact_products

MAX_DENSE_POSITIONS = 4096
_SMALLEST_SCALE = 1e-2
# In the metric of mean diagonal 1, what any direction counts at least: one that the decoder ignores must still be decoded from its code, and the
# stationary part of a metric from samples may have eigenvalues a little below zero.
_SMALLEST_METRIC = 1e-2


class LatentTransform(nn.Module):
    """coordinates = axes @ (scale * (latent - mean) / std), cut into T runs of D.

    Quantization error is made in coordinates. Three kinds share this one form (design section 5):
    - `standardize` (the paper's): no axes, scale 1.
    - `pca`: orthogonal axes that decorrelate, dealt out so that every token needs the same number of bits.
    - `decoder`: the same in the decoder's metric. A squared error of coordinates is the squared change of the picture, to first order and a factor:
      scale is how much each position moves it, and the axes undo what the positions do jointly. They are not orthogonal, so their inverse is kept.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    axes: Tensor | None
    inverse_axes: Tensor | None

    def __init__(
        self,
        *,
        mean: Tensor,
        std: Tensor,
        tokens: int,
        scale: Tensor | None = None,
        axes: Tensor | None = None,
        inverse_axes: Tensor | None = None,
    ) -> None:
        """Build the map from its parts.

        Args:
            mean: (C,H,W) over the train split.
            std: (C,H,W), above zero everywhere.
            tokens: T; divides P.
            scale: (C,H,W), above zero; None means ones.
            axes: (P,P), its rows in the order of the coordinates, or (G,Q,Q), one for each spatial block; None means the identity.
            inverse_axes: the inverse of each; None means that the axes are orthogonal.

        Raises:
            CodebookError: P is not divisible by T, or no spatial blocks suit it (see `spatial_block`).
        """
        super().__init__()
        positions = mean.numel()
        if tokens < 1 or positions % tokens:
            shape = "x".join(map(str, mean.shape))
            near = _divisors(positions, tokens)
            raise CodebookError(f"latents of shape {shape} have {positions} positions, which {tokens} tokens do not divide; nearest that do: {near}")
        self.tokens = tokens
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.register_buffer("scale", torch.ones_like(self.mean) if scale is None else scale.float())
        self.register_buffer("axes", None if axes is None else axes.float())
        self.register_buffer("inverse_axes", None if inverse_axes is None else inverse_axes.float())
        self.block = None if axes is None else spatial_block(tuple(mean.shape), tokens)  # type: ignore[arg-type]

    def standardize(self, latents: Tensor) -> Tensor:
        """(B,C,H,W) raw -> (B,C,H,W) with mean 0 and deviation 1 at each position over the train split."""
        return (latents - self.mean) / self.std

    def unstandardize(self, standardised: Tensor) -> Tensor:
        """The inverse of `standardize`."""
        return standardised * self.std + self.mean

    def to_coordinates(self, standardised: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Standardised latents (B,C,H,W) -> coordinates (B,T,D), or (B,last-first,D) of those tokens alone; `last` None means T.

        Its products are float32's own, also under autocast, as are those of the way back.
        """
        last = self.tokens if last is None else last
        dims = self.mean.numel() // self.tokens
        scaled = standardised * self.scale
        if self.axes is None:
            return scaled.flatten(1)[:, first * dims : last * dims].unflatten(1, (last - first, dims))
        assert self.block is not None
        blocks, axes = cut_into_blocks(scaled, self.block), _by_block(self.axes)
        each = self.tokens // len(axes)
        parts = []
        with exact_products(axes.device):
            for block in range(first // each, math.ceil(last / each)):
                rows = slice(max(0, first - block * each) * dims, min(each, last - block * each) * dims)
                parts.append(blocks[:, block] @ axes[block, rows].T)
        return torch.cat(parts, 1).unflatten(1, (last - first, dims))

    def from_coordinates(self, coordinates: Tensor) -> Tensor:
        """Coordinates (B,T,D) -> standardised latents (B,C,H,W)."""
        if self.axes is None:
            return coordinates.flatten(1).unflatten(1, self.mean.shape) / self.scale
        assert self.block is not None
        back = _by_block(self.axes).mT if self.inverse_axes is None else _by_block(self.inverse_axes)
        flat = coordinates.flatten(1).unflatten(1, back.shape[:2])
        with exact_products(back.device):
            blocks = torch.stack([flat[:, block] @ matrix.T for block, matrix in enumerate(back)], 1)
        return join_blocks(blocks, self.block, self.mean.shape) / self.scale

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents (B,C,H,W) -> coordinates (B,T,D)."""
        return self.to_coordinates(self.standardize(latents))

    def inverse(self, coordinates: Tensor) -> Tensor:
        """Coordinates (B,T,D) -> raw latents (B,C,H,W)."""
        return self.unstandardize(self.from_coordinates(coordinates))


def spatial_block(shape: tuple[int, int, int], tokens: int) -> tuple[int, int]:
    """(rows, columns) of the blocks that a latent of `shape` (C,H,W) is cut into for its rotations: the largest of at most 4096 positions which
    cover it evenly and get the same number of tokens each, square rather than long; the whole latent where that is small enough.

    Raises:
        CodebookError: no block fits.
    """
    channels, height, width = shape
    fitting = [
        (rows, columns)
        for rows in _all_divisors(height)
        for columns in _all_divisors(width)
        if channels * rows * columns <= MAX_DENSE_POSITIONS and tokens % ((height // rows) * (width // columns)) == 0
    ]
    if not fitting:
        limit = f"blocks of at most {MAX_DENSE_POSITIONS} positions which share {tokens} tokens evenly"
        raise CodebookError(
            f"latents of shape {'x'.join(map(str, shape))} cannot be cut into {limit}; use --transform standardize, or other --tokens"
        )
    return max(fitting, key=lambda block: (block[0] * block[1], -abs(block[0] - block[1])))


def cut_into_blocks(latents: Tensor, block: tuple[int, int]) -> Tensor:
    """(B,C,H,W) and (rows, columns) of a block -> (B,G,Q)."""
    (count, channels, height, width), (rows, columns) = latents.shape, block
    grid = latents.reshape(count, channels, height // rows, rows, width // columns, columns)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, (height // rows) * (width // columns), channels * rows * columns)


def join_blocks(blocks: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """(B,G,Q) -> (B,C,H,W) of `shape` (C,H,W); the inverse of `cut_into_blocks`."""
    (channels, height, width), (rows, columns) = shape, block
    grid = blocks.reshape(len(blocks), height // rows, width // columns, channels, rows, columns)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(blocks), channels, height, width)


def _by_block(matrices: Tensor) -> Tensor:
    """(G,Q,Q), of a matrix or of several."""
    return matrices if matrices.ndim == 3 else matrices.unsqueeze(0)


def blank_transform(shape: tuple[int, int, int], tokens: int, kind: str) -> LatentTransform:
    """A transform of that kind for latents (C,H,W), with tensors of the right shapes to load values into."""
    axes = None
    if kind != "standardize":
        rows, columns = spatial_block(shape, tokens)
        positions = shape[0] * rows * columns
        blocks = math.prod(shape) // positions
        axes = torch.zeros(positions, positions) if blocks == 1 else torch.zeros(blocks, positions, positions)
    inverse = torch.zeros_like(axes) if axes is not None and kind == "decoder" else None
    return LatentTransform(mean=torch.zeros(shape), std=torch.ones(shape), tokens=tokens, axes=axes, inverse_axes=inverse)


def standard_deviation(variance: Tensor) -> Tensor:
    """(C,H,W) deviations; 1 at positions that never vary, so that they stay exactly zero instead of dividing by zero."""
    varies = variance > 1e-12 * variance.max().clamp_min(1e-30)
    return torch.where(varies, variance.clamp_min(0).sqrt(), torch.ones_like(variance))


class Covariance:
    """Covariance of latents that come in batches, shrunk toward its own stationary part as far as few samples ask.

    With fewer latents than positions a sample covariance knows nothing outside their span, and axes fitted to it lose unseen latents.
    Pictures are nearly stationary, so the target averages over all pairs of positions with the same channels and offset. The
    intensity is that of Ledoit and Wolf (2004), with this target in place of theirs.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        """Start with no latents of `shape` (C,H,W)."""
        # float64 sums of float32 products; MPS has no float64, so there they live on the CPU.
        place = "cpu" if torch.device(device).type == "mps" else device
        self.shape = shape
        self.products = torch.zeros(math.prod(shape), math.prod(shape), dtype=torch.float64, device=place)
        self.fourth_moment = 0.0
        self.count = 0

    def add(self, latents: Tensor) -> None:
        """Take in (B,C,H,W) latents of mean zero."""
        vectors = latents.flatten(1)
        self.products += (vectors.T @ vectors).to(self.products)
        self.fourth_moment += float(vectors.to(self.products).square().sum(1).square().sum())
        self.count += len(vectors)

    def shrunk(self) -> Tensor:
        """(P,P) float64, symmetric."""
        sample = self.products / self.count
        target = stationary_part(sample, self.shape)
        distance = float((sample - target).square().sum())
        noise = (self.fourth_moment / self.count - float(sample.square().sum())) / self.count
        shrinkage = min(1.0, max(0.0, noise / distance)) if distance > 0 else 1.0
        return (1 - shrinkage) * sample + shrinkage * target


def stationary_part(covariance: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(P,P) -> (P,P): every entry replaced by the mean over entries of the same two channels and the same offset in rows and columns."""
    _, height, width = shape
    source = covariance.reshape(*shape, *shape)
    result = torch.empty_like(source)
    for dy in range(-height + 1, height):
        for dx in range(-width + 1, width):
            rows = torch.arange(max(0, -dy), min(height, height - dy))
            columns = torch.arange(max(0, -dx), min(width, width - dx))
            y, x = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
            result[:, y, x, :, y + dy, x + dx] = source[:, y, x, :, y + dy, x + dx].mean(0)
    return result.reshape(covariance.shape)


def fit_axes(covariance: Tensor, tokens: int, bits: float, metric: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The axes of a block and their inverse, (Q,Q) float32 each: principal axes in the metric, dealt out to T tokens that need equally many bits.

    Args:
        covariance: (Q,Q) of what the axes will be applied to; may be singular.
        tokens: T, how many tokens share the axes.
        bits: of all those tokens together, T*log2(K).
        metric: (Q,Q), diagonal about 1, positive semidefinite or nearly: an error e costs e^T metric e. None means the identity; then the axes are
            orthogonal, and their inverse is None.
    """
    if metric is not None:
        weights, directions = torch.linalg.eigh(metric)
        root = directions * weights.clamp_min(_SMALLEST_METRIC).sqrt()  # root @ root.T is the metric
        covariance = root.T @ covariance @ root
    values, vectors = torch.linalg.eigh(covariance)
    order = torch.tensor(allocate_axes(values.tolist(), tokens, bits), device=vectors.device)
    rotation = vectors.T[order]
    if metric is None:
        return rotation.float().contiguous(), None
    # The inverse of rotation @ root.T: the columns of root are orthogonal.
    inverse = root / root.square().sum(0) @ rotation.T
    return (rotation @ root.T).float().contiguous(), inverse.float().contiguous()


def allocate_axes(variances: Iterable[float], tokens: int, bits: float) -> list[int]:
    """The order in which to take axes so that each run of D = P/T needs nearly the same number of bits.

    The eigenvalue allocation of OPQ (Ge et al. 2013) gives every run the same product of variances, and so counts an axis that is too small to be
    worth a bit for less than nothing. Here an axis counts for the bits that reverse water-filling gives it, max(0, log2(variance/level)/2).
    From the largest variance down, each axis goes to the token that needs the fewest bits so far and still has room.
    """
    variances = list(variances)
    room = len(variances) // tokens
    level = water_level(variances, bits)
    needs = [max(0.0, math.log2(value) - level) / 2 if value > 0 else 0.0 for value in variances]
    runs: list[list[int]] = [[] for _ in range(tokens)]
    heap = [(0.0, token) for token in range(tokens)]
    for axis in sorted(range(len(variances)), key=lambda axis: -variances[axis]):
        total, token = heapq.heappop(heap)
        runs[token].append(axis)
        if len(runs[token]) < room:
            heapq.heappush(heap, (total + needs[axis], token))
    return [axis for run in runs for axis in run]


def water_level(variances: Iterable[float], bits: float) -> float:
    """log2 of the error per axis at which independent Gaussian axes take `bits` in all, the sum of max(0, log2(variance) - level)/2."""
    logs = sorted((math.log2(value) for value in variances if value > 0), reverse=True)
    total = level = 0.0
    for count, value in enumerate(logs, 1):
        total += value
        level = (total - 2 * bits) / count
        if count == len(logs) or level >= logs[count]:
            break
    return level


def scale_from_sensitivity(sensitivity: Tensor) -> Tensor:
    """(C,H,W) squared sensitivities -> (C,H,W) scales sqrt(h) of mean square 1, floored so that the map stays invertible.

    Raises:
        CodebookError: the decoder does not react to any position.
    """
    level = sensitivity.mean()
    if not bool(torch.isfinite(sensitivity).all()) or float(level) <= 0:
        raise CodebookError("the decoder's gradient is zero or not finite at every latent position; use --transform pca")
    return (sensitivity / level).sqrt().clamp_min(_SMALLEST_SCALE)


def _all_divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


def _divisors(positions: int, tokens: int) -> str:
    return ", ".join(map(str, sorted(sorted(_all_divisors(positions), key=lambda value: abs(math.log(value / max(tokens, 1))))[:4])))
