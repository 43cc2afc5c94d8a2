"""What lies at a path: a latent store, codebooks, a tokenizer, a training run, an evaluation, or a whole run; and whether it is sound."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..cache.store import is_store
from ..cache.store_folder import LocalFolder, open_folder
from ..errors import CodebookError, NotFoundError, RevqError, TokenizerError
from ..files import local_path, output_kind, read_json, sizes_under
from ..lock import being_written, naming_writer
from ..stages.code_usage import summarize_usage
from ..stages.events import Event, Note, Result
from .store_info import describe_store, verify_store

_KINDS = "a latent store, codebooks, a tokenizer, a run folder of train-rectifier, an evaluation, or the folder of `revq run`"

_MEASURED = ("images", "protocol", "tokens_per_image", "bits_per_image", "codebook_usage", "fingerprints")
_ROWS = ("vae", "quantized", "rectified")
_BEGUN = "not known yet: a process has just begun to write here"
_TRIES, _TRY_AGAIN_S = 3, 0.2


def info(path: str, *, verify: bool = False) -> Iterator[Event]:
    """Describe what is at `path`; with `verify` read all of it again and check it.

    Raises:
        RevqError: nothing is there, it is nothing of revq's, or (with `verify`) it is damaged.
    """
    folder = open_folder(path)
    if not folder.exists():
        raise NotFoundError(f"{path} does not exist; give the path of {_KINDS}")
    writer = folder.writer()
    if writer:
        yield Note(text=f"{being_written(path, writer)}; this is how far it has come", warning=True)
    with naming_writer(path, folder.writer):
        value = _describe_again(path) if writer else describe(path)
        if verify and value["kind"] != _BEGUN:
            yield from _verify(path, str(value["kind"]))
            value["verified"] = True
    yield Result(value={**value, **({"being_written_by": writer} if writer else {})})


def _describe_again(path: str | Path) -> dict[str, Any]:
    """`describe` what is being written: a file may be replaced between two looks at it, which is no fault where a second try succeeds."""
    for _ in range(_TRIES):
        with contextlib.suppress(RevqError, OSError, KeyError):
            return describe(path)
        time.sleep(_TRY_AGAIN_S)
    return describe(path)


def describe(path: str | Path) -> dict[str, Any]:
    """JSON values that say what is at `path` (a store may be at an fsspec URL), and under "kind" what it is.

    Raises:
        RevqError: it is nothing of revq's.
    """
    place = open_folder(path)
    if is_store(place):
        return describe_store(place)
    folder = place.root if isinstance(place, LocalFolder) else None
    kind = output_kind(folder) if folder else None
    describers = {
        "revq-codebooks": _describe_codebooks,
        "revq-tokenizer": _describe_tokenizer,
        "revq-rectifier-run": _describe_training,
        "revq-evaluation": _describe_evaluation,
        "revq-run": _describe_run,
    }
    if kind is None and place.writer():
        return {"path": str(path), "kind": _BEGUN}
    if folder is None or kind not in describers:
        found = f"its config.json is of kind {kind!r}" if kind else "it has neither a store's zarr.json nor a config.json with a kind"
        raise RevqError(f"{path} is nothing that revq made ({found}); give the path of {_KINDS}")
    return {"path": str(folder), "kind": kind, **describers[kind](folder)}


def _describe_codebooks(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json") or {}
    file = path / "codebooks.safetensors"
    return {**config.get("identity", {}), "complete": file.is_file(), "bytes": _bytes_under(path), **summarize_usage(path)}


def _describe_tokenizer(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json") or {}
    vae = config.get("vae", {})
    names = ("tokens", "codes", "latent_shape", "image_size", "transform", "rectifier", "metrics")
    return {
        **{name: config[name] for name in names if config.get(name) is not None},
        "bits_per_image": config["tokens"] * math.log2(config["codes"]),
        "vae": vae.get("id"),
        "vae_fingerprint": vae.get("fingerprint"),
        "complete": (path / "model.safetensors").is_file(),
        "bytes": _bytes_under(path),
    }


def _describe_training(path: Path) -> dict[str, Any]:
    identity = (read_json(path / "config.json") or {}).get("identity", {})
    tokenizer = path / "tokenizer"
    complete = output_kind(tokenizer) == "revq-tokenizer"
    part = {"tokenizer": _describe_tokenizer(tokenizer)} if complete else {}
    checkpoints = sorted(entry.name for entry in (path / "checkpoints").glob("*") if not entry.name.startswith("."))
    return {**identity, "complete": complete, "checkpoints": checkpoints, "bytes": _bytes_under(path), **part}


def _describe_evaluation(path: Path) -> dict[str, Any]:
    metrics = read_json(path / "metrics.json")
    if metrics is None or "rows" not in metrics:
        return {"complete": False}
    names = ("images", "tokens_per_image", "bits_per_image", "codebook_usage", "fingerprints", "rows", "notes")
    return {"complete": True, "report": str(path / "report.html"), **{name: metrics[name] for name in names if name in metrics}}


def _describe_run(path: Path) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name in ("latents.zarr", "codebooks", "rectifier", "evaluation"):
        parts[name] = describe(path / name)["kind"] if (path / name).exists() else "not made yet"
    evaluation = _describe_evaluation(path / "evaluation") if (path / "evaluation").exists() else {}
    return {**parts, "bytes": _bytes_under(path), **evaluation}


def _bytes_under(path: Path) -> int:
    return sum(sizes_under(path).values())


def _verify(location: str | Path, kind: str) -> Iterator[Event]:
    """Read everything of revq's at `location` again; raises the part's own error at the first fault."""
    if kind == "revq-latents":
        yield from verify_store(open_folder(location))
        return
    path = local_path(location)
    if kind == "revq-codebooks":
        _verify_codebooks(path)
    elif kind == "revq-tokenizer":
        _verify_tokenizer(path)
    elif kind == "revq-rectifier-run":
        if output_kind(path / "tokenizer"):
            _verify_tokenizer(path / "tokenizer")
    elif kind == "revq-evaluation":
        _verify_evaluation(path)
    else:
        for name in ("latents.zarr", "codebooks", "rectifier", "evaluation"):
            if (path / name).exists():
                yield from _verify(path / name, str(describe(path / name)["kind"]))


def _verify_codebooks(path: Path) -> None:
    from ..models.codebooks import load_codebooks

    codebooks = load_codebooks(path)
    identity = codebooks.identity
    expected = (identity["tokens"], identity["codes"])
    if tuple(codebooks.codebooks.shape[:2]) != expected:
        raise CodebookError(f"{path} is damaged: its codebooks must be of shape (T,K,D) with T,K = {expected}; fit them again")


def _verify_tokenizer(path: Path) -> None:
    from ..models.tokenizer import ReVQTokenizer

    tokenizer = ReVQTokenizer.from_pretrained(path)
    for name, tensor in tokenizer.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise TokenizerError(f"{path} is damaged: {name} is not finite; train again")


def _verify_evaluation(path: Path) -> None:
    missing = [name for name in ("metrics.json", "report.html", "report.md", "reconstructions.png") if not (path / name).is_file()]
    if missing:
        raise RevqError(f"evaluation {path} lacks {', '.join(missing)}; give the evaluate command again")
    metrics = read_json(path / "metrics.json") or {}
    rows = metrics.get("rows") or {}
    lacking = [name for name in _MEASURED if name not in metrics] + [f"rows.{row}" for row in _ROWS if "psnr_db" not in rows.get(row, {})]
    if lacking:
        raise RevqError(f"evaluation {path} is damaged: its metrics.json lacks {', '.join(lacking)}; remove that file and evaluate again")
