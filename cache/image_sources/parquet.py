"""Images in Parquet files, as on the Hugging Face hub: a column of `struct<bytes, path>` and a column of labels.

Files come in the order of their paths, images in the order of their rows; a key is `FILE/ROW` and the path that the file has for the image.
Columns: the images are `image`, or else the only column with bytes inside; labels are `label`, or else the only one that the hub's metadata
call a ClassLabel. Class names come from the same metadata, or are the labels where these are text: see `parquet_labels`.

A row group is decoded batch by batch, as far as is needed; the last few batches are kept for the threads that read near each other.
Memory: at most 8 batches of 16 MB, and what pyarrow needs for a page (see docs/notes/images.md), whatever the size of files and row groups.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import pyarrow as pa

from ...errors import ImageError
from ..places import REMOTE_THREADS, Place, relative_names
from .items import NO_LABEL, ImageItem, ItemColumns
from .parquet_index import Part, check_same_columns, damage, find_columns, list_rows, open_parquet, read_footer, size_of
from .parquet_labels import merge_labels
from .skipped import Skipped

_BATCH_BYTES = 16 << 20  # of decoded images; one row group can be a whole file of 500 MB
_KEPT_BATCHES = 8
_OPEN_GROUPS = 4


@dataclass
class _Group:
    """A row group that is being decoded, from its first batch on."""

    lock: Lock
    batches: Iterator[pa.RecordBatch] | None = None
    next_batch: int = 0


class ParquetSource:
    """Images of one or more Parquet files with the same columns."""

    def __init__(self, name: str, places: Sequence[Place]) -> None:
        """Read the footers, labels and paths of all files.

        Raises:
            ImageError: a file is no Parquet file or is cut off, has no column of images, or has other columns than the first; no row at all;
                labels that cannot be brought to one numbering.
        """
        self.name = name
        remote = places[0].filesystem is not None
        with ThreadPoolExecutor(REMOTE_THREADS if remote else 2) as pool:
            self._parts = list(pool.map(read_footer, places))
            prefixes = dict(zip(places, relative_names(places), strict=True))
            filled = [(part, find_columns(part)) for part in self._parts if part.metadata.num_rows]
            if not filled:
                raise ImageError(f"{name} holds no row, in {len(places)} files; expected one image in each row")
            check_same_columns(filled)
            listed = list(pool.map(lambda part, columns: list_rows(part, columns, prefixes[part.place]), *zip(*filled, strict=True)))
        self._image = filled[0][1].image
        self._starts: list[int] = []  # first row of each row group, over all files
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        rows = 0
        for number, part in enumerate(self._parts):
            for group in range(part.metadata.num_row_groups):
                self._starts.append(rows)
                self._groups.append((number, group))
                rows += part.metadata.row_group(group).num_rows
        labels, class_names, self.notes = merge_labels(name, [labels for _, labels in listed])
        self._items = ItemColumns(pa.concat_arrays([names for names, _ in listed]), labels, class_names)
        unlabelled = int((labels == NO_LABEL).sum())
        if unlabelled:
            self.notes = (*self.notes, f"{unlabelled} of the {rows} images of {name} have no label")
        self.skipped = Skipped()
        for part in self._parts:
            if not part.metadata.num_rows:
                self.skipped.add("file without a row", os.fsencode(part.place.base))
        self._lock = Lock()
        self._open: OrderedDict[int, _Group] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        """As `ImageSource.read`. Raises ImageError where the file is no longer the one that was listed."""
        group = bisect_right(self._starts, index) - 1
        batch, row = divmod(index - self._starts[group], self._batch_rows(group))
        data = self._batch(group, batch)[row].as_py()
        if data is None:
            raise OSError("the row has no bytes, at most a path; a data set whose images are not in the file must be embedded first")
        return data

    def _batch_rows(self, group: int) -> int:
        number, position = self._groups[group]
        metadata = self._parts[number].metadata.row_group(position)
        leaves = (metadata.column(i) for i in range(metadata.num_columns))
        size = next(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == self._image)
        return max(1, metadata.num_rows * _BATCH_BYTES // max(size, _BATCH_BYTES))

    def _batch(self, group: int, batch: int) -> pa.Array:
        """Images (rows of the batch). One thread decodes a row group, the others that need it wait: the batch is then there."""
        with self._lock:
            kept = self._find(group, batch)
            if kept is not None:
                return kept
            state = self._open.pop(group, None) or _Group(Lock())
            self._open[group] = state
            if len(self._open) > _OPEN_GROUPS:
                self._open.popitem(last=False)
        with state.lock:
            with self._lock:
                kept = self._find(group, batch)
            return kept if kept is not None else self._decode(state, group, batch)

    def _find(self, group: int, batch: int) -> pa.Array | None:
        kept = self._kept.get((group, batch))
        if kept is not None:
            self._kept.move_to_end((group, batch))
        return kept

    def _decode(self, state: _Group, group: int, wanted: int) -> pa.Array:
        number, position = self._groups[group]
        part = self._parts[number]
        if state.batches is None or state.next_batch > wanted:
            state.batches, state.next_batch = self._start(part, position, self._batch_rows(group)), 0
        try:
            while True:
                with damage(part.place):
                    column = next(state.batches).column(0)
                images = column.field(self._image.rpartition(".")[2]) if pa.types.is_struct(column.type) else column
                done, state.next_batch = state.next_batch, state.next_batch + 1
                with self._lock:
                    self._kept[group, done] = images
                    if len(self._kept) > _KEPT_BATCHES:
                        self._kept.popitem(last=False)
                if done == wanted:
                    return images
        except Exception:
            state.batches = None
            raise

    def _start(self, part: Part, position: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        with damage(part.place):
            if size_of(part.place) != part.size:
                raise ImageError(f"{part.place} has changed since it was listed; give the same command again once it is whole")
            file = open_parquet(part.place, metadata=part.metadata)
            return file.iter_batches(batch_rows, row_groups=[position], columns=[self._image])
