"""revq turns any frozen, pre-trained image VAE into a discrete image tokenizer (Quantize-then-Rectify, arXiv 2507.10547)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["FrozenVAE", "LatentStore", "ReVQTokenizer", "RevqError", "__version__", "nearest_codes"]

if TYPE_CHECKING:
    from .cache.store import LatentStore
    from .errors import RevqError
    from .models.nearest import nearest_codes
    from .models.tokenizer import ReVQTokenizer
    from .models.vae import FrozenVAE

_HOMES = {
    "FrozenVAE": ".models.vae",
    "LatentStore": ".cache.store",
    "ReVQTokenizer": ".models.tokenizer",
    "RevqError": ".errors",
    "nearest_codes": ".models.nearest",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: torch and diffusers take seconds, and `revq --help` should not."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
