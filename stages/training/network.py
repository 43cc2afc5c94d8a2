"""How the rectifier is run: precision, compilation, and gradients averaged over ranks. Its weights stay float32.

Shapes: B batch, C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import one_line
from ...models.rectifier import Rectifier
from .. import ranks


class RectifierNetwork:
    """The rectifier as training runs it; calling it gives float32."""

    def __init__(self, rectifier: Rectifier, *, bf16: bool, network: nn.Module) -> None:
        """Wrap it.

        Args:
            rectifier: the one whose weights are trained.
            bf16: run it under bf16 autocast.
            network: `rectifier` itself, or what shares its weights: compiled, distributed.
        """
        self.rectifier = rectifier
        self.bf16 = bf16
        self._network = network

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of the forward pass."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    def averaging(self, wanted: bool) -> AbstractContextManager[None]:
        """Where passes are inside that are not `wanted` to average their gradients over the ranks: they add up on each, until one averages them."""
        return nullcontext() if wanted or not isinstance(self._network, DistributedDataParallel) else self._network.no_sync()

    def __call__(self, quantized: Tensor) -> Tensor:
        """Quantized standardised latent (B,C,H,W) -> rectified, float32."""
        with self.autocast(quantized.device):
            rectified: Tensor = self._network(quantized)
        return rectified.float()


class _CompiledForOneShape(nn.Module):
    """The rectifier, compiled for the batches of the latent phase; anything else goes through it as it is.

    So nothing is ever compiled anew in the middle of a run, where a failure would end it. The decoder phase loses nothing: at 256 px its decoder
    does a hundred times the rectifier's work.
    """

    def __init__(self, rectifier: Rectifier, shape: torch.Size) -> None:
        super().__init__()
        self.rectifier = rectifier
        self.shape = shape
        self._compiled = (torch.compile(rectifier),)  # in a tuple, so that its weights are not counted twice

    def forward(self, quantized: Tensor) -> Tensor:
        network = self._compiled[0] if quantized.shape == self.shape else self.rectifier
        rectified: Tensor = network(quantized)
        return rectified


def open_network(rectifier: Rectifier, example: Tensor, *, bf16: bool, compiling: str) -> tuple[RectifierNetwork, str]:
    """Make `rectifier` ready to train, and say what could not be had.

    Args:
        example: a batch (B,C,H,W) as the latent phase will give it.
        bf16: run it under bf16 autocast.
        compiling: "on", "off" or "auto": on CUDA alone.

    Returns:
        The network, and a note for the user, "" where there is none.
    """
    device = example.device
    network: nn.Module = rectifier
    note = ""
    if compiling == "on" or (compiling == "auto" and device.type == "cuda"):
        network, note = _compiled(rectifier, example, bf16)
    if ranks.world_size() > 1:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    return RectifierNetwork(rectifier, bf16=bf16, network=network), note


def _compiled(rectifier: Rectifier, example: Tensor, bf16: bool) -> tuple[nn.Module, str]:
    """The compiled rectifier after one trial, or the plain one and why: torch.compile finds out at its first call that there is no compiler."""
    reason = ""
    network: nn.Module = rectifier
    try:
        network = _CompiledForOneShape(rectifier, example.shape)
        with torch.autocast(example.device.type, torch.bfloat16, enabled=bf16):
            network(example).float().square().mean().backward()
    except Exception as error:  # dynamo, inductor, triton and the C++ compiler each have their own
        reason = f"{type(error).__name__}: {one_line(error)}"
    rectifier.zero_grad()
    reasons = [found for found in ranks.gather(reason) if found]
    if reasons:
        return rectifier, f"torch.compile is not to be had here ({reasons[0]}); going on without it, somewhat slower"
    return network, ""
