"""The tolerance curve: how much noise on its latents does this decoder forgive? The premise of Quantize-then-Rectify, measured.

Gaussian noise of growing strength is added to the latents of a few images and decoded. *Isotropic* noise is white in the standardised latent.
Noise in the *decoder's metric* is white in the coordinates, where a squared error is the squared change of the picture to first order: the
whole of E[J^T J], of what the positions do one by one and jointly. The tokenizer's own quantized and rectified latents are measured on the
same images: above the curve, its error hurts less than noise of the same size, and below it more.

The noise of an image depends on (seed, its position in the source, strength), not on batches or ranks.

Shapes: N images, B batch, V variants, M metrics, C,H,W latent channels, rows, columns, T tokens, D dims per token, F features.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.tokenizer import ReVQTokenizer
from .. import ranks
from ..events import Advance, Begin, Event
from .frechet import frechet_distance, gaussian_of
from .instruments import Instruments
from .loader import Batch, Loader
from .metrics import finite_or_none, score_images
from .reconstruct import decode_to_uint8, reconstruct

LEVELS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
"""Root mean square of the noise, in deviations of the latent."""
MOST_IMAGES = 128
CURVE_METRICS = ("rfid", "psnr_db", "ssim", "lpips_alex")
_IMAGE_METRICS = CURVE_METRICS[1:]
_ROWS = ("vae", "quantized", "rectified")
_MARKS = ("quantized", "rectified")
_ERRORS = {"isotropic": "latent_mse", "decoder": "decoder_mse"}
"""By kind of noise, how the size of the tokenizer's own error is measured."""


@dataclass
class _Measured:
    """What was found on every image, a tensor for each batch."""

    index: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    """(B,V,M) float64 of the variants by `_IMAGE_METRICS`."""
    errors: list[Tensor] = field(default_factory=list)
    """(B,2,2) float64 mean squared errors of `_MARKS` by `_ERRORS`."""
    features: list[Tensor] = field(default_factory=list)
    """(B,V+1,F) of the variants, then of the original."""


