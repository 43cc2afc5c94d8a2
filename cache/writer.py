"""Writing one split of a latent store, shard by shard, so that a process killed at any instant loses at most the shard in hand.

A shard (one file of `latents`) is written whole and only once: a partial shard write loses data in zarr-python (its issue 3682). Beside it
go its part of the manifest and its sums; the done-marker with their checksums is the last file written. A new run redoes the shards
whose marker is missing or does not fit; the statistics are sums merged in shard order, so that they come out the same to the bit.

Zarr encodes every file in memory and a `StoreFolder` writes it, so that a store in an object store is written by the very same code.
Several ranks may write one split: a shard belongs to the rank of its number modulo their count, rank 0 creates and finishes.

Shapes: N rows; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from ..errors import ConfigError, MismatchError, OutputError, StoreError
from ..files import is_sealed, json_bytes, parse_json, seal
from .manifest import OK, ManifestRow, encode_part, failures, merge_parts
from .store import FORMAT_VERSION, RESERVED_NAMES, SPLIT_KIND, STORE_KIND, Encoding, is_store, manifest_key, split_attributes, store_attributes
from .store_folder import StoreFolder, open_folder

_CHUNK_BYTES = 2 << 20
_SHARD_BYTES = 32 << 20
_LEAST_SHARDS = 8  # a small split still gets several, so that an interruption loses about an eighth of the work at most
_PACKAGES = ("revq", "torch", "diffusers", "zarr", "numcodecs", "numpy", "pillow")
_CHECKING_THREADS = 8
State = Literal["new", "resume", "complete"]


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """What a split will hold; a run with another plan is another run."""

    name: str
    images: int
    views: int
    seed: int
    source: str
    """Name of the image source."""
    order_sha256: str
    """Of the source's image names, labels and boxes in their order."""
    chunk_rows: int
    shard_rows: int
    classes: tuple[tuple[str, int], ...] = ()
    """(name, number) of every class that has a name, as its labels are: see `classes.py`."""
    unnamed_labels: bool = False
    """Some labels are numbers without names."""

    @property
    def rows(self) -> int:
        return self.images * self.views


@dataclass(frozen=True)
class Shard:
    """Rows start .. stop of a split, which lie in one file."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def check_split_name(name: str) -> None:
    """Raises ConfigError where `name` cannot be a split's: it becomes a folder of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in RESERVED_NAMES:
        raise ConfigError(f'split "{name}" must be letters, digits, "-", "_" or ".", and neither "manifest" nor "progress"; such as "train"')


