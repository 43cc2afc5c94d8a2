"""What `revq info` says of a latent store, and how it verifies one: every file against its checksum, every value against the rules.

Shapes: N rows; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.manifest import failures_by_reason
from ..cache.precision import TOLERATED_LOSS, RoundingSums
from ..cache.store import LatentSplit, LatentStore, split_attributes
from ..cache.store_folder import StoreFolder
from ..errors import StoreError, one_line
from ..stages.events import Advance, Begin, Event, Note

_ROWS_OF_A_SHARD = 64  # enough to know what rounding takes of their channels


def describe_store(folder: StoreFolder) -> dict[str, Any]:
    """JSON values: the encoding, and for each split its counts, sizes and failures by reason.

    Raises:
        StoreError: it is no latent store, or damaged.
    """
    store = LatentStore(folder, LatentStore.open(folder.name).encoding)
    encoding = store.encoding
    splits = {name: _describe_split(store, name, attributes) for name, attributes in split_attributes(folder).items()}
    return {
        "path": folder.name,
        "kind": "revq-latents",
        "fingerprint": store.fingerprint,
        "latent_shape": list(encoding.latent_shape),
        "dtype": encoding.dtype,
        "image_size": encoding.image_size,
        "resize_filter": encoding.resize_filter,
        "crop": encoding.crop,
        "vae": encoding.vae["id"],
        "vae_fingerprint": encoding.vae["fingerprint"],
        "bytes": sum(folder.sizes().values()),
        "splits": splits,
    }


def _describe_split(store: LatentStore, name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    sizes = store.folder.sizes(name)
    stored = sum(size for key, size in sizes.items() if key.startswith(f"{name}/latents/c/"))
    raw = attributes["rows"] * math.prod(store.encoding.latent_shape) * np.dtype(store.encoding.dtype).itemsize
    part = {field: attributes[field] for field in ("images", "views", "rows", "failed", "seed", "source")}
    shards = math.ceil(attributes["rows"] / attributes["shard_rows"])
    if not attributes["complete"]:
        markers = sum(key.endswith(".json") for key in store.folder.children(f"progress/{name}"))
        return {**part, "bytes": sum(sizes.values()), "compression": None, "state": f"{markers} of {shards} shards", "failures": {}}
    failures = failures_by_reason(store[name].manifest()) if attributes["failed"] else {}
    return {**part, "bytes": sum(sizes.values()), "compression": round(raw / max(stored, 1), 3), "state": "complete", "failures": failures}


def verify_store(folder: StoreFolder) -> Iterator[Event]:
    """Read everything again; the first fault ends it. What the dtype has rounded off is a warning: nothing is damaged, but it was lost at encoding.

    Raises:
        StoreError: a file is missing or is not what was written, or a value is not what it must be.
    """
    store = LatentStore.open(folder.name)
    for name, attributes in split_attributes(folder).items():
        if not attributes["complete"]:
            yield Note(text=f'split "{name}" is not finished; give the same encode-latents command again to finish it', warning=True)
            continue
        yield from _verify_split(store, store[name])


def _verify_split(store: LatentStore, split: LatentSplit) -> Generator[Event, None, None]:
    rows, where = len(split), f'split "{split.name}" of {store.path}'
    for key in split.attributes["files_sha256"]:
        split.read_file(key)
    if split.latents.shape != (rows, *store.encoding.latent_shape) or len(split.ok) != rows or len(split.labels) != rows:
        raise StoreError(f"{where} is damaged: it announces {rows} rows, but latents has the shape {split.latents.shape}; {_again(split)}")
    manifest_ok = np.array([status == "ok" for status in split.manifest()["status"].to_pylist()])
    if not np.array_equal(manifest_ok, split.ok):
        raise StoreError(f"{where} is damaged: its manifest and its array ok disagree; {_again(split)}")
    sums, rounding = np.zeros(store.encoding.latent_shape), RoundingSums(store.encoding.latent_shape)
    yield Begin(task=f"verify {split.name}", total=rows, unit="rows")
    for start in range(0, rows, split.shard_rows):
        stop = min(start + split.shard_rows, rows)
        _check_shard_file(store, split, start // split.shard_rows, where)
        sums += _checked_sum(split, start, stop, where, rounding)
        yield Advance(done=stop)
    mean = sums / max(int(split.ok.sum()), 1)
    if not np.allclose(mean, split.mean, rtol=1e-6, atol=1e-6):
        raise StoreError(f"{where} is damaged: its mean is not that of its rows; {_again(split)}")
    yield from (Note(text=f"{where}: {text}", warning=True) for text in _what_rounding_took(rounding, split))


def _what_rounding_took(rounding: RoundingSums, split: LatentSplit) -> Iterator[str]:
    dtype, loss = split.latents.dtype, rounding.worst()
    mend = f"{_again(split)} --dtype float32" if dtype == np.float16 else "use a VAE without that offset"
    if loss and loss.share > TOLERATED_LOSS:
        yield f"{dtype} does not resolve {loss}; {mend}"
    if dtype == np.float16 and (channels := rounding.one_valued()):
        names = ", ".join(map(str, channels[:5])) + (", ..." if len(channels) > 5 else "")
        yield f"every row is the same in channel {names}: it never varied, or float16 has rounded it off; if it should vary, {mend}"


def _check_shard_file(store: LatentStore, split: LatentSplit, shard: int, where: str) -> None:
    """The SHA-256 that was taken when the shard was written."""
    key = f"{split.name}/latents/{split.latents.metadata.encode_chunk_key((shard, 0, 0, 0))}"
    data = store.folder.read(key)
    if data is None or hashlib.sha256(data).hexdigest() != split.attributes["shard_sha256"][shard]:
        raise StoreError(f"{where} is damaged: {key} is {'missing' if data is None else 'not what was written'}; {_again(split)}")


def _checked_sum(split: LatentSplit, start: int, stop: int, where: str, rounding: RoundingSums) -> NDArray[np.float64]:
    """(C,H,W) float64 sum over the ok rows start .. stop; some of them go to `rounding`."""
    try:
        block = np.asarray(split.latents[start:stop], dtype=np.float64)
    except Exception as error:  # a failed checksum is a ValueError, a cut file a RuntimeError, and Zstd has its own
        reason = one_line(error)
        raise StoreError(f"{where} is damaged in rows {start} to {stop - 1} ({reason}); {_again(split)}") from error
    ok = split.ok[start:stop]
    unsound = ~np.isfinite(block).all(axis=(1, 2, 3)) | (~ok & block.any(axis=(1, 2, 3)))
    if unsound.any():
        raise StoreError(f"{where} is damaged: row {start + int(unsound.argmax())} holds values it must not hold; {_again(split)}")
    good = block[ok]
    rounding.add(good[:: max(1, len(good) // _ROWS_OF_A_SHARD)].astype(split.latents.dtype))
    return np.asarray(good.sum(axis=0))


def _again(split: LatentSplit) -> str:
    return f"encode it again with --split {split.name} --overwrite"