def affordable_images(tokenizer: ReVQTokenizer, images: int) -> int:
    """How many images the curve takes where nobody says: at most 128, and so few that it costs no more than the rows of `images` did.

    It decodes fewer pictures than they, and takes Inception features of no more, even where those of the originals came from the cache. Counted, not
    timed: the same evaluation must give the same numbers.
    """
    rows = 2 if tokenizer.rectifier is None else 3
    return min(MOST_IMAGES, max(1, images * rows // (len(_ROWS) + len(_strengths(tokenizer)) + 1)))


def measure_tolerance(
    tokenizer: ReVQTokenizer, loader: Loader, positions: Sequence[int], instruments: Instruments, *, seed: int, **way: Any
) -> Generator[Event, None, dict[str, Any]]:
    """Both curves and the tokenizer's own points over the images at `positions`, which can all be read; see the top of this file.

    Args:
        way: how images become tokens and pictures, as for `reconstruct`.

    Returns:
        {"images", "levels", "isotropic": [{"noise", metrics...} by level, 0 first], "decoder": the same or None,
        "marks": {"quantized", "rectified"}}.
    """
    strengths = _strengths(tokenizer)
    found = _Measured()
    share = {"rank": ranks.rank(), "ranks": ranks.world_size()}
    yield Begin(task=ranks.task_of_share("tolerance"), total=loader.share(len(positions), **share), unit="images")
    done = 0
    for batch in loader.batches(positions, **share):
        if batch.crops:
            keys = [loader.source.items[crop.index].key for crop in batch.crops]
            _measure_batch(tokenizer, batch, instruments, found, strengths, keys=keys, seed=seed, **way)
        done += len(batch.crops) + len(batch.failed)
        yield Advance(done=done)
    return _tables(_merge(found), strengths)


def _strengths(tokenizer: ReVQTokenizer) -> dict[str, tuple[str, float]]:
    """Every noisy variant: name -> (kind, level). The decoder's metric only where the transform has one."""
    kinds = ("isotropic", "decoder") if has_decoder_metric(tokenizer) else ("isotropic",)
    return {f"{kind} {level}": (kind, level) for kind in kinds for level in LEVELS}


def has_decoder_metric(tokenizer: ReVQTokenizer) -> bool:
    """Whether coordinates weigh errors by how much they move the picture: where the way to them is no rotation."""
    scale, inverse_axes = tokenizer.transform.scale, tokenizer.transform.inverse_axes
    return inverse_axes is not None or bool((scale != scale.flatten()[0]).any())


@torch.no_grad()
def _measure_batch(
    tokenizer: ReVQTokenizer,
    batch: Batch,
    instruments: Instruments,
    found: _Measured,
    strengths: Mapping[str, tuple[str, float]],
    *,
    keys: Sequence[str],
    seed: int,
    bf16: bool,
    **way: Any,
) -> None:
    """Add one batch."""
    pixels = batch.pixels().to(tokenizer.device)
    index = [crop.index for crop in batch.crops]
    done = reconstruct(tokenizer, pixels, keys, bf16=bf16, **way)
    noise = _noise(tokenizer, index, seed)
    pictures = {row: done.rows[row] for row in _ROWS}
    for name, (kind, level) in strengths.items():
        pictures[name] = decode_to_uint8(tokenizer, done.latents + level * noise[kind], bf16=bf16)
    scores = score_images(pictures, pixels, instruments.lpips)
    found.index += index
    found.scores.append(torch.stack([torch.stack([scores[name][metric] for metric in _IMAGE_METRICS], 1) for name in pictures], 1))
    found.errors.append(torch.stack([torch.stack([done.latent_errors[row][name] for name in _ERRORS.values()], 1) for row in _MARKS], 1))
    if instruments.inception:
        found.features.append(torch.stack([instruments.inception.features(images).cpu() for images in (*pictures.values(), pixels)], 1))


def _noise(tokenizer: ReVQTokenizer, index: Sequence[int], seed: int) -> dict[str, Tensor]:
    """By kind, noise of size 1 on the raw latents (B,C,H,W): each image's own, and the same direction at every strength."""
    transform, shape = tokenizer.transform, tokenizer.latent_shape
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in index]
    normal = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(tokenizer.device)
    coordinates = normal.flatten(1).unflatten(1, (tokenizer.tokens, tokenizer.dims))
    return {"isotropic": normal * transform.std, "decoder": transform.from_coordinates(coordinates) * transform.std}


def _merge(found: _Measured) -> _Measured:
    """What all ranks found, by position in the source."""
    parts = ranks.gather(found)
    order = [i for part in parts for i in part.index]
    ranking = sorted(range(len(order)), key=order.__getitem__)
    columns = ([tensor for part in parts for tensor in getattr(part, name)] for name in ("scores", "errors", "features"))
    scores, errors, features = ([torch.cat(tensors)[ranking]] if tensors else [] for tensors in columns)
    return _Measured([order[i] for i in ranking], scores, errors, features)


def _tables(found: _Measured, strengths: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    """The result of `measure_tolerance`: means over the images, None for what is infinite or was not measured."""
    names = (*_ROWS, *strengths)
    means = found.scores[0].mean(0).tolist()
    values = {name: dict(zip(_IMAGE_METRICS, map(finite_or_none, means[at]), strict=True)) for at, name in enumerate(names)}
    rfid = dict.fromkeys(names) if not found.features or len(found.index) < 2 else _distances(found.features[0], names)

    def point(name: str, noise: Any) -> dict[str, Any]:
        return {"noise": noise, "rfid": rfid[name], **values[name]}

    def curve(kind: str) -> list[dict[str, Any]] | None:
        points = [point(name, level) for name, (named, level) in strengths.items() if named == kind]
        return [point("vae", 0.0), *points] if points else None

    sizes = found.errors[0].mean(0).sqrt().tolist()
    marks = {row: point(row, dict(zip(_ERRORS, sizes[at], strict=True))) for at, row in enumerate(_MARKS)}
    return {"images": len(found.index), "levels": list(LEVELS), "isotropic": curve("isotropic"), "decoder": curve("decoder"), "marks": marks}


def _distances(features: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Frechet distance of every variant from the originals, of features (N,V+1,F)."""
    reference = gaussian_of(features[:, -1])
    return {name: frechet_distance(gaussian_of(features[:, at]), reference) for at, name in enumerate(names)}
