"""The codebooks folder: transform, codebooks and their counts in one safetensors file, its settings in config.json.

Shapes: C,H,W latent channels, rows, columns, P = C*H*W, T tokens, K codes per codebook, D dims per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CodebookError
from ..files import read_json, sha256_json, write_bytes
from ..lock import naming_writer, writer_of
from .transform import LatentTransform

CODEBOOKS_KIND = "revq-codebooks"
CODEBOOKS_NAME = "codebooks.safetensors"
_DIGEST = "identity_sha256"


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
    """Write `codebooks.safetensors`; its presence says that the fit is done, its metadata which fit it is of."""
    tensors = {
        "codebooks": codebooks.codebooks,
        "counts": codebooks.counts,
        **{f"transform.{name}": tensor for name, tensor in codebooks.transform.state_dict().items()},
    }
    if codebooks.sensitivity is not None:
        tensors["sensitivity"] = codebooks.sensitivity
    metadata = {_DIGEST: sha256_json(codebooks.identity)}
    write_bytes(folder / CODEBOOKS_NAME, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def load_codebooks(folder: str | Path) -> Codebooks:
    """Read a codebooks folder.

    Raises:
        CodebookError: there is none, its fit is not finished (and whether it is running), it is damaged, holds codes that are not finite, or is not
            of the fit in config.json.
    """
    folder = Path(folder)
    with naming_writer(folder, lambda: writer_of(folder)):
        return _load(folder)


def _load(folder: Path) -> Codebooks:
    path = folder / CODEBOOKS_NAME
    config = read_json(folder / "config.json")
    if config is None or config.get("kind") != CODEBOOKS_KIND:
        raise CodebookError(f"{folder} holds no codebooks; fit-codebooks makes them")
    if not path.is_file():
        raise CodebookError(f"the codebooks in {folder} are not finished; give the fit-codebooks command again")
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        expected = sha256_json(config["identity"])
        parts = {name: tensors.pop(f"transform.{name}", None) for name in ("mean", "std", "scale", "axes", "inverse_axes")}
        if others := [name for name in tensors if name.startswith("transform.")]:
            raise CodebookError(f"it holds {', '.join(others)}, which another version of revq wrote")
        transform = LatentTransform(**parts, tokens=len(tensors["codebooks"]))
        loaded = Codebooks(
            transform=transform,
            codebooks=tensors["codebooks"],
            counts=tensors["counts"],
            sensitivity=tensors.get("sensitivity"),
            identity=config["identity"],
        )
    except Exception as error:  # safetensors has its own errors for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise CodebookError(f"{path} is damaged ({reason}); remove the folder and fit the codebooks again") from error
    if digest != expected:
        there = f"of the fit {digest[:8]}" if digest else "of an older revq, which did not write whose fit it is"
        raise CodebookError(f"{path} is {there}, the config.json beside it of the fit {expected[:8]}; remove the folder and fit the codebooks again")
    check_finite(loaded.codebooks, f"{path} is damaged: remove the folder and fit the codebooks again")
    return loaded


def check_finite(codebooks: Tensor, why: str) -> None:
    """Raise CodebookError, which ends in `why` and how to mend it, where codes (T,K,D) are not finite."""
    finite = torch.isfinite(codebooks).flatten(1).all(1)
    if not bool(finite.all()):
        raise CodebookError(f"codebook {int((~finite).nonzero()[0])} has codes that are not finite; {why}")
