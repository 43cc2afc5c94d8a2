"""The codebooks folder: transform, codebooks and their usage in one safetensors file, its settings in config.json.

Shapes: C,H,W latent channels, rows, columns, P = C*H*W, T tokens, K codes per codebook, D dims per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import CodebookError
from ..files import read_json, write_bytes
from .transform import LatentTransform

CODEBOOKS_KIND = "revq-codebooks"
CODEBOOKS_NAME = "codebooks.safetensors"


@dataclass(frozen=True, kw_only=True)
class Codebooks:
    """What fit-codebooks makes and train-rectifier starts from."""

    transform: LatentTransform
    codebooks: Tensor
    """(T,K,D) float32."""
    counts: Tensor
    """(T,K) int64: how often each code is used over the rows of the fit."""
    sensitivity: Tensor | None
    """(C,H,W) mean squared change of a picture's values for a unit change of the standardised latent; None unless the transform is "decoder"."""
    identity: dict[str, Any]
    """The settings of the fit, as in config.json."""


def save_codebooks(folder: Path, codebooks: Codebooks) -> None:
    """Write `codebooks.safetensors`; its presence says that the fit is done."""
    tensors = {
        "codebooks": codebooks.codebooks,
        "counts": codebooks.counts,
        **{f"transform.{name}": tensor for name, tensor in codebooks.transform.state_dict().items()},
    }
    if codebooks.sensitivity is not None:
        tensors["sensitivity"] = codebooks.sensitivity
    write_bytes(folder / CODEBOOKS_NAME, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def load_codebooks(folder: str | Path) -> Codebooks:
    """Read a codebooks folder.

    Raises:
        CodebookError: there is none, its fit is not finished, or it is damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None or config.get("kind") != CODEBOOKS_KIND:
        raise CodebookError(f"{folder} holds no codebooks; fit-codebooks makes them")
    if not (folder / CODEBOOKS_NAME).is_file():
        raise CodebookError(f"the codebooks in {folder} are not finished; give the fit-codebooks command again")
    try:
        tensors = load_file(folder / CODEBOOKS_NAME)
        parts = {name: tensors.pop(f"transform.{name}", None) for name in ("mean", "std", "scale", "axes", "inverse_axes")}
        if others := [name for name in tensors if name.startswith("transform.")]:
            raise CodebookError(f"it holds {', '.join(others)}, which another version of revq wrote")
        transform = LatentTransform(**parts, tokens=len(tensors["codebooks"]))  # type: ignore[arg-type]
        return Codebooks(
            transform=transform,
            codebooks=tensors["codebooks"],
            counts=tensors["counts"],
            sensitivity=tensors.get("sensitivity"),
            identity=config["identity"],
        )
    except Exception as error:  # safetensors has its own errors for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise CodebookError(f"{folder / CODEBOOKS_NAME} is damaged ({reason}); remove the folder and fit the codebooks again") from error


def check_finite(codebooks: Tensor) -> None:
    """Raise CodebookError where codes (T,K,D) are not finite."""
    if not bool(torch.isfinite(codebooks).all()):
        token = int((~torch.isfinite(codebooks)).flatten(1).any(1).nonzero()[0])
        raise CodebookError(
            f"codebook {token} has codes that are not finite; the latents hold extreme values: check the store with revq info --verify"
        )
