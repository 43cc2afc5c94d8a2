"""How well the rectifier does on latents that it was not trained on: errors before and after, and preview pictures.

Nothing here changes the state. Shapes: B batch, M preview pictures, C,H,W latent channels, rows, columns, S image side, T tokens, K codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ranks
from .losses import latent_loss
from .run import TrainingRun
from .state import LATENT_SCORE, PIXEL_SCORE, TrainState

_BATCH = 256
_PICTURE_BATCH = 32
_MOST_DECODED = 256
"""Pictures decoded at one evaluation of the decoder phase, on all ranks together: a decoder pass costs far more than a rectifier pass."""


@torch.no_grad()
def validate(run: TrainingRun, state: TrainState) -> dict[str, float]:
    """Mean squared errors of standardised latents before and after rectification, and the loss of the latent phase."""
    inputs = run.inputs
    scale, sums = inputs.transform.scale, torch.zeros(3, dtype=torch.float64)
    for index in torch.arange(len(inputs.val)).split(_BATCH):
        standardised, quantized = val_batch(run, state, index)
        rectified = state.ema(quantized)
        errors = (quantized - standardised).square().mean(), (rectified - standardised).square().mean()
        sums += torch.tensor([*map(float, errors), float(latent_loss(rectified, standardised, scale))], dtype=torch.float64) * len(index)
    before, after, loss = (ranks.sum_tensors(sums) / inputs.val_rows).tolist()
    return {"val_mse_quantized": before, "val_mse_rectified": after, LATENT_SCORE: loss}


@torch.no_grad()
def pixel_error(run: TrainingRun, state: TrainState) -> dict[str, float]:
    """Mean of the decoder phase's loss over the first of each rank's validation latents."""
    assert run.pixel_loss is not None  # it is there where a decoder phase is
    inputs, pixel_loss = run.inputs, run.pixel_loss
    sums = torch.zeros(2, dtype=torch.float64)
    most = max(1, _MOST_DECODED // ranks.world_size())
    together = min(_PICTURE_BATCH, 4 * pixel_loss.micro_batch)  # a pass that keeps nothing for gradients needs far less than a quarter of the memory
    for index in torch.arange(min(most, len(inputs.val))).split(together):
        _, quantized = val_batch(run, state, index)
        loss = float(pixel_loss(state.ema(quantized), inputs.val.batch(index)))
        sums += torch.tensor([loss * len(index), len(index)], dtype=torch.float64)
    total, count = ranks.sum_tensors(sums).tolist()
    return {PIXEL_SCORE: total / count}


def val_batch(run: TrainingRun, state: TrainState, index: Tensor) -> tuple[Tensor, Tensor]:
    """Standardised and quantized standardised latents (B,C,H,W) of those validation rows."""
    inputs = run.inputs
    standardised = inputs.transform.standardize(inputs.val.batch(index))
    if run.val is not None:
        return standardised, run.val.batch(index, inputs.transform, state.quantizer)
    indices = state.quantizer.encode(inputs.transform.to_coordinates(standardised))
    return standardised, inputs.transform.from_coordinates(state.quantizer.decode(indices))


@torch.no_grad()
def preview(run: TrainingRun, state: TrainState, count: int) -> tuple[dict[str, float], Tensor]:
    """Decoded PSNR (dB) of a fixed handful of rank 0's validation latents, and the pictures.

    The reference is the picture of the cached latent, the VAE's own: no image is read.

    Returns:
        The figures, and a uint8 picture (3,M*S,3*S): for each latent, from left to right, the VAE's, the quantized and the rectified picture.
    """
    inputs = run.inputs
    assert inputs.vae is not None
    index = torch.arange(min(count, len(inputs.val)))
    standardised, quantized = val_batch(run, state, index)
    kinds = (standardised, quantized, state.ema(quantized))
    decoded = [((inputs.vae.decode(inputs.transform.unstandardize(latents)) + 1) / 2).clamp(0, 1) for latents in kinds]
    figures = {f"preview_{name}_db": _psnr_db(decoded[at], decoded[0]) for at, name in ((1, "quantized"), (2, "rectified"))}
    grid = torch.cat([torch.cat(list(pictures), 1) for pictures in decoded], 2)
    return figures, (grid * 255).round().to(torch.uint8).cpu()


def _psnr_db(pictures: Tensor, reference: Tensor) -> float:
    """Mean over the pictures (M,3,S,S) in [0,1] of each one's PSNR."""
    errors = (pictures - reference).square().mean((1, 2, 3)).clamp_min(1e-10)
    return float((-10 * errors.log10()).mean()) if len(errors) else math.nan
