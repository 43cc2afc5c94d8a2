"""Writing one split of a latent store, shard by shard, so that a process killed at any instant loses at most the shard in hand.

A shard (one file of `latents`) is written whole and only once: a partial shard write loses data in zarr-python (its issue 3682). Beside it
go its part of the manifest and its sums; the done-marker with their checksums is the last file written. A new run redoes the shards
whose marker is missing or does not fit; the statistics are sums merged in shard order, so that they come out the same to the bit.

Shapes: N rows; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from ..errors import ConfigError, MismatchError, OutputError, StoreError
from ..files import disk_errors, read_json, sha256_file, write_bytes, write_json
from .manifest import OK, ManifestRow, first_failure, merge_parts, read_manifest, write_part
from .store import FORMAT_VERSION, RESERVED_NAMES, SPLIT_KIND, STORE_KIND, Encoding, is_store, manifest_path, split_attributes, store_attributes

_CHUNK_BYTES = 2 << 20
_SHARD_BYTES = 32 << 20
_LEAST_SHARDS = 8  # a small split still gets several, so that an interruption loses about an eighth of the work at most
_PACKAGES = ("revq", "torch", "diffusers", "zarr", "numcodecs", "numpy", "pillow")
_TEMPORARY = ("*.partial", "*.tmp")  # zarr's and ours, left by a killed process
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


def target_state(path: Path, encoding: Encoding, plan: SplitPlan, *, overwrite: bool = False) -> State:
    """Whether the split is new, half made by the same run, or complete. Writes nothing.

    Raises:
        OutputError: `path` is a file or a folder that holds something else.
        StoreError: it is a store of another format version.
        MismatchError: its latents come from another encoding, or the split from another run (and `overwrite` is off).
    """
    check_target(path)
    if not is_store(path):
        return "new"
    there = Encoding.from_attributes(store_attributes(path))
    splits = split_attributes(path)
    kept = [name for name in splits if not (overwrite and name == plan.name)]
    differences = there.differences(encoding)
    if kept and differences:
        raise MismatchError(
            f"latent store {path} has encoding {there.fingerprint}, this run has {encoding.fingerprint} ({differences}); "
            f"choose another store, or the settings of this one"
        )
    if plan.name not in kept:
        return "new"
    found = splits[plan.name]
    changed = [f"{name}: {found.get(name)} there, {value} asked" for name, value in _identity(plan).items() if found.get(name) != value]
    if changed:
        raise MismatchError(
            f'split "{plan.name}" of {path} was made by another run ({"; ".join(changed[:3])}); choose another --split, or --overwrite this one'
        )
    return "complete" if found["complete"] else "resume"


def check_target(path: Path) -> None:
    """Raises OutputError where `path` is a file or a folder that holds anything but a latent store."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"the store must be a folder, but {path} is a file; choose another path")
    entries = sorted(entry.name for entry in path.iterdir() if not _is_temporary(entry)) if path.exists() else []
    if entries and not is_store(path):
        found = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise OutputError(f"{path} holds something else than a latent store ({found}); choose a new or empty folder")


def remove_progress(path: Path, split: str) -> None:
    """Remove what a complete split no longer needs; a killed process may have left it."""
    shutil.rmtree(path / "progress" / split, ignore_errors=True)
    with contextlib.suppress(OSError):  # missing, or another split is in the making
        (path / "progress").rmdir()


