"""The last phase of train-rectifier in parts: the gradients of a batch that a device cannot decode at once add up over micro-batches.

What a decoder keeps for its backward pass is large: DC-AE f32c32 at 256 px, in bf16, keeps 0.9 GiB for each picture (docs/presets.md).

Shapes: B latents of this rank's batch, C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import TrainingError, VAEError
from .. import ranks
from .losses import PictureLoss
from .network import RectifierNetwork
from .state import TrainState


def backward_in_parts(network: RectifierNetwork, pictures: PictureLoss, quantized: Tensor, latents: Tensor) -> Tensor:
    """Add the gradients of the mean loss of a batch to those of the rectifier, at most `pictures.micro_batch` latents at a time.

    Args:
        quantized: quantized standardised latents (B,C,H,W).
        latents: raw cached latents (B,C,H,W).

    Returns:
        () that loss without its graph. It and the gradients are the whole batch's up to rounding, however it is cut.
    """
    total = torch.zeros((), device=latents.device)
    parts = list(zip(quantized.split(pictures.micro_batch), latents.split(pictures.micro_batch), strict=True))
    for number, (before, true) in enumerate(parts, 1):
        with network.averaging(number == len(parts)):
            with network.autocast(latents.device):
                loss = pictures(network(before), true) * (len(true) / len(latents))
            loss.backward()
        total += loss.detach()
    return total


def try_last_phase(network: RectifierNetwork, pictures: PictureLoss, state: TrainState, batch: Tensor) -> tuple[PictureLoss, str]:
    """One step of the last phase that changes no weight, so that hours of the first phase are not spent on one that cannot end.

    Where memory does not hold `pictures.micro_batch` latents at once, half as many are tried, on all ranks alike.

    Args:
        batch: latents (B,C,H,W) such as the last phase takes; their values do not matter.

    Returns:
        `pictures` with the micro-batch that fits, and a note for the user, "" where the one asked for does.

    Raises:
        TrainingError: not even one latent fits.
        VAEError: the decoder cannot be differentiated.
    """
    asked = size = min(pictures.micro_batch, len(batch))
    while not all(ranks.gather(_fits(network, pictures, state, batch[:size]))):
        if size == 1:
            raise TrainingError(
                f"the last phase does not fit in the memory of {batch.device}, not even one latent at a time; free it of other work, or give another "
                "--device: the same folder takes it"
            )
        size //= 2
    fewer = f"the last phase takes {size} of its {len(batch)} latents at a time, as many as memory holds; the result is the same up to rounding"
    return replace(pictures, micro_batch=size), fewer if size < asked else ""


def _fits(network: RectifierNetwork, pictures: PictureLoss, state: TrainState, part: Tensor) -> bool:
    """Whether memory holds forward and backward of one micro-batch. No rank waits for another in here, so that one may fail alone."""
    try:
        # AdamW's two averages of every weight come with the first step. Where they are there already this is some room to spare.
        held = [torch.empty_like(weight) for group in state.optimizer.param_groups for weight in group["params"] * 2]
        with network.autocast(part.device):
            loss = pictures(network.rectifier(part), part)
        if not loss.requires_grad:
            raise VAEError(
                f"the decoder of VAE {pictures.vae.id} gives no gradients, which finish-steps needs; let its decode run without torch.no_grad, "
                "or leave finish-steps at 0"
            )
        loss.backward()
        del held
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return False
    finally:
        state.optimizer.zero_grad()
    return True


@contextmanager
def memory_advice(state: TrainState, pictures: PictureLoss | None) -> Iterator[None]:
    """In place of the device's error that its memory is full, one that says how the same run folder goes on.

    Raises:
        TrainingError: that one.
    """
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if state.finishing and pictures is not None and pictures.micro_batch > 1:
            mend = f"--micro-batch {pictures.micro_batch // 2}"
        else:
            mend = "the device free of other work, or more of them under torchrun (a smaller --batch-size is another run, in a new folder)"
        raise TrainingError(f"out of memory at step {state.step}; the same command goes on from the last checkpoint, with {mend}") from error


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an error class of its own; MPS, cuBLAS and cuDNN say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )
