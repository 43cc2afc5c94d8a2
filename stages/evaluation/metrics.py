"""What is measured of each picture: PSNR, SSIM, LPIPS; and how much of the codebooks is used.

Shapes: B batch, S image side in pixels, T tokens per image (= codebooks), K codes per codebook. Images are uint8 (B,3,S,S) RGB, as a saved
picture would be: a metric on unrounded decoder output would flatter the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...models.quantizer import code_counts, perplexity, usage
from .inception import FEATURES
from .networks import Lpips, images_at_once

ROWS = ("original", "vae", "quantized", "rectified")
IMAGE_METRICS = ("psnr_db", "ssim", "lpips_alex", "lpips_vgg")
METRICS = ("rfid", "kid", "kid_standard_error", "lpips_alex", "lpips_vgg", "psnr_db", "ssim", "inception_score")
"""Of every row; `--features` adds more."""
# Under as many images as features the covariance is singular and the distance mostly measures the number of images.
MEANINGFUL_FID_IMAGES = FEATURES
_WINDOW_PX, _WINDOW_SIGMA = 11, 1.5


def to_uint8(images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [-1,1] -> uint8, rounded to the nearest level."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_signed(pixels: Tensor) -> Tensor:
    """Images (B,3,S,S) uint8 -> float32 in [-1,1]; `to_uint8` gives back the same bytes."""
    return pixels.float() / 127.5 - 1


def finite_or_none(value: float) -> float | None:
    """What metrics.json says of a value that was not measured, or is infinite."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def score_images(rows: Mapping[str, Tensor], reference: Tensor, lpips: Mapping[str, Lpips]) -> dict[str, dict[str, Tensor]]:
    """Every metric of every picture, against the reference: uint8 (B,3,S,S) by row -> (B,) float64 on the CPU by row and metric.

    Args:
        lpips: networks by name of their metric; NaN stands for a metric that has none. PSNR of equal pictures is infinite.
    """
    similarities = _similarities(rows, reference)
    scores = {row: {"psnr_db": psnr_db(images, reference), "ssim": similarities[row]} for row, images in rows.items()}
    for name in ("lpips_alex", "lpips_vgg"):
        network = lpips.get(name)
        nothing = torch.full((len(reference),), math.nan)
        distances = network.distances(list(rows.values()), reference) if network else [nothing] * len(rows)
        for row, values in zip(rows, distances, strict=True):
            scores[row][name] = values
    return {row: {name: values.double().cpu() for name, values in metrics.items()} for row, metrics in scores.items()}


def _similarities(rows: Mapping[str, Tensor], reference: Tensor) -> dict[str, Tensor]:
    """SSIM (B,) by row, a few images at once."""
    at_once = images_at_once(reference.device, reference.shape[-1])
    found: dict[str, list[Tensor]] = {row: [] for row in rows}
    for start in range(0, len(reference), at_once):
        # In flat and dark places SSIM's variances cancel: in float32 the mean over an image is off by 1e-5. MPS has no float64.
        theirs = reference[start : start + at_once].to(torch.float32 if reference.device.type == "mps" else torch.float64) / 255
        moments = _local_moments(theirs)
        for row, images in rows.items():
            ours = images[start : start + at_once].to(theirs) / 255
            found[row].append(_ssim(ours, theirs, _local_moments(ours), moments))
    return {row: torch.cat(values) for row, values in found.items()}


def psnr_db(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB over RGB: uint8 (B,3,S,S) twice -> (B,); infinite for equal pictures."""
    squares = (images.int() - reference.int()).square().sum((1, 2, 3))  # whole numbers: exact, whatever the batch and the device
    mean = squares.cpu().double() / reference[0].numel()
    return 10 * torch.log10(255.0**2 / mean)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images in [0,1], (B,3,S,S) twice -> (B,): torchmetrics' definition, border reflected.

    float64 in, float64 out.
    """
    return _ssim(images, reference, _local_moments(images), _local_moments(reference))


def _ssim(ours: Tensor, theirs: Tensor, our_moments: tuple[Tensor, Tensor], their_moments: tuple[Tensor, Tensor]) -> Tensor:
    (m1, v1), (m2, v2) = our_moments, their_moments
    covariance = _blur(ours * theirs) - m1 * m2
    small_mean, small_variance = 0.01**2, 0.03**2
    similarity = (2 * m1 * m2 + small_mean) * (2 * covariance + small_variance)
    similarity /= (m1.square() + m2.square() + small_mean) * (v1 + v2 + small_variance)
    return similarity.mean((1, 2, 3))


def _local_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance under the window around each pixel, (B,3,S,S) each."""
    mean = _blur(images)
    return mean, (_blur(images.square()) - mean.square()).clamp_min(0)


def _blur(images: Tensor) -> Tensor:
    """The Gaussian window along rows and columns, as two products with a band matrix: several times faster than a convolution on a CPU."""
    rows, columns = (_window(side, images.device, images.dtype) for side in images.shape[-2:])
    return rows @ images @ columns.T


@lru_cache(maxsize=4)
def _window(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(side,side): each row holds the window around one pixel, its part beyond the border reflected."""
    reach = _WINDOW_PX // 2
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = torch.exp(-((offsets / _WINDOW_SIGMA) ** 2) / 2)
    weights /= weights.sum()
    pixel = torch.arange(side).unsqueeze(1) + torch.arange(-reach, reach + 1)
    pixel = (side - 1) - ((side - 1) - pixel.abs()).abs()
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, pixel, weights.expand(side, -1)).to(device=device, dtype=dtype)


class CodebookUsage:
    """Counts how often each of the T x K codes is chosen."""

    def __init__(self, tokens: int, codes: int, device: torch.device) -> None:
        self.counts = torch.zeros(tokens, codes, dtype=torch.int32, device=device)

    def update(self, indices: Tensor) -> None:
        """Add the indices (B,T) of one batch."""
        self.counts += code_counts(indices, self.counts.shape[1]).int()

    def each(self) -> dict[str, list[float]]:
        """Share of the codes used at least once, and perplexity, of every codebook."""
        counts = self.counts.cpu().unsqueeze(1)  # one codebook at a time: the float64 of all is twice the size of the counts
        return {
            "usage": torch.cat([usage(codebook) for codebook in counts]).tolist(),
            "perplexity": torch.cat([perplexity(codebook) for codebook in counts]).tolist(),
        }

    def compute(self) -> dict[str, Any]:
        """`each`, as smallest, median and largest over the T codebooks."""
        return {name: spread(values) for name, values in self.each().items()}


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return {"min": float(ordered.min()), "median": float(ordered.quantile(0.5)), "max": float(ordered.max())}
