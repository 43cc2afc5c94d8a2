"""The tolerance curve: how much noise on its latents does this decoder forgive? The premise of Quantize-then-Rectify, measured.

Gaussian noise of growing strength is added to the latents of a few images and decoded. *Isotropic* noise has the same strength at every
position of the standardised latent. Noise in the *decoder's metric* is weaker where the decoder is sensitive (divided by the transform's
scale), so that every position moves the picture about equally. The tokenizer's own quantized and rectified latents are measured on the same
images: above the curve, its error hurts less than noise of the same size, and below it more.

The noise of an image depends on (seed, its position in the source, strength), not on batches or ranks.

Shapes: N images, B batch, C,H,W latent channels, rows, columns, F features.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models.tokenizer import ReVQTokenizer
from . import ranks
from .events import Advance, Begin, Event
from .frechet import frechet_distance, gaussian_of
from .loading import Batch, Loader
from .metrics import score_images, to_signed
from .networks import Inception, Lpips, full_float32
from .reconstruct import decode_to_uint8, latent_errors

LEVELS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
"""Root mean square of the noise, in deviations of the latent."""
CURVE_METRICS = ("rfid", "psnr_db", "ssim", "lpips_alex")


@dataclass(frozen=True, kw_only=True)
class Instruments:
    """The networks that measure."""

    inception: Inception | None
    lpips: Mapping[str, Lpips]


@dataclass
class _Variant:
    """One way to spoil the latents, and what came of it on every image."""

    index: list[int] = field(default_factory=list)
    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    features: list[Tensor] = field(default_factory=list)


def measure_tolerance(
    tokenizer: ReVQTokenizer, loader: Loader, positions: Sequence[int], instruments: Instruments, *, seed: int, bf16: bool
) -> Generator[Event, None, dict[str, Any]]:
    """Both curves and the tokenizer's own points over the images at `positions`, which can all be read; see the top of this file.

    Returns:
        {"images", "levels", "isotropic": [{"noise", metrics...} by level, 0 first], "decoder": the same or None,
        "marks": {"quantized", "rectified"}}.
    """
    strengths = _strengths(tokenizer)
    variants: dict[str, _Variant] = {}
    originals: list[Tensor] = []
    yield Begin(task="tolerance", total=len(positions), unit="images")
    done = 0
    for batch in loader.batches(positions, rank=ranks.rank(), ranks=ranks.world_size()):
        if batch.crops:
            _measure_batch(tokenizer, batch, instruments, variants, originals, strengths, seed=seed, bf16=bf16)
        done += (len(batch.crops) + len(batch.failed)) * ranks.world_size()
        yield Advance(done=min(done, len(positions)))
    merged = {name: _merge(variants.get(name, _Variant())) for name in ("vae", "quantized", "rectified", *strengths)}
    reference = _gather_features(originals) if instruments.inception else None
    values = {name: _summary(variant, reference) for name, variant in merged.items()}
    return _tables(values, strengths, len(merged["vae"].index))


def _strengths(tokenizer: ReVQTokenizer) -> dict[str, tuple[str, float]]:
    """Every noisy variant: name -> (kind, level). The decoder's metric only where the transform has one."""
    kinds = ("isotropic", "decoder") if has_decoder_metric(tokenizer) else ("isotropic",)
    return {f"{kind} {level}": (kind, level) for kind in kinds for level in LEVELS}


def has_decoder_metric(tokenizer: ReVQTokenizer) -> bool:
    """Whether the transform weighs positions by how much they move the picture."""
    scale = tokenizer.transform.scale
    return bool((scale != scale.flatten()[0]).any())