def shard_layout(rows: int, views: int, row_bytes: int, *, batch_size: int = 1, shard_rows: int | None = None) -> tuple[int, int]:
    """(chunk_rows, shard_rows): chunks of about 2 MiB, shards of about 32 MiB, or an eighth of the rows where that is less.

    Both are whole images, a shard is whole chunks, and the eighth is rounded up to whole batches.
    `shard_rows` None means that size, else it is rounded up to whole chunks.
    """
    if shard_rows is None:
        shard_rows = min(_SHARD_BYTES // row_bytes, _round_up(math.ceil(rows / _LEAST_SHARDS), batch_size))
    chunk_rows = _round_up(max(1, min(_CHUNK_BYTES // row_bytes, shard_rows)), views)
    return chunk_rows, _round_up(max(1, shard_rows), chunk_rows)


def target_state(path: str | Path | StoreFolder, encoding: Encoding, plan: SplitPlan, *, overwrite: bool = False) -> State:
    """Whether the split is new, half made by the same run, or complete. Writes nothing.

    Raises:
        OutputError: `path` is a file or a folder that holds something else.
        StoreError: it is damaged, or a store of another format version.
        MismatchError: its latents come from another encoding, or the split from another run (and `overwrite` is off).
    """
    folder = open_folder(path)
    if not holds_store(folder):
        return "new"
    there = Encoding.from_attributes(store_attributes(folder))
    splits = split_attributes(folder, but=plan.name if overwrite else None)
    differences = there.differences(encoding)
    if splits and differences:
        raise MismatchError(
            f"latent store {folder.name} has encoding {there.fingerprint}, this run has {encoding.fingerprint} ({differences}); "
            f"choose another store, or the settings of this one"
        )
    if plan.name not in splits:
        return "new"
    found = splits[plan.name]
    changed = [f"{name}: {found.get(name)} there, {value} asked" for name, value in _identity(plan).items() if found.get(name) != value]
    if changed:
        differing = "; ".join(changed[:3])
        raise MismatchError(
            f'split "{plan.name}" of {folder.name} was made by another run ({differing}); choose another --split, or --overwrite this one'
        )
    return "complete" if found["complete"] else "resume"


def holds_store(folder: StoreFolder) -> bool:
    """Whether a latent store is in `folder`, which may also be new or empty; raises OutputError where it is a file or holds anything else."""
    if is_store(folder):
        return True
    if folder.is_file():
        raise OutputError(f"the store must be a folder, but {folder.name} is a file; choose another path")
    if entries := folder.children():
        found = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise OutputError(f"{folder.name} holds something else than a latent store ({found}); choose a new or empty folder")
    return False


def remove_progress(path: str | Path | StoreFolder, split: str) -> None:
    """Remove what a complete split no longer needs; a killed process may have left it."""
    folder = open_folder(path)
    folder.remove(f"progress/{split}")
    if not folder.children("progress"):  # another split may be in the making
        folder.remove("progress")


class SplitWriter:
    """Writes the shards of one split in any order, each whole; `finish` makes it readable."""

    def __init__(
        self, path: str | Path | StoreFolder, encoding: Encoding, plan: SplitPlan, *, overwrite: bool = False, rank: int = 0, ranks: int = 1
    ) -> None:
        """Create the split, or take up the one that the same run has begun. Whoever writes should hold the folder's lock.

        Args:
            rank, ranks: this process's number among those that write the split together. Rank 0 comes first; the others find it created.

        Raises:
            OutputError, StoreError, MismatchError: see `target_state` and `StoreFolder`.
        """
        self._folder = open_folder(path)
        state = target_state(self._folder, encoding, plan, overwrite=overwrite and rank == 0)
        if state != "new":
            found = split_attributes(self._folder)[plan.name]
            plan = replace(plan, chunk_rows=found["chunk_rows"], shard_rows=found["shard_rows"])
        self.encoding, self.plan = encoding, plan
        if rank == 0:
            self._folder.sweep()
            if state == "new":
                self._remove_split()
            if state == "new" or self._folder.read(f"{plan.name}/latents/zarr.json") is None:
                self._create()
        starts = range(0, plan.rows, plan.shard_rows)
        self.shards = [Shard(index, start, min(start + plan.shard_rows, plan.rows)) for index, start in enumerate(starts)]
        self.own = self.shards[rank::ranks]
        """Those that this rank writes."""
        self.damaged: list[Shard] = []
        """Own shards that an earlier run had finished and that are no longer what it wrote."""
        self.todo = self._find_todo()
        """Own shards that are still to be written."""

    @property
    def rows_own(self) -> int:
        """Rows of this rank's shards."""
        return sum(map(len, self.own))

    @property
    def rows_done(self) -> int:
        """Own rows that an earlier run has finished."""
        return self.rows_own - sum(map(len, self.todo))

    def write_shard(self, shard: Shard, latents: NDArray[Any], rows: Sequence[ManifestRow]) -> None:
        """Write one shard for good.

        Args:
            latents: (len(shard),C,H,W) of the store's dtype; zeros where the image failed.
            rows: their part of the manifest.

        Raises:
            OutputError: no room, or no permission.
        """
        assert latents.shape == (len(shard), *self.encoding.latent_shape)
        assert len(rows) == len(shard)
        ok = np.array([row.status == OK for row in rows])
        if shard in self.damaged:
            self._folder.remove(self._marker(shard))
        files = {
            self._shard_key(shard): self._encode_shard(shard, latents),
            self._part(shard, "parquet"): encode_part(rows),
            self._part(shard, "npy"): _npy(_sums(latents[ok])),
        }
        for key, data in files.items():
            self._folder.write(key, data)
        counts = {"start": shard.start, "stop": shard.stop, "ok": int(ok.sum()), "failed": int((~ok).sum())}
        marker = seal({**counts, "files_sha256": {key: _sha256(data) for key, data in files.items()}})
        self._folder.write(self._marker(shard), json_bytes(marker))

    def failures(self) -> Iterator[tuple[Shard, dict[str, Any]]]:
        """The images that could not be read in this rank's finished shards, each with its shard, as `manifest.failures` has them."""
        for shard in self.own:
            marker = None if shard in self.todo else self._read_marker(shard)
            if marker and marker["failed"]:
                yield from ((shard, failure) for failure in failures(self._read_checked(self._part(shard, "parquet"), marker)))

    def redo(self, shards: Collection[Shard]) -> None:
        """Have finished shards of this rank written again."""
        for shard in shards:
            self._folder.remove(self._marker(shard))
        self.todo = [shard for shard in self.own if shard in shards or shard in self.todo]

    def finish(self) -> Mapping[str, Any]:
        """Merge what the shards left, mark the split complete and return its attributes; for rank 0, when all ranks have written theirs.

        Raises:
            StoreError: a shard is missing, or every image failed.
            OutputError: no room, or no permission.
        """
        markers = [self._read_marker(shard) for shard in self.shards]
        missing = [shard.index for shard, marker in zip(self.shards, markers, strict=True) if marker is None]
        if missing:
            raise StoreError(
                f"{len(missing)} shards of {self._folder.name} (first: number {missing[0]}) are not finished; give the same command again"
            )
        done = [marker for marker in markers if marker is not None]
        ok_rows = sum(marker["ok"] for marker in done)
        if ok_rows == 0:
            first = failures(self._read_checked(self._part(self.shards[0], "parquet"), done[0]))[0]
            told = f"the first is {first['key']} ({first['reason']})"
            raise StoreError(f"none of the {self.plan.images} images of {self.plan.source} can be read; {told}")
        total = np.zeros((2, *self.encoding.latent_shape), np.float64)
        for shard, marker in zip(self.shards, done, strict=True):
            total += np.load(io.BytesIO(self._read_checked(self._part(shard, "npy"), marker)))
        mean, mean_of_squares = total / ok_rows
        arrays = {**self._write_manifest(done), "mean": mean, "variance": np.maximum(mean_of_squares - mean * mean, 0)}
        for name, values in arrays.items():
            self._write_array(name, values)
        failed = sum(marker["failed"] for marker in done) // self.plan.views
        shard_sha256 = [marker["files_sha256"][self._shard_key(shard)] for shard, marker in zip(self.shards, done, strict=True)]
        attributes = self._write_attributes(complete=True, failed=failed, shard_sha256=shard_sha256)
        remove_progress(self._folder, self.plan.name)
        return attributes

    def _write_manifest(self, markers: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
        """The manifest of the whole split; returns its columns that become arrays."""
        parts = (self._read_checked(self._part(shard, "parquet"), marker) for shard, marker in zip(self.shards, markers, strict=True))
        labels, oks = [], []
        with self._folder.creating(manifest_key(self.plan.name)) as file:
            for table in merge_parts(file, parts):
                labels.append(np.asarray(table["label"], np.int32))
                oks.append(np.asarray(pc.equal(table["status"], OK)))
        return {"label": np.concatenate(labels), "ok": np.concatenate(oks)}

    def _create(self) -> None:
        """The groups and the empty array of latents, each file whole; the split's own zarr.json comes last but one, before its array."""
        kind = {"kind": STORE_KIND, "format_version": FORMAT_VERSION, "fingerprint": self.encoding.fingerprint}
        if not (is_store(self._folder) and split_attributes(self._folder)):
            self._write_group("zarr.json", {**kind, **self.encoding.attributes()})
        self._write_attributes(complete=False, failed=0, shard_sha256=[])
        self._folder.write(f"{self.plan.name}/latents/zarr.json", self._latent_files()["zarr.json"].to_bytes())

    def _latent_files(self, shard: Shard | None = None, latents: NDArray[Any] | None = None) -> dict[str, Any]:
        """The files that Zarr makes of the array of latents when one shard is written to it, in memory, by key; None: the empty array's."""
        shape = self.encoding.latent_shape
        files: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(store_dict=files),
            shape=(self.plan.rows, *shape),
            chunks=(self.plan.chunk_rows, *shape),
            shards=(self.plan.shard_rows, *shape),
            dtype=self.encoding.dtype,
            # Latents hardly compress (8 % at best), so what decodes fastest (docs/notes/store.md); crc32c finds a flipped bit on read. Zarr calls
            # Blosc outside the main thread, where it uses no threads of its own and so gives the same bytes each time.
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=math.nan,  # so that a lost file reads as NaN, which no reader takes for data
            config={"write_empty_chunks": True},  # there are none; else zarr compares every chunk with NaN, which takes longer than to encode it
        )
        if shard is not None and latents is not None:
            array[shard.start : shard.stop] = latents
        return files

    def _encode_shard(self, shard: Shard, latents: NDArray[Any]) -> bytes:
        return bytes(self._latent_files(shard, latents)[f"c/{shard.index}/0/0/0"].to_bytes())

    def _write_attributes(self, *, complete: bool, failed: int, shard_sha256: list[str]) -> dict[str, Any]:
        plan = asdict(self.plan)
        name = plan.pop("name")
        versions = (split_attributes(self._folder).get(name) or {}).get("package_versions") or _package_versions()
        attributes = {"kind": SPLIT_KIND, **plan, "rows": self.plan.rows, "package_versions": versions}
        files = self._files_sha256() if complete else {}
        attributes |= {"complete": complete, "failed": failed, "shard_sha256": shard_sha256, "files_sha256": files}
        return self._write_group(f"{name}/zarr.json", attributes)

    def _files_sha256(self) -> dict[str, str]:
        """Of every file of the split but its shards and its attributes."""
        name = self.plan.name
        keys = [key for key in self._folder.sizes(name) if not key.startswith(f"{name}/latents/c/") and key != f"{name}/zarr.json"]
        return {key: hashlib.sha256(self._folder.read(key) or b"").hexdigest() for key in [*keys, manifest_key(name)]}

    def _write_group(self, key: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """A Zarr v3 group is this one file; written by ourselves because it must be replaced whole."""
        sealed = seal(attributes)
        self._folder.write(key, json_bytes({"attributes": sealed, "zarr_format": 3, "node_type": "group"}))
        return sealed

    def _write_array(self, name: str, values: NDArray[Any]) -> None:
        """A small array in one chunk."""
        files: dict[str, Any] = {}
        compressors = [ZstdCodec(level=1), Crc32cCodec()]
        zarr.create_array(MemoryStore(store_dict=files), data=values, chunks=values.shape, compressors=compressors, fill_value=0)
        self._folder.remove(f"{self.plan.name}/{name}")
        for key, data in files.items():
            self._folder.write(f"{self.plan.name}/{name}/{key}", data.to_bytes())

    def _remove_split(self) -> None:
        """Its attributes go first, so that a half removed split is never taken for one that is complete."""
        name = self.plan.name
        for key in (f"{name}/zarr.json", manifest_key(name), name, f"progress/{name}"):
            self._folder.remove(key)

    def _find_todo(self) -> list[Shard]:
        """Own shards without a marker, or whose files do not fit it; the latter are noted as damage."""
        with ThreadPoolExecutor(_CHECKING_THREADS, thread_name_prefix="revq-check") as pool:
            states = list(pool.map(self._state_of, self.own))
        self.damaged += [shard for shard, state in zip(self.own, states, strict=True) if state == "damaged"]
        return [shard for shard, state in zip(self.own, states, strict=True) if state != "done"]

    def _state_of(self, shard: Shard) -> Literal["done", "damaged", "missing"]:
        data = self._folder.read(self._marker(shard))
        if data is None:
            return "missing"
        marker = self._read_marker(shard)
        if marker is None:
            return "damaged"
        found = {key: _sha256(self._folder.read(key)) for key in marker["files_sha256"]}
        return "done" if found == marker["files_sha256"] else "damaged"

    def _read_marker(self, shard: Shard) -> dict[str, Any] | None:
        """None where there is none, or it is damaged."""
        marker = parse_json(self._folder.read(self._marker(shard)))
        return marker if marker is not None and is_sealed(marker) else None

    def _read_checked(self, key: str, marker: Mapping[str, Any]) -> bytes:
        """A file that a marker vouches for."""
        data = self._folder.read(key)
        if data is None or _sha256(data) != marker["files_sha256"][key]:
            raise StoreError(f"{key} of {self._folder.name} was damaged after it was written; give the same command again to redo it")
        return data

    def _shard_key(self, shard: Shard) -> str:
        return f"{self.plan.name}/latents/c/{shard.index}/0/0/0"

    def _part(self, shard: Shard, suffix: str) -> str:
        return f"progress/{self.plan.name}/shard-{shard.index:05d}.{suffix}"

    def _marker(self, shard: Shard) -> str:
        return self._part(shard, "json")


def _identity(plan: SplitPlan) -> dict[str, Any]:
    """What must agree for two runs to be one. Not the cut into files: a run goes on with the one it began with, and with its classes."""
    others = {"name", "chunk_rows", "shard_rows", "classes", "unnamed_labels"}
    return {name: value for name, value in asdict(plan).items() if name not in others}


def _sums(latents: NDArray[Any]) -> NDArray[np.float64]:
    """(2,C,H,W): sum and sum of squares over the rows, in float64, a few rows at a time to bound memory."""
    total = np.zeros((2, *latents.shape[1:]), np.float64)
    for start in range(0, len(latents), 256):
        block = latents[start : start + 256].astype(np.float64)
        total[0] += block.sum(0)
        total[1] += (block * block).sum(0)
    return total


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "unknown"
    return versions


def _round_up(value: int, step: int) -> int:
    return math.ceil(value / step) * step