class SplitWriter:
    """Writes the shards of one split in any order, each whole; `finish` makes it readable."""

    def __init__(self, path: Path, encoding: Encoding, plan: SplitPlan, *, overwrite: bool = False) -> None:
        """Create the split, or take up the one that the same run has begun.

        Raises:
            OutputError, StoreError, MismatchError: see `target_state` and `disk_errors`.
        """
        state = target_state(path, encoding, plan, overwrite=overwrite)
        if state != "new":
            found = split_attributes(path)[plan.name]
            plan = replace(plan, chunk_rows=found["chunk_rows"], shard_rows=found["shard_rows"])
        self.path, self.encoding, self.plan = path, encoding, plan
        self._split = path / plan.name
        self._progress = path / "progress" / plan.name
        with disk_errors(path):
            if state == "new":
                self._remove_split()
            self._sweep()
            if state == "new" or not (self._split / "latents" / "zarr.json").exists():
                self._create()
            self._latents = zarr.open_array(str(self._split / "latents"), mode="r+", zarr_format=3)
        self.shards = [
            Shard(index, start, min(start + plan.shard_rows, plan.rows)) for index, start in enumerate(range(0, plan.rows, plan.shard_rows))
        ]
        self.damaged: list[Shard] = []
        self.todo = [shard for shard in self.shards if not self._is_done(shard)]

    @property
    def rows_done(self) -> int:
        """Rows that an earlier run has finished."""
        return self.plan.rows - sum(map(len, self.todo))

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
        with disk_errors(self.path):
            self._marker(shard).unlink(missing_ok=True)
            self._shard_file(shard).unlink(missing_ok=True)
            self._latents[shard.start : shard.stop] = latents
            _flush(self._shard_file(shard))
            write_part(self._part(shard, "parquet"), rows)
            write_bytes(self._part(shard, "npy"), _npy(_sums(latents[ok])))
            marker = {"start": shard.start, "stop": shard.stop, "ok": int(ok.sum()), "failed": int((~ok).sum())}
            write_json(self._marker(shard), {**marker, "sha256": self._checksums(shard)})

    def first_failure(self) -> tuple[str, str] | None:
        """(key, reason) of the first failed image in the finished shards; None where there is none."""
        for shard in self.shards:
            marker = read_json(self._marker(shard))
            if marker and marker["failed"]:
                return first_failure(self._part(shard, "parquet"))
        return None

    def finish(self) -> Mapping[str, Any]:
        """Merge what the shards left, mark the split complete and return its attributes.

        Raises:
            StoreError: every image failed.
            OutputError: no room, or no permission.
        """
        markers = [read_json(self._marker(shard)) or {} for shard in self.shards]
        ok_rows = sum(marker["ok"] for marker in markers)
        if ok_rows == 0:
            key, reason = self.first_failure() or ("", "")
            raise StoreError(f"none of the {self.plan.images} images of {self.plan.source} can be read; the first is {key} ({reason})")
        total = np.zeros((2, *self.encoding.latent_shape), np.float64)
        for shard in self.shards:
            total += np.load(self._part(shard, "npy"))
        mean, mean_of_squares = total / ok_rows
        manifest = manifest_path(self.path, self.plan.name)
        merge_parts(manifest, (self._part(shard, "parquet") for shard in self.shards))
        columns = read_manifest(manifest, columns=["label", "status"])
        arrays = {
            "label": np.asarray(columns["label"], np.int32),
            "ok": np.asarray(pc.equal(columns["status"], OK)),
            "mean": mean,
            "variance": np.maximum(mean_of_squares - mean * mean, 0),
        }
        with disk_errors(self.path):
            for name, values in arrays.items():
                self._write_array(name, values)
            failed = sum(marker["failed"] for marker in markers) // self.plan.views
            shard_sha256 = [marker["sha256"]["shard"] for marker in markers]
            attributes = self._write_attributes(complete=True, failed=failed, shard_sha256=shard_sha256)
        remove_progress(self.path, self.plan.name)
        return attributes

    def _create(self) -> None:
        """The groups and the empty array of latents, each file whole; the split's own zarr.json comes last but one, before its array."""
        kind = {"kind": STORE_KIND, "format_version": FORMAT_VERSION, "fingerprint": self.encoding.fingerprint}
        if len(split_attributes(self.path) if self.path.exists() else {}) == 0:
            _write_group(self.path, {**kind, **self.encoding.attributes()})
        self._write_attributes(complete=False, failed=0, shard_sha256=[])
        shape = self.encoding.latent_shape
        zarr.create_array(
            str(self._split),
            name="latents",
            shape=(self.plan.rows, *shape),
            chunks=(self.plan.chunk_rows, *shape),
            shards=(self.plan.shard_rows, *shape),
            dtype=self.encoding.dtype,
            # Latents hardly compress (8 % at best), so what decodes fastest (docs/store.md); crc32c finds a flipped bit on read.
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=math.nan,  # so that a lost file reads as NaN, which no reader takes for data
        )

    def _write_attributes(self, *, complete: bool, failed: int, shard_sha256: list[str]) -> dict[str, Any]:
        plan = asdict(self.plan)
        name = plan.pop("name")
        versions = (split_attributes(self.path).get(name) or {}).get("package_versions") or _package_versions()
        attributes = {"kind": SPLIT_KIND, **plan, "rows": self.plan.rows, "package_versions": versions}
        attributes |= {"complete": complete, "failed": failed, "shard_sha256": shard_sha256}
        _write_group(self._split, attributes)
        return attributes

    def _write_array(self, name: str, values: NDArray[Any]) -> None:
        shutil.rmtree(self._split / name, ignore_errors=True)
        compressors = [ZstdCodec(level=1), Crc32cCodec()]
        zarr.create_array(str(self._split), name=name, data=values, chunks=values.shape, compressors=compressors, fill_value=0)
        for file in (self._split / name).rglob("*"):
            if file.is_file():
                _flush(file)

    def _remove_split(self) -> None:
        """Its attributes go first, so that a half removed split is never taken for one that is complete."""
        (self._split / "zarr.json").unlink(missing_ok=True)
        manifest_path(self.path, self.plan.name).unlink(missing_ok=True)
        for folder in (self._split, self._progress):
            shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove the temporary files of a killed process."""
        for folder in (self._split, self._progress):
            for pattern in _TEMPORARY:
                for file in folder.rglob(pattern):
                    file.unlink(missing_ok=True)
        for folder in (self.path, self.path / "manifest"):
            for pattern in _TEMPORARY:
                for file in folder.glob(pattern):
                    file.unlink(missing_ok=True)

    def _is_done(self, shard: Shard) -> bool:
        """Whether the marker is there and its checksums fit; a marker that does not fit is noted as damage."""
        marker = read_json(self._marker(shard))
        if marker is not None and marker.get("sha256") == self._checksums(shard):
            return True
        if self._marker(shard).exists():
            self.damaged.append(shard)
        return False

    def _checksums(self, shard: Shard) -> dict[str, str | None]:
        files = {"shard": self._shard_file(shard), "manifest": self._part(shard, "parquet"), "sums": self._part(shard, "npy")}
        return {name: sha256_file(file) if file.exists() else None for name, file in files.items()}

    def _shard_file(self, shard: Shard) -> Path:
        return self._split / "latents" / self._latents.metadata.encode_chunk_key((shard.index, 0, 0, 0))

    def _part(self, shard: Shard, suffix: str) -> Path:
        return self._progress / f"shard-{shard.index:05d}.{suffix}"

    def _marker(self, shard: Shard) -> Path:
        return self._part(shard, "json")


def _identity(plan: SplitPlan) -> dict[str, Any]:
    """What must agree for two runs to be one. Not the cut into files: a run goes on with the one it began with."""
    return {name: value for name, value in asdict(plan).items() if name not in {"name", "chunk_rows", "shard_rows"}}


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


def _write_group(path: Path, attributes: Mapping[str, Any]) -> None:
    """A Zarr v3 group is this one file; written by ourselves because it must be replaced whole and reach the disk before what follows."""
    write_json(path / "zarr.json", {"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def _flush(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _is_temporary(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _TEMPORARY)


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
