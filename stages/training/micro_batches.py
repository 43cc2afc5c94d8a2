"""The decoder phase of train-rectifier in parts: the gradients of a batch that a device cannot decode at once add up over micro-batches.

What a decoder keeps for its backward pass is large: DC-AE f32c32 at 256 px, in bf16, keeps 0.9 GiB for each picture (docs/notes/preset-costs.md).

Shapes: B latents of this rank's batch, C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...errors import TrainingError, VAEError
from .. import ranks
from .losses import PixelLoss
from .network import RectifierNetwork
from .state import TrainState


def backward_in_parts(network: RectifierNetwork, pixel_loss: PixelLoss, quantized: Tensor, latents: Tensor) -> Tensor:
    """Add the gradients of the mean loss of a batch to those of the rectifier, at most `pixel_loss.micro_batch` latents at a time.

    Args:
        quantized: quantized standardised latents (B,C,H,W).
        latents: raw cached latents (B,C,H,W).

    Returns:
        () that loss without its graph. It and the gradients are the whole batch's up to rounding, however it is cut.
    """
    total = torch.zeros((), device=latents.device)
    parts = list(zip(quantized.split(pixel_loss.micro_batch), latents.split(pixel_loss.micro_batch), strict=True))
    for number, (before, true) in enumerate(parts, 1):
        with network.averaging(number == len(parts)):
            with network.autocast(latents.device):
                loss = pixel_loss(network(before), true) * (len(true) / len(latents))
            loss.backward()
        total += loss.detach()
    return total


def try_decoder_step(network: RectifierNetwork, pixel_loss: PixelLoss, state: TrainState, batch: Tensor) -> None:
    """One micro-batch of the decoder phase that changes no weight. No rank waits for another before all have tried.

    Args:
        batch: latents (B,C,H,W), as many as are decoded at once; their values do not matter.

    Raises:
        TrainingError: a rank's memory does not hold it.
        VAEError: the decoder cannot be differentiated.
    """
    if all(ranks.gather(_fits(network, pixel_loss, state, batch))):
        return
    mend = f"give --micro-batch {len(batch) // 2}, whose result is the same up to rounding"
    if len(batch) == 1:
        mend = "free it of other work, or give another --device: the same folder takes it"
    raise TrainingError(f"the decoder phase does not fit in the memory of {batch.device} with {len(batch)} latents at once; {mend}")


def _fits(network: RectifierNetwork, pixel_loss: PixelLoss, state: TrainState, batch: Tensor) -> bool:
    try:
        # AdamW's two averages of every weight come with the first step. Where they are there already this is some room to spare.
        held = [torch.empty_like(weight) for group in state.optimizer.param_groups for weight in group["params"] * 2]
        with network.autocast(batch.device):
            loss = pixel_loss(network.rectifier(batch), batch)
        if not loss.requires_grad:
            raise VAEError(
                f"the decoder of VAE {pixel_loss.vae.id} gives no gradients, which decoder-steps needs; let its decode run without torch.no_grad, "
                "or leave decoder-steps at 0"
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
def memory_advice(state: TrainState, pixel_loss: PixelLoss | None) -> Iterator[None]:
    """In place of the device's error that its memory is full, one that says how the same run folder goes on.

    Raises:
        TrainingError: that one.
    """
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        if state.in_decoder_phase and pixel_loss is not None and pixel_loss.micro_batch > 1:
            mend = f"--micro-batch {pixel_loss.micro_batch // 2}"
        else:
            mend = "the device free of other work, or more of them under torchrun (a smaller --batch-size is another run, in a new folder)"
        raise TrainingError(f"out of memory at step {state.step}; the same command goes on from the last checkpoint, with {mend}") from error


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an error class of its own; MPS, cuBLAS and cuDNN say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )
