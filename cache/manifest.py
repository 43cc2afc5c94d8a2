"""The manifest: one Parquet row for each row of a split, saying which image it came from, how it was cut, and whether it could be read."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

OK = "ok"
FAILED = "failed"

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class_name", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("view", pa.int32(), nullable=False),
        pa.field("left", pa.int32(), nullable=False),
        pa.field("top", pa.int32(), nullable=False),
        pa.field("right", pa.int32(), nullable=False),
        pa.field("bottom", pa.int32(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestRow:
    """Where one row of a split comes from. Sizes and boxes are in pixels and all 0 for an image that could not be decoded."""

    row: int
    source: str
    key: str
    label: int
    """-1 means that the image has no class."""
    class_name: str
    width: int = 0
    """Of the original image, or of its region where it is one of a larger file."""
    height: int = 0
    sha256: str = ""
    """Of the image file's bytes; empty where they could not be read."""
    view: int
    """0 is the central crop."""
    left: int = 0
    """left, top, right, bottom: what is seen, in pixels of the original file."""
    top: int = 0
    right: int = 0
    bottom: int = 0
    flipped: bool = False
    status: str
    """"ok" or "failed"."""
    reason: str = ""
    """Why the image failed; empty where it did not."""


def encode_part(rows: Sequence[ManifestRow]) -> bytes:
    """One shard's rows as the bytes of a Parquet file."""
    table = pa.table({name: [getattr(row, name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd") as writer:
        writer.write_table(table)
    return buffer.getvalue()


def merge_parts(file: BinaryIO, parts: Iterable[bytes]) -> Iterator[pa.Table]:
    """Write the manifest as the parts in their order, a row group for each, and yield each, holding one in memory at a time."""
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for part in parts:
            table = parse_manifest(part)
            writer.write_table(table)
            yield table


def parse_manifest(data: bytes, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The manifest, or a part of one, as an Arrow table; `columns` None means all of them."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=list(columns) if columns is not None else None)


def failures(data: bytes) -> list[dict[str, Any]]:
    """row, key, sha256 and reason of every image that failed in a manifest or a part of one, in their order."""
    table = parse_manifest(data, columns=["row", "key", "sha256", "view", "status", "reason"])
    failed = table.filter(pc.and_(pc.equal(table["status"], FAILED), pc.equal(table["view"], 0)))
    return failed.select(["row", "key", "sha256", "reason"]).to_pylist()


def failures_by_reason(table: pa.Table) -> dict[str, int]:
    """How many images of a manifest failed for each reason, the most frequent first."""
    failed = table.filter(pc.and_(pc.equal(table["status"], FAILED), pc.equal(table["view"], 0)))
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(failed["reason"]).to_pylist()}
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