def _measure_batch(
    tokenizer: ReVQTokenizer,
    batch: Batch,
    instruments: Instruments,
    variants: dict[str, _Variant],
    originals: list[Tensor],
    strengths: Mapping[str, tuple[str, float]],
    *,
    seed: int,
    bf16: bool,
) -> None:
    """Add one batch to every variant."""
    pixels = batch.pixels().to(tokenizer.device)
    index = [crop.index for crop in batch.crops]
    with full_float32(tokenizer.device):
        latents = tokenizer.vae.encode(to_signed(pixels))
        indices = tokenizer.encode_latents(latents)
        spoiled = {"vae": latents, **{row: tokenizer.decode_latents(indices, rectify=row == "rectified") for row in ("quantized", "rectified")}}
    unit = _noise(index, latents, seed)
    transform = tokenizer.transform
    shapes = {"isotropic": transform.std, "decoder": transform.std / transform.scale}
    names = ["vae", "quantized", "rectified", *strengths]
    for name in names:
        if name in strengths:
            kind, level = strengths[name]
            spoiled[name] = latents + level * unit * shapes[kind]
        images = decode_to_uint8(tokenizer, spoiled[name], bf16=bf16)
        scores = score_images({name: images}, pixels, instruments.lpips)[name]
        variant = variants.setdefault(name, _Variant())
        variant.index += index
        for metric, values in {**scores, **latent_errors(tokenizer, spoiled.pop(name) if name in strengths else spoiled[name], latents)}.items():
            variant.scores.setdefault(metric, []).append(values)
        if instruments.inception:
            variant.features.append(instruments.inception.features(images).cpu())
    if instruments.inception:
        originals.append(instruments.inception.features(pixels).cpu())


def _noise(index: Sequence[int], latents: Tensor, seed: int) -> Tensor:
    """Standard normal (B,C,H,W): each image's own, and the same direction at every strength."""
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in index]
    return torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators]).to(latents)


def _merge(variant: _Variant) -> _Variant:
    """One variant over all ranks."""
    parts = ranks.gather((variant.index, variant.scores, variant.features))
    names = dict.fromkeys(name for part in parts for name in part[1])
    order = [i for part in parts for i in part[0]]
    ranking = sorted(range(len(order)), key=order.__getitem__)
    scores = {name: [torch.cat([values for part in parts for values in part[1].get(name, [])])[ranking]] for name in names}
    features = [tensor for part in parts for tensor in part[2]]
    return _Variant([order[i] for i in ranking], scores, [torch.cat(features)[ranking]] if features else [])


def _gather_features(features: Sequence[Tensor]) -> Tensor:
    """(N,F) of all ranks; their order does not matter to a Gaussian."""
    return torch.cat([tensor for part in ranks.gather(list(features)) for tensor in part])


def _summary(variant: _Variant, reference: Tensor | None) -> dict[str, float | None]:
    """Means over the images; None for what is infinite or was not measured."""
    values: dict[str, float | None] = {}
    for name in (*CURVE_METRICS[1:], "latent_mse", "decoder_mse"):
        mean = float(torch.cat(variant.scores[name]).mean())
        values[name] = mean if math.isfinite(mean) else None
    enough = reference is not None and len(variant.index) > 1
    values["rfid"] = frechet_distance(gaussian_of(torch.cat(variant.features)), gaussian_of(reference)) if enough and reference is not None else None
    return values


def _tables(values: Mapping[str, dict[str, float | None]], strengths: Mapping[str, tuple[str, float]], images: int) -> dict[str, Any]:
    """The result of `measure_tolerance`."""

    def point(name: str, noise: float) -> dict[str, float | None]:
        return {"noise": noise, **{metric: values[name][metric] for metric in CURVE_METRICS}}

    def curve(kind: str) -> list[dict[str, float | None]] | None:
        points = [point(name, level) for name, (named, level) in strengths.items() if named == kind]
        return [point("vae", 0.0), *points] if points else None

    marks: dict[str, Any] = {}
    for row in ("quantized", "rectified"):
        errors = {"isotropic": values[row]["latent_mse"], "decoder": values[row]["decoder_mse"]}
        noise = {kind: math.sqrt(error or 0.0) for kind, error in errors.items()}
        marks[row] = {"noise": noise, **{metric: values[row][metric] for metric in CURVE_METRICS}}
    return {"images": images, "levels": list(LEVELS), "isotropic": curve("isotropic"), "decoder": curve("decoder"), "marks": marks}
