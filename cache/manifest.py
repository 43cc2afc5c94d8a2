"""The manifest: one Parquet row for each row of a split, saying which image it came from, how it was cut, and whether it could be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import replacing

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


def write_part(path: Path, rows: Sequence[ManifestRow]) -> None:
    """Write one shard's rows. Raises OutputError."""
    table = pa.table({name: [getattr(row, name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA)
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def merge_parts(path: Path, parts: Iterable[Path]) -> None:
    """Write the manifest as the parts in their order, a row group for each, holding one in memory at a time. Raises OutputError."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        for part in parts:
            writer.write_table(read_manifest(part))


def read_manifest(path: Path, *, columns: Sequence[str] | None = None) -> pa.Table:
    """The manifest as an Arrow table; `columns` None means all of them."""
    with pq.ParquetFile(path) as file:  # not read_table, which takes a folder named x=1 on the way for a column
        return file.read(columns=list(columns) if columns is not None else None)


def first_failure(path: Path) -> tuple[str, str] | None:
    """(key, reason) of the first failed row in a manifest or a part of one; None where there is none."""
    for row in read_manifest(path, columns=["key", "status", "reason"]).to_pylist():
        if row["status"] == FAILED:
            return row["key"], row["reason"]
    return None
