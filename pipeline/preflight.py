"""What a later stage of a run would find missing, found before the first one begins: hours of encoding must not end in a mistyped path."""

from __future__ import annotations

from contextlib import suppress

import torch

from ..cache.classes import classes_in, number_classes
from ..cache.sources import open_source
from ..cache.store import LatentStore
from ..errors import StoreError
from ..models.device import pick_device
from ..models.kmeans import pick_backend
from ..models.vae import FrozenVAE
from ..stages.configs import EvaluateConfig
from ..stages.evaluation.features import OtherFeatures
from ..stages.evaluation.instruments import open_instruments
from ..stages.evaluation.weights import METRIC_WEIGHTS, find_weights
from ..stages.fit_codebooks import check_tokens
from ..stages.training.data import check_ranks
from ..stages.training.log import require_wandb
from ..stages.training.perceptual import open_perceptual
from .config import Plan


def check_plan(plan: Plan, *, overwrite: bool) -> None:
    """Open or find every input of every stage but the training images, which the first stage opens anyway.

    (Whether there are latents enough for the codes is known after encoding; where there are too few, that was short.)

    Raises:
        RevqError: what the stage itself would raise.
    """
    for config in (plan.encode_train, plan.fit, plan.train, plan.evaluate):
        pick_device(config.device)
    pick_backend(plan.fit.backend, pick_device(plan.fit.device))
    check_ranks(plan.train)
    if plan.train.wandb:
        require_wandb()
    _check_judges(plan.evaluate)
    if plan.train.perceptual and plan.train.decoder_steps:
        open_perceptual(plan.train.perceptual, torch.device("cpu"))
    for images in sorted({plan.evaluate.images, *([plan.encode_val.images] if plan.encode_val else [])}):
        open_source(images)
    _check_classes(plan)
    check_tokens(plan.fit, _latent_shape(plan, overwrite))


def _check_judges(config: EvaluateConfig) -> None:
    """Open the networks that judge, as far as they are here: a damaged file must not be found after hours. Raises ConfigError."""
    cpu = torch.device("cpu")
    found = {
        metric: find_weights(file, path=config.inception_weights if metric == "rfid" else None, download=False)
        for metric, file in METRIC_WEIGHTS.items()
    }
    open_instruments(found, OtherFeatures(config.features, cpu) if config.features else None, cpu)


def _check_classes(plan: Plan) -> None:
    """Where new classes are refused, those of the validation images must be among the training images'. Raises MismatchError."""
    if plan.encode_val and plan.encode_val.new_classes == "refuse":
        train, val = (classes_in(open_source(config.images).items[: config.limit]) for config in (plan.encode_train, plan.encode_val))
        number_classes("val", val, {"train": train}, refuse=True)


def _latent_shape(plan: Plan, overwrite: bool) -> tuple[int, int, int]:
    """(C,H,W) of the store that is there to stay, else of the VAE, which must encode and decode images of this size, with gradients where a
    stage takes them.
    """
    config = plan.encode_train
    if not overwrite:
        with suppress(StoreError):
            return LatentStore.open(config.store).encoding.latent_shape
    vae = FrozenVAE.load(config.vae, device=pick_device(config.device))
    shape = vae.latent_shape(config.image_size)
    if plan.fit.transform == "decoder" or plan.train.decoder_steps or plan.evaluate.refine:
        vae.decode(torch.zeros(1, *shape, device=vae.device, requires_grad=True))
    return shape
