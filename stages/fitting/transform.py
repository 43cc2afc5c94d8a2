"""The transform of fit-codebooks: mean and deviation of the split, and for pca and decoder the axes, by calibration through the decoder.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, P = C*H*W, n calibration products, G spatial blocks of Q positions each.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...cache.batches import ResidentLatents, StreamingLatents
from ...cache.store import LatentSplit
from ...files import write_bytes
from ...models.transform import (
    Covariance,
    LatentTransform,
    cut_into_blocks,
    fit_axes,
    scale_from_sensitivity,
    spatial_block,
    standard_deviation,
)
from ...models.vae import FrozenVAE
from .. import ranks
from ..configs import FitCodebooksConfig
from ..events import Advance, Begin, Event

Latents = ResidentLatents | StreamingLatents  # whichever memory allows: they are only read through, once for each block of positions
_BATCH = 1024
_DECODED_AT_ONCE = 4  # for its gradients DC-AE f32c32 keeps 1.3 GiB for each 256 px picture in float32
_TRANSFORM_NAME = "transform.safetensors"


def make_transform(config: FitCodebooksConfig, split: LatentSplit, latents: Latents, vae: FrozenVAE | None, partial: Path) -> Iterator[Event]:
    """Write transform and sensitivity to `partial`, where the other ranks, and a rerun, find them."""
    if ranks.broadcast((partial / _TRANSFORM_NAME).exists()):
        return
    mean = torch.from_numpy(split.mean).float()
    std = standard_deviation(torch.from_numpy(split.variance)).float()
    gradients = None if vae is None else (yield from _calibrate(config, split, latents, std, vae))
    if ranks.rank() == 0:
        plain = LatentTransform(mean=mean, std=std, tokens=config.tokens)
        tensors: dict[str, Tensor] = {}
        if gradients is not None:
            tensors["sensitivity"] = gradients.square().mean(0)
            plain.scale = scale_from_sensitivity(tensors["sensitivity"])
            gradients /= plain.scale * tensors["sensitivity"].mean().sqrt()  # so the metric has mean diagonal 1, however bright the pictures are
        if config.transform != "standardize":
            tensors |= yield from _fit_axes(config, latents, plain.to(latents.device), gradients)
        write_bytes(partial / _TRANSFORM_NAME, save({**plain.cpu().state_dict(), **tensors}))
    ranks.barrier()


def load_transform(config: FitCodebooksConfig, partial: Path) -> tuple[LatentTransform, Tensor | None]:
    """What `make_transform` wrote: the transform, and the sensitivity (C,H,W) of the decoder transform."""
    tensors = load_file(partial / _TRANSFORM_NAME)
    parts = {name: tensors.get(name) for name in ("mean", "std", "scale", "axes", "inverse_axes")}
    return LatentTransform(**parts, tokens=config.tokens), tensors.get("sensitivity")  # type: ignore[arg-type]


def _fit_axes(
    config: FitCodebooksConfig, latents: Latents, plain: LatentTransform, gradients: Tensor | None
) -> Generator[Event, None, dict[str, Tensor]]:
    """`axes` (P,P), or (G,Q,Q) with spatial blocks, and `inverse_axes` where they are not orthogonal: one block after the other, so that memory holds
    the covariance of one. `gradients` (n,C,H,W) of the decoder, in the coordinates that the axes start from, make the metric."""
    shape = tuple(plain.mean.shape)
    rows, columns = block = spatial_block(shape, config.tokens)  # type: ignore[arg-type]
    block_shape = (shape[0], rows, columns)
    blocks = plain.mean.numel() // math.prod(block_shape)
    tokens = config.tokens // blocks
    made: dict[str, list[Tensor]] = {"axes": [], "inverse_axes": []}
    yield Begin(task="covariance", total=blocks * len(latents), unit="latents")
    for number in range(blocks):
        covariance, metric = Covariance(block_shape, latents.device), Covariance(block_shape, latents.device)
        for positions, batch in latents.sequential(_BATCH):
            scaled = plain.standardize(batch) * plain.scale
            covariance.add(cut_into_blocks(scaled, block)[:, number].unflatten(1, block_shape))
            yield Advance(done=number * len(latents) + int(positions[-1]) + 1)
        for part in () if gradients is None else gradients.split(_BATCH):
            metric.add(cut_into_blocks(part.to(latents.device), block)[:, number].unflatten(1, block_shape))
        bits = tokens * math.log2(config.codes)
        fitted = fit_axes(covariance.shrunk(), tokens, bits, None if gradients is None else metric.shrunk())
        for name, matrix in zip(made, fitted, strict=True):
            made[name] += [] if matrix is None else [matrix.cpu()]
    return {name: torch.stack(matrices) if blocks > 1 else matrices[0] for name, matrices in made.items() if matrices}


def _calibrate(config: FitCodebooksConfig, split: LatentSplit, latents: Latents, std: Tensor, vae: FrozenVAE) -> Generator[Event, None, Tensor]:
    """(n,C,H,W) gradients J^T v of standardised latents: v are random signs on the decoded values, one per cached latent drawn.

    Their mean outer product is E[J^T J], the metric in which an error of the latent is the squared change of the picture.
    Each rank takes every world_size-th batch. Memory on the CPU: all of them in float32.
    """
    std = std.to(latents.device)
    chosen, draws = torch.randint(len(latents), (config.calibration_samples,), generator=torch.Generator().manual_seed(config.seed)).unique(
        return_inverse=True
    )
    drawn, batches = ResidentLatents(split, latents.rows[chosen.numpy()], device=latents.device), draws.split(16)
    yield Begin(task="decoder sensitivity", total=config.calibration_samples, unit="products")
    mine, done = {}, 0
    for number in range(ranks.rank(), len(batches), ranks.world_size()):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        gradients = []
        for some in drawn.batch(batches[number]).split(_DECODED_AT_ONCE):
            standardised = (some / std).requires_grad_()
            pixels = vae.decode(standardised * std)
            signs = torch.randint(0, 2, pixels.shape, generator=generator).to(pixels) * 2 - 1
            (gradient,) = torch.autograd.grad((pixels * signs).sum(), standardised)
            gradients.append(gradient.cpu())
        mine[number] = torch.cat(gradients)
        done += len(batches[number]) * ranks.world_size()
        yield Advance(done=min(done, config.calibration_samples))
    gathered = {number: value for part in ranks.gather(mine) for number, value in part.items()}
    return torch.cat([gathered[number] for number in range(len(batches))])


def sensitivity_table(sensitivity: Tensor, transform: LatentTransform) -> str:
    """Markdown: one row for each latent channel."""
    level = float(sensitivity.mean())
    rows = [
        f"| {channel} | {float(transform.std[channel].square().mean().sqrt()):.4g} | {float(values.mean()) / level:.4g} "
        f"| {100 * float(values.sum() / sensitivity.sum()):.1f} % | {float(transform.scale[channel].mean()):.3g} |"
        for channel, values in enumerate(sensitivity)
    ]
    head = ["| channel | deviation of the latent | sensitivity (mean 1) | share | scale |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"
