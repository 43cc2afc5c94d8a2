"""The codebooks folder: transform, codebooks and their counts in one safetensors file, its settings in config.json.

Shapes: C,H,W latent channels, rows, columns, P = C*H*W, T tokens, K codes per codebook, D dims per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CodebookError, CodebookNotFoundError, one_line
from ..files import local_path, read_json, sha256_json, write_bytes
from ..lock import naming_writer, writer_of
from .transform import LatentTransform, blank_transform
from .weight_keys import compare_weights

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
        CodebookError: there is none (then it is a FileNotFoundError too), its fit is not finished (and whether it is running), it is damaged or
            not all there, holds codes that are not finite, or is not of the fit in config.json.
    """
    folder = local_path(folder)
    with naming_writer(folder, lambda: writer_of(folder)):
        return _load(folder)


def _load(folder: Path) -> Codebooks:
    path = folder / CODEBOOKS_NAME
    config = read_json(folder / "config.json")
    if config is None or config.get("kind") != CODEBOOKS_KIND:
        raise CodebookNotFoundError(f"{folder} holds no codebooks; fit-codebooks makes them")
    if not path.is_file():
        raise CodebookError(f"the codebooks in {folder} are not finished; give the fit-codebooks command again")
    try:
        with safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        expected = sha256_json(config["identity"])
    except Exception as error:  # safetensors has its own errors for a damaged file
        raise CodebookError(f"{path} is damaged ({one_line(error)}); remove the folder and fit the codebooks again") from error
    if digest != expected:
        there = f"of the fit {digest[:8]}" if digest else "of an older revq, which did not write whose fit it is"
        raise CodebookError(f"{path} is {there}, the config.json beside it of the fit {expected[:8]}; remove the folder and fit the codebooks again")
    if faults := _faults(tensors, config["identity"]):
        raise CodebookError(f"{path} is not what this revq reads: {faults}; copy it again, or remove the folder and fit the codebooks again")
    check_finite(tensors["codebooks"], f"{path} is damaged: remove the folder and fit the codebooks again")
    parts = {name: tensors.get(f"transform.{name}") for name in ("mean", "std", "scale", "axes", "inverse_axes")}
    return Codebooks(
        transform=LatentTransform(**parts, tokens=config["identity"]["tokens"]),  # type: ignore[arg-type]
        codebooks=tensors["codebooks"],
        counts=tensors["counts"],
        sensitivity=tensors.get("sensitivity"),
        identity=config["identity"],
    )


def _faults(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> str:
    """What keeps these from being the tensors of such a fit: without its axes, say, a transform would be another one, in silence."""
    tokens, codes, kind = identity["tokens"], identity["codes"], identity["transform"]
    shapes = (tuple(tensors[name].shape) for name in ("transform.mean", "transform.std", "transform.scale") if name in tensors)
    shape = next((shape for shape in shapes if len(shape) == 3 and math.prod(shape) % tokens == 0), None)
    if shape is None:
        return "no tensor transform.mean of a latent's shape (C,H,W)"
    with torch.device("meta"):
        expected = {f"transform.{name}": tensor for name, tensor in blank_transform(shape, tokens, kind).state_dict().items()}
        expected["codebooks"] = torch.empty(tokens, codes, math.prod(shape) // tokens)
        expected["counts"] = torch.empty(tokens, codes)
        if kind == "decoder":
            expected["sensitivity"] = torch.empty(shape)
    return compare_weights(expected, tensors)


def check_finite(codebooks: Tensor, why: str) -> None:
    """Raise CodebookError, which ends in `why` and how to mend it, where codes (T,K,D) are not finite."""
    finite = torch.isfinite(codebooks).flatten(1).all(1)
    if not bool(finite.all()):
        raise CodebookError(f"codebook {int((~finite).nonzero()[0])} has codes that are not finite; {why}")
