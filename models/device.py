"""Choosing where to compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA where there is one, then Apple's MPS, then the CPU.

    "auto" and "cuda" are the current GPU, which under torchrun is the one of this process's local rank.

    Raises:
        ConfigError: the name is no device, or that device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r}") from error
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(device.type, False):
        raise ConfigError(f"device {name!r} is not there; use auto, or cpu")
    return device


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by instructions of its own: a GPU that has them (Ampere on; a T4 or V100 only emulates it), or a CPU
    with AVX512-BF16 or AMX.

    By instructions and not by a timing, which would come out differently on a busy machine, and with it the weights. They are enough: where a
    CPU has them, both kinds of rectifier are faster in bf16 at every width worth training (docs/rectifier.md).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Products in the dtype of their operands, also within `torch.autocast`: coordinates in bfloat16 would find other codes."""
    there = torch.amp.is_autocast_available(device.type)  # not so on the meta device
    return torch.autocast(device.type, enabled=False) if there and torch.is_autocast_enabled(device.type) else nullcontext()
