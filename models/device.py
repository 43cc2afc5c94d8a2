"""Choosing where to compute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

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
    CPU has them, both kinds of rectifier are faster in bf16 at every width worth training (docs/notes/training-speed.md).
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32, also within `torch.autocast` and after `torch.set_float32_matmul_precision("high" or "medium")`.

    Coordinates in bfloat16 or TF32 would find other codes, and an exact search of codes reckons with the rounding of float32.
    """
    there = torch.amp.is_autocast_available(device.type)  # not so on the meta device
    with torch.autocast(device.type, enabled=False) if there and torch.is_autocast_enabled(device.type) else nullcontext(), _IEEE:
        yield


class _FloatProducts:
    """Sets torch's precision of products for the whole process to float32's own, as long as any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[str] = []
        backends: Any = torch.backends
        new = hasattr(backends.cuda.matmul, "fp32_precision")  # since torch 2.9, whose getters refuse a mixture of new and old
        self._places = [backends.cuda.matmul, backends.mkldnn.matmul] if new else []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = [place.fp32_precision for place in self._places] or [torch.get_float32_matmul_precision()]
                self._set(["ieee"] * len(self._places) or ["highest"])

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._before)

    def _set(self, precisions: list[str]) -> None:
        if not self._places:
            torch.set_float32_matmul_precision(precisions[0])
        for place, precision in zip(self._places, precisions, strict=False):
            place.fp32_precision = precision


_IEEE = _FloatProducts()
