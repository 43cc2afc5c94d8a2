"""The metrics of an evaluation: rFID, PSNR, SSIM, LPIPS-Alex through torchmetrics, and how much of the codebooks is used.

Shapes: B batch, S image side in pixels, T tokens per image (= codebooks), K codes per codebook. Images are uint8 (B,3,S,S) RGB, as a saved
picture would be: a metric on unrounded decoder output would flatter the tokenizer.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from ..errors import ConfigError
from ..models.quantizer import perplexity, usage

ROWS = ("original", "vae", "quantized", "rectified")
METRICS = ("rfid", "psnr_db", "ssim", "lpips_alex")
FEATURES = 2048
# Under as many images as features the covariance is singular and the distance mostly measures the number of images.
MEANINGFUL_FID_IMAGES = FEATURES
# AlexNet's last pooling needs at least this side.
LPIPS_SMALLEST_SIDE = 32


def to_uint8(images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [-1,1] -> uint8, rounded to the nearest level."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_signed(pixels: Tensor) -> Tensor:
    """Images (B,3,S,S) uint8 -> float32 in [-1,1]; `to_uint8` gives back the same bytes."""
    return pixels.float() / 127.5 - 1


class _ReadyFeatures(nn.Identity):
    """Lets FrechetInceptionDistance take features instead of images, so that Inception sees every image set once, not once per row."""

    num_features = FEATURES


class RowMetrics:
    """Accumulates the metrics of every row in one pass; memory does not grow with the number of images.

    Inception runs once on each image set: the features of the originals are the reference of all rows.
    """

    def __init__(self, *, inception: nn.Module | None, lpips: nn.Module | None, device: torch.device, rows: tuple[str, ...] = ROWS) -> None:
        """Start empty. `rows[0]` names the reference: the originals.

        Args:
            inception: from `load_inception`; None leaves rFID out.
            lpips: from `load_lpips`; None leaves LPIPS out.
        """
        self.inception = inception
        self.lpips = lpips
        self.device = device
        self.images = 0
        self._sums: dict[str, dict[str, float]] = {row: dict.fromkeys(("psnr_db", "ssim", "lpips_alex"), 0.0) for row in rows}
        # Moments are float64, which Apple's MPS does not have.
        self._moments_device = torch.device("cpu") if device.type == "mps" else device
        self._frechet: dict[str, FrechetInceptionDistance] = {}
        if inception is not None:
            self._frechet = {row: FrechetInceptionDistance(feature=_ReadyFeatures()).to(self._moments_device) for row in rows}

    @torch.no_grad()
    def update(self, images: Mapping[str, Tensor]) -> dict[str, dict[str, list[float]]]:
        """Add one batch: for each row, uint8 images (B,3,S,S) in the same order. Returns the score of each image by row and metric."""
        reference = next(iter(images.values()))
        scores: dict[str, dict[str, list[float]]] = {}
        for row, pictures in images.items():
            scores[row] = {name: values.double().tolist() for name, values in image_scores(pictures, reference, self.lpips).items()}
            for name, values in scores[row].items():
                self._sums[row][name] += sum(values)
            if self.inception is not None:
                with _full_float32(self.device):
                    features = self.inception(pictures).to(self._moments_device).double()
                self._frechet[row].update(features, real=False)
        self.images += len(reference)
        return scores

    def compute(self) -> dict[str, dict[str, float | None]]:
        """The metrics of every row; None for one that was left out, that needs more images, or that is infinite (PSNR of equal images)."""
        values: dict[str, dict[str, float | None]] = {}
        for row, sums in self._sums.items():
            means: dict[str, float | None] = {name: _finite_or_none(total / max(self.images, 1)) for name, total in sums.items()}
            means["lpips_alex"] = None if self.lpips is None else means["lpips_alex"]
            values[row] = {"rfid": self._frechet_distance(row), **means}
        return values

    def _frechet_distance(self, row: str) -> float | None:
        if not self._frechet or self.images < 2:
            return None
        metric, reference = self._frechet[row], next(iter(self._frechet.values()))
        metric.real_features_sum = reference.fake_features_sum.to(metric.device)
        metric.real_features_cov_sum = reference.fake_features_cov_sum.to(metric.device)
        metric.real_features_num_samples = reference.fake_features_num_samples.to(metric.device)
        # The eigenvalues of a general matrix need a library that not every CUDA build of torch has.
        return float(metric.cpu().compute())


def image_scores(images: Tensor, reference: Tensor, lpips: nn.Module | None) -> dict[str, Tensor]:
    """PSNR (dB) and SSIM over RGB in [0,1] and LPIPS-Alex of each image: uint8 (B,3,S,S) twice -> (B,) by metric.

    PSNR of equal images is infinite. "lpips_alex" is left out where `lpips` is None.
    """
    ours, theirs = images.float() / 255, reference.float() / 255
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    with _full_float32(images.device):
        ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
        assert isinstance(ssim, Tensor)
        scores = {"psnr_db": psnr.reshape(-1), "ssim": ssim.reshape(-1)}
        if lpips is not None:
            scores["lpips_alex"] = lpips(ours, theirs, normalize=True).reshape(-1)
    return scores


class CodebookUsage:
    """Counts how often each of the T x K codes is chosen."""

    def __init__(self, tokens: int, codes: int, device: torch.device) -> None:
        self.counts = torch.zeros(tokens, codes, dtype=torch.int32, device=device)

    def update(self, indices: Tensor) -> None:
        """Add the indices (B,T) of one batch."""
        codes = indices.T.contiguous()
        self.counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.int32))

    def compute(self) -> dict[str, Any]:
        """Share of the codes used at least once, and perplexity, of each codebook: smallest, median and largest over the T codebooks."""
        counts = self.counts.cpu().unsqueeze(1)  # one codebook at a time: the float64 of all is twice the size of the counts
        return {
            "usage": _spread(torch.cat([usage(codebook) for codebook in counts])),
            "perplexity": _spread(torch.cat([perplexity(codebook) for codebook in counts])),
        }


def _spread(values: Tensor) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.quantile(0.5)), "max": float(values.max())}


def load_inception(path: Path, device: torch.device) -> nn.Module:
    """torch-fidelity's Inception (TensorFlow-1 resize to 299 px, 2048 pooled features): uint8 (B,3,S,S) -> (B,2048) float32.

    Raises:
        ConfigError: the file cannot be read or holds another network's weights.
    """
    _read_weights(path, "Inception")
    try:
        return NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], str(path), antialias=False).to(device)
    except RuntimeError as error:
        raise ConfigError(
            f"{path} does not fit torch-fidelity's Inception network ({_one_line(error)}); it must be weights-inception-2015-12-05-6726825d.pth"
        ) from error


def load_lpips(path: Path, device: torch.device) -> nn.Module:
    """torchmetrics' LPIPS-Alex: images (B,3,S,S) in [0,1] twice, `normalize=True` -> (B,1,1,1).

    Args:
        path: AlexNet's weights in the torch hub cache, from where torchvision reads them.

    Raises:
        ConfigError: the file cannot be read or holds another network's weights.
    """
    _read_weights(path, "AlexNet")
    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
    except RuntimeError as error:
        raise ConfigError(
            f"{path} does not fit torchvision's AlexNet ({_one_line(error)}); replace it by the published alexnet-owt-7be5be79.pth"
        ) from error


def _read_weights(path: Path, title: str) -> None:
    """Check that `path` is a checkpoint of tensors alone, before a library unpickles it without that restriction."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"the {title} weights in {path} cannot be read ({_one_line(error)}); delete the file, so that it is fetched anew"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path} holds no {title} weights but a {type(state).__name__}; give the published checkpoint")


@contextmanager
def _full_float32(device: torch.device) -> Iterator[None]:
    """Convolutions in full float32: cuDNN takes TF32 by default, so that the same pictures would score differently on another device."""
    if device.type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
