"""What a process of train-rectifier holds and never saves: settings, inputs, the network as it is run, tables of tokens, the log.

(What changes while it trains, and a checkpoint saves, is `state.py`.) Shapes: B latents of a batch, R ranks, C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.batches import ResidentLatents
from ...models.device import bf16_is_fast
from ...models.nearest import search_note
from .. import ranks
from ..configs import TrainRectifierConfig
from ..events import Event, Note
from .data import Inputs
from .frozen_tokens import FrozenTokens, quantize_once
from .log import TrainingLog
from .losses import PixelLoss
from .micro_batches import try_decoder_step
from .network import RectifierNetwork, open_network
from .perceptual import open_perceptual
from .state import TrainState

# What may change from one command to the next on the same folder: none of it shapes the weights beyond rounding.
# (How latents are read does shape the order: a checkpoint says how its run began, and `resume` refuses the other way.)
_RUNTIME_ONLY = {"store", "codebooks", "out", "device", "vae", "overwrite", "compile", "previews", "keep", "wandb", "latents", "micro_batch"}


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What one process makes of settings and inputs before the first step."""

    config: TrainRectifierConfig
    inputs: Inputs
    out: Path
    """The run folder."""
    network: RectifierNetwork
    train: FrozenTokens | None
    """Train latents quantized once; None where the codebooks change or the latents are streamed."""
    val: FrozenTokens | None
    """The same of the validation latents; None where the codebooks change."""
    pixel_loss: PixelLoss | None
    """The loss of the decoder phase; None where there is no VAE."""
    log: TrainingLog


def settings_of_weights(config: TrainRectifierConfig) -> dict[str, Any]:
    """The settings that shape the weights: a folder with others is another run's. A constant schedule may be made longer."""
    free = {*_RUNTIME_ONLY, "epochs", "steps"} if config.schedule == "constant" else _RUNTIME_ONLY
    if config.perceptual is None:
        free = {*free, "perceptual", "perceptual_weight"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def open_run(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, out: Path) -> Generator[Event, None, TrainingRun]:
    """Everything that is done once before the first step; the precision of `state` is settled here."""
    if state.precision == "auto":
        state.precision = ranks.broadcast("bf16" if bf16_is_fast(inputs.device) else "fp32")
    compiling = config.compile if config.width else "off"
    network, note = open_network(state.rectifier, _zeros(inputs, config.batch_size), bf16=state.precision == "bf16", compiling=compiling)
    if note:
        yield Note(text=note, warning=True)
    if note := search_note(inputs.device, state.quantizer.codebooks.shape[2]):
        yield Note(text=note)
    train = val = None
    if config.codebook_lr == 0 and isinstance(inputs.train, ResidentLatents):
        train = yield from quantize_once(inputs.train, config.split, inputs.transform, state.quantizer)
        state.counts = train.counts
    if config.codebook_lr == 0:
        val = yield from quantize_once(inputs.val, inputs.val_name, inputs.transform, state.quantizer)
    pixel_loss = _pixel_loss(config, inputs, state, network)
    settings = {**settings_of_weights(config), "epochs": config.epochs, "steps": config.steps}
    log = TrainingLog(out, step=state.step + 1 if state.history else 0, wandb=config.wandb, settings=settings)
    return TrainingRun(config=config, inputs=inputs, out=out, network=network, train=train, val=val, pixel_loss=pixel_loss, log=log)


def _pixel_loss(config: TrainRectifierConfig, inputs: Inputs, state: TrainState, network: RectifierNetwork) -> PixelLoss | None:
    """The loss of the decoder phase, tried once, so that hours of the latent phase are not spent on one that cannot end."""
    if inputs.vae is None:
        return None
    example = _zeros(inputs, config.decoder_batch_size)
    pixel_loss = PixelLoss(
        vae=inputs.vae,
        transform=inputs.transform,
        micro_batch=min(config.micro_batch or len(example), len(example)),
        perceptual=open_perceptual(config.perceptual, inputs.device) if config.perceptual and config.decoder_steps else None,
        perceptual_weight=config.perceptual_weight,
    )
    if config.decoder_steps and not state.done:
        try_decoder_step(network, pixel_loss, state, example[: pixel_loss.micro_batch])
    return pixel_loss


def _zeros(inputs: Inputs, batch_size: int) -> Tensor:
    """A batch (B/R,C,H,W) of the shape that steps of that batch size have."""
    return torch.zeros(inputs.batch_size(batch_size) // ranks.world_size(), *inputs.store.encoding.latent_shape, device=inputs.device)
