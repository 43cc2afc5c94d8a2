"""What a source says about its images before a byte of them is read: names and labels, kept in columns.

1.28 million `ImageItem`s as objects would take half a gigabyte; as columns they take what their names take, and one is made when asked for.
Names are bytes, as file systems and archives have them, for not every name is UTF-8.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_BLOCK = 8192  # items made at once when all are asked for
NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a source, known by name before a byte of it is read."""

    key: str
    """Path relative to the source's root, with forward slashes; bytes that are not UTF-8 stand as backslash escapes. Unique within a source
    (unless one name spells out another's escape)."""
    label: int = NO_LABEL
    """Number of its class; -1 means that it has none."""
    class_name: str = ""
    """Name of its class; empty means that it has none."""
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) of the region of the file that stands as the image, in pixels; None means the whole file."""


class ItemColumns(Sequence[ImageItem]):
    """Items made one by one from a column of names and columns of labels; slices share the columns."""

    def __init__(
        self,
        names: pa.LargeBinaryArray,
        labels: NDArray[np.int32] | None = None,
        class_names: Sequence[str] = (),
        class_numbers: NDArray[np.int32] | None = None,
    ) -> None:
        """Columns of N images.

        Args:
            names: (N) keys as bytes.
            labels: (N) numbers of classes, -1 where there is none; None means that no image has a class.
            class_names: names of classes, by class number.
            class_numbers: (N) positions in `class_names`, -1 where there is none; None means that they are the labels.
        """
        self._names = names
        self._labels = np.full(len(names), NO_LABEL, np.int32) if labels is None else labels
        self._class_names = [*class_names, ""]  # so that number -1 finds the empty name
        self._class_numbers = self._labels if class_numbers is None else class_numbers
        self._rows = range(len(names))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ImageItem: ...
    @overload
    def __getitem__(self, index: slice) -> ItemColumns: ...
    def __getitem__(self, index: int | slice) -> ImageItem | ItemColumns:
        if isinstance(index, slice):
            part = object.__new__(ItemColumns)
            part.__dict__.update(self.__dict__, _rows=self._rows[index])
            return part
        row = self._rows[index]
        return ImageItem(printable(self._names[row].as_py()), int(self._labels[row]), self._class_name(int(self._class_numbers[row])))

    def __iter__(self) -> Iterator[ImageItem]:
        for start in range(0, len(self._rows), _BLOCK):
            rows = np.asarray(self._rows[start : start + _BLOCK])
            columns = zip(self._names.take(pa.array(rows)).to_pylist(), self._labels[rows].tolist(), self._class_numbers[rows].tolist(), strict=True)
            for name, label, number in columns:
                yield ImageItem(printable(name), label, self._class_name(number))

    def classes(self) -> list[tuple[str, int]]:
        """Every (class name, label) that there is, once."""
        rows = np.asarray(self._rows)
        _, first = np.unique(self._labels[rows].astype(np.int64) << 32 | self._class_numbers[rows].astype(np.int64) + 1, return_index=True)
        columns = zip(self._class_numbers[rows[first]].tolist(), self._labels[rows[first]].tolist(), strict=True)
        return [(self._class_name(number), label) for number, label in columns]

    def _class_name(self, number: int) -> str:
        return self._class_names[number] if number < len(self._class_names) else ""


def order_sha256(items: Sequence[ImageItem]) -> str:
    """Hexadecimal SHA-256 over key, label and box of `items` in their order: two sources with the same value give the same rows."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.key}\0{item.label}\0{item.box}\n".encode())
    return digest.hexdigest()


def printable(name: bytes) -> str:
    """A name as text, with backslash escapes for bytes that are not UTF-8."""
    return name.decode("utf-8", "backslashreplace")


def name_column(names: Iterable[bytes]) -> pa.LargeBinaryArray:
    """(N) names as one column, in the order given; holds no more than a block of them as objects."""
    iterator = iter(names)
    blocks = [pa.array(block, pa.large_binary()) for block in iter(lambda: list(itertools.islice(iterator, _BLOCK)), [])]
    return pa.concat_arrays(blocks) if blocks else pa.array([], pa.large_binary())


def iterate(column: pa.LargeBinaryArray) -> Iterator[bytes]:
    """The values of a column of names, without holding all of them as objects."""
    for start in range(0, len(column), _BLOCK):
        yield from column.slice(start, _BLOCK).to_pylist()


def classes_of(names: pa.LargeBinaryArray) -> tuple[NDArray[np.int32], list[bytes]]:
    """Labels (N) and sorted class names from the first folder of each path."""
    folders = name_column(name.partition(b"/")[0] for name in iterate(names))
    classes = sorted(pc.unique(folders).to_pylist())
    labels = pc.index_in(folders, value_set=pa.array(classes, pa.large_binary()))
    return labels.to_numpy(zero_copy_only=False).astype(np.int32), classes
