"""What lies at a path: a latent store, codebooks, a tokenizer, a training run, an evaluation, or a whole run; and whether it is sound."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.store import LatentSplit, LatentStore, is_store, split_attributes
from ..errors import CodebookError, RevqError, StoreError, TokenizerError
from ..files import output_kind, read_json, sha256_file
from ..stages.events import Advance, Begin, Event, Note, Result

_KINDS = "a latent store, codebooks, a tokenizer, a run folder of train-rectifier, an evaluation, or the folder of `revq run`"


def info(path: str, *, verify: bool = False) -> Iterator[Event]:
    """Describe what is at `path`; with `verify` read all of it again and check it.

    Raises:
        RevqError: nothing is there, it is nothing of revq's, or (with `verify`) it is damaged.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise RevqError(f"{path} does not exist; give the path of {_KINDS}")
    value = describe(folder)
    if verify:
        yield from _verify(folder, str(value["kind"]))
        value["verified"] = True
    yield Result(value=value)


def describe(path: Path) -> dict[str, Any]:
    """JSON values that say what is at `path`, and under "kind" what it is.

    Raises:
        RevqError: it is nothing of revq's.
    """
    if is_store(path):
        return _describe_store(path)
    kind = output_kind(path)
    describers = {
        "revq-codebooks": _describe_codebooks,
        "revq-tokenizer": _describe_tokenizer,
        "revq-rectifier-run": _describe_training,
        "revq-evaluation": _describe_evaluation,
        "revq-run": _describe_run,
    }
    if kind not in describers:
        found = f"its config.json is of kind {kind!r}" if kind else "it has neither a store's zarr.json nor a config.json with a kind"
        raise RevqError(f"{path} is nothing that revq made ({found}); give the path of {_KINDS}")
    return {"path": str(path), "kind": kind, **describers[kind](path)}


def _describe_store(path: Path) -> dict[str, Any]:
    store = LatentStore.open(path)
    encoding = store.encoding
    splits = {name: _describe_split(path, name, attributes) for name, attributes in split_attributes(path).items()}
    return {
        "path": str(path),
        "kind": "revq-latents",
        "fingerprint": store.fingerprint,
        "latent_shape": list(encoding.latent_shape),
        "dtype": encoding.dtype,
        "image_size": encoding.image_size,
        "vae": encoding.vae["id"],
        "vae_fingerprint": encoding.vae["fingerprint"],
        "bytes": _bytes_under(path),
        **{f"split {name}": part for name, part in splits.items()},
    }


def _describe_split(path: Path, name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    known = ("rows", "images", "views", "failed", "seed", "source", "complete")
    part = {field: attributes[field] for field in known if field in attributes}
    if not part["complete"]:
        markers = len(list((path / "progress" / name).glob("shard-*.json")))
        part["finished_shards"] = f"{markers} of {math.ceil(attributes['rows'] / attributes['shard_rows'])}"
    return {**part, "bytes": _bytes_under(path / name)}


def _describe_codebooks(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json") or {}
    file = path / "codebooks.safetensors"
    return {**config.get("identity", {}), "complete": file.is_file(), "bytes": _bytes_under(path)}


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
    if metrics is None:
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
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _verify(path: Path, kind: str) -> Iterator[Event]:
    """Read everything of revq's at `path` again; raises the part's own error at the first fault."""
    if kind == "revq-latents":
        yield from _verify_store(path)
    elif kind == "revq-codebooks":
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


def _verify_store(path: Path) -> Iterator[Event]:
    """Every chunk's checksum, finite values, zeros where a row failed, the manifest and the mean against the rows."""
    store = LatentStore.open(path)
    for name, attributes in split_attributes(path).items():
        if not attributes["complete"]:
            yield Note(text=f'split "{name}" is not finished; give the same encode-latents command again to finish it', warning=True)
            continue
        yield from _verify_split(store, store[name])


def _verify_split(store: LatentStore, split: LatentSplit) -> Generator[Event, None, None]:
    rows, where = len(split), f'split "{split.name}" of {store.path}'
    if split.latents.shape != (rows, *store.encoding.latent_shape) or len(split.ok) != rows or len(split.labels) != rows:
        raise StoreError(
            f"{where} is damaged: {rows} rows are announced, but latents has the shape {split.latents.shape}; encode it again with --overwrite"
        )
    manifest_ok = np.array([status == "ok" for status in split.manifest()["status"].to_pylist()])
    if not np.array_equal(manifest_ok, split.ok):
        raise StoreError(f"{where} is damaged: its manifest and its array ok disagree; encode it again with --overwrite")
    sums = np.zeros(store.encoding.latent_shape)
    yield Begin(task=f"verify {split.name}", total=rows, unit="rows")
    for start in range(0, rows, split.shard_rows):
        stop = min(start + split.shard_rows, rows)
        _check_file(store.path, split, start // split.shard_rows, where)
        sums += _checked_sum(split, start, stop, where)
        yield Advance(done=stop)
    mean = sums / max(int(split.ok.sum()), 1)
    if not np.allclose(mean, split.mean, rtol=1e-6, atol=1e-6):
        raise StoreError(f"{where} is damaged: its mean is not that of its rows; encode it again with --overwrite")


def _check_file(store: Path, split: LatentSplit, shard: int, where: str) -> None:
    """The SHA-256 that was taken when the shard was written."""
    file = store / split.name / "latents" / split.latents.metadata.encode_chunk_key((shard, 0, 0, 0))
    if not file.is_file() or sha256_file(file) != split.attributes["shard_sha256"][shard]:
        raise StoreError(f"{where} is damaged: {file} is missing or is not what was written; encode it again with --overwrite")


def _checked_sum(split: LatentSplit, start: int, stop: int, where: str) -> np.ndarray:
    """(C,H,W) float64 sum over the ok rows start .. stop."""
    try:
        block = np.asarray(split.latents[start:stop], dtype=np.float64)
    except Exception as error:  # a failed checksum is a ValueError, a cut file a RuntimeError, and Zstd has its own
        reason = " ".join(str(error).split())[:160]
        raise StoreError(f"{where} is damaged in rows {start} to {stop - 1} ({reason}); encode it again with --overwrite") from error
    ok = split.ok[start:stop]
    unsound = ~np.isfinite(block).all(axis=(1, 2, 3)) | (~ok & block.any(axis=(1, 2, 3)))
    if unsound.any():
        raise StoreError(f"{where} is damaged: row {start + int(unsound.argmax())} holds values it must not hold; encode it again with --overwrite")
    return np.asarray(block[ok].sum(axis=0))


def _verify_codebooks(path: Path) -> None:
    from ..models.codebooks import load_codebooks

    codebooks = load_codebooks(path)
    identity = codebooks.identity
    expected = (identity["tokens"], identity["codes"])
    if tuple(codebooks.codebooks.shape[:2]) != expected or not bool(codebooks.codebooks.isfinite().all()):
        raise CodebookError(f"{path} is damaged: its codebooks must be finite and of shape (T,K,D) with T,K = {expected}; fit them again")


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
