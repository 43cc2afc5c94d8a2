"""What Parquet files of images hold, from their footers, labels and paths alone: see `parquet_source`."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import ImageError, one_line
from ..places import Place, RandomFile
from .parquet_labels import LABEL_TYPES, FileLabels, holds_labels, no_labels, read_labels
from .place_errors import place_errors

_BUFFER_BYTES = 4 << 20  # read at once from a column: without it, pyarrow reads all of a row group's bytes first


@dataclass(frozen=True)
class Columns:
    image: str
    """Path of the leaf that holds the bytes, such as "image.bytes"."""
    path: str | None
    label: str | None
    class_names: list[str]
    """As the hub's metadata have them, by number; empty where they say nothing."""


@dataclass(frozen=True)
class Part:
    """One file."""

    place: Place
    size: int
    metadata: pq.FileMetaData


class _Reader(io.RawIOBase):
    """A remote file as pyarrow wants it, with the retries of `places`: a server's failure is no damage of the file."""

    def __init__(self, file: RandomFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        data = self._file.read_at(self._at, self._file.size - self._at if count < 0 else count)
        self._at += len(data)
        return data


def open_parquet(place: Place, **options: Any) -> pq.ParquetFile:
    source = place.path if place.filesystem is None else _Reader(place.open())
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True, **options)


def size_of(place: Place) -> int:
    return place.open().size


@contextmanager
def damage(place: Place) -> Iterator[None]:
    """What pyarrow raises on damaged pages, as the OSError of an image that cannot be read. Raises ImageError where the place fails."""
    try:
        with place_errors(place, archive=True):
            yield
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{place.base} is damaged there ({one_line(error)})") from error


def read_footer(place: Place) -> Part:
    try:
        with place_errors(place, archive=True), open_parquet(place) as file:
            return Part(place, size_of(place), file.metadata)
    except (pa.ArrowException, OSError) as error:
        raise ImageError(f"{place} is no Parquet file, or is cut off ({one_line(error)}); fetch it again") from error


def find_columns(part: Part) -> Columns:
    schema = part.metadata.schema.to_arrow_schema()
    images = [field for field in schema if _bytes_leaf(field) is not None]
    images = [field for field in images if field.name == "image"] or images
    if len(images) != 1:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ImageError(f"{part.place} must have one column of images (image: struct<bytes, path>), and has {found}; rename the right one to image")
    features = _hub_features(schema)
    classes = [name for name, feature in features.items() if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"]
    label = "label" if "label" in schema.names else classes[0] if len(classes) == 1 else None
    if label is not None and not holds_labels(schema.field(label).type):
        raise ImageError(f"{part.place} has labels of type {schema.field(label).type}; expected {LABEL_TYPES} in its column {label}")
    names = features.get(label, {}).get("names") if label in classes else None
    field = images[0]
    has_path = pa.types.is_struct(field.type) and any(leaf.name == "path" and pa.types.is_string(leaf.type) for leaf in field.type)
    class_names = [str(name) for name in names] if isinstance(names, list) else []
    return Columns(str(_bytes_leaf(field)), f"{field.name}.path" if has_path else None, label, class_names)


def _bytes_leaf(field: pa.Field) -> str | None:
    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    if pa.types.is_struct(field.type):
        return next((f"{field.name}.bytes" for leaf in field.type if leaf.name == "bytes" and is_bytes(leaf.type)), None)
    return field.name if is_bytes(field.type) else None


def _hub_features(schema: pa.Schema) -> dict[str, Any]:
    """What the datasets library wrote about the columns; empty where it wrote nothing that can be understood."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def check_same_columns(parts: Sequence[tuple[Part, Columns]]) -> None:
    """Raises ImageError where the images or labels of a file lie elsewhere than those of the first."""
    first, wanted = parts[0]
    for part, columns in parts:
        if (columns.image, columns.label) != (wanted.image, wanted.label):
            has, had = (f"{found.image} and {found.label or 'no labels'}" for found in (columns, wanted))
            raise ImageError(f"{part.place} has the columns {has}, {first.place} has {had}; give files of one data set")


def list_rows(part: Part, columns: Columns, prefix: str) -> tuple[pa.LargeBinaryArray, FileLabels]:
    """Keys (N), which begin with `prefix`, and labels of one file. Raises ImageError."""
    rows = part.metadata.num_rows
    names = pa.array([f"{prefix}/{row:07d}" for row in range(rows)])
    try:
        with place_errors(part.place, archive=True), open_parquet(part.place, metadata=part.metadata) as file:
            table = file.read(columns=[column for column in (columns.path, columns.label) if column])
        if columns.path:
            column = table[columns.path.rpartition(".")[0]].combine_chunks()
            names = pc.binary_join_element_wise(names, column.field("path"), "/", null_handling="skip")
        labels = read_labels(part.place, table[columns.label], columns.class_names) if columns.label else no_labels(part.place, rows)
    except (pa.ArrowException, OSError) as error:
        raise ImageError(f"{part.place} is damaged ({one_line(error)}); fetch it again") from error
    return names.cast(pa.large_binary()), labels
