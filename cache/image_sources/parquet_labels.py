"""Labels of Parquet files: numbers, true and false, or text; and one numbering for files that each have their own.

Names decide: what the hub's metadata call the classes (ClassLabel), or the text itself. Files whose names differ are numbered anew, the names of
the first file first, new ones after them; text alone is numbered by sorted name, as class folders are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...errors import ImageError
from ..places import Place
from .items import NO_LABEL

LABEL_TYPES = "whole numbers, true and false, or text, also dictionary-encoded"
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class FileLabels:
    """Those of one file."""

    place: Place
    numbers: NDArray[np.int32]
    """(N) in the file's own numbering; NO_LABEL where there is none."""
    names: list[str]
    """By number; empty where the numbers have no names."""
    declared: bool
    """The names have an order of their own; otherwise they are the sorted ones of a column of text."""

    @property
    def any(self) -> bool:
        return bool((self.numbers != NO_LABEL).any())


def holds_labels(kind: pa.DataType) -> bool:
    """Whether a column of this type is one of LABEL_TYPES, or is empty."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)


def no_labels(place: Place, rows: int) -> FileLabels:
    return FileLabels(place, np.full(rows, NO_LABEL, np.int32), [], declared=False)


def read_labels(place: Place, column: pa.ChunkedArray, names: Sequence[str]) -> FileLabels:
    """A column of N labels, and what the metadata call the classes.

    Raises:
        ImageError: a number is none of a class, or is beyond the names.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return no_labels(place, len(column))
    if _is_text(column.type):
        found = sorted({*pc.unique(column).to_pylist()} - {None, ""})
        numbers = pc.index_in(column.cast(pa.string()), value_set=pa.array(found, pa.string()))
        return FileLabels(place, _int32(numbers), found, declared=False)
    column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    extremes = pc.min_max(column).as_py()
    for value in (extremes["min"], extremes["max"]):
        if value is not None and not NO_LABEL <= value <= _LARGEST:
            raise ImageError(f"{place} has the label {value}; expected numbers of classes from 0 to {_LARGEST}, and {NO_LABEL} or null for none")
    if names and extremes["max"] is not None and extremes["max"] >= len(names):
        raise ImageError(f"{place} has the label {extremes['max']}, and names of {len(names)} classes; expected a ClassLabel that names all of them")
    return FileLabels(place, _int32(column), [*names], declared=True)


def merge_labels(name: str, files: Sequence[FileLabels]) -> tuple[NDArray[np.int32], list[str], tuple[str, ...]]:
    """Labels (N) of all files in one numbering, its names by number, and what to say of it.

    Raises:
        ImageError: labels without names beside others with names; or a file names two classes alike, so that names decide nothing.
    """
    labels = np.concatenate([file.numbers for file in files])
    bare = next((file for file in files if file.any and not file.names), None)
    named = [file for file in files if file.names and (file.any or bare is None)]
    if not named:
        return labels, [], ()
    if bare is not None:
        raise ImageError(
            f"{bare.place} has labels without names and {named[0].place} has named classes, so their numbers cannot be compared; "
            "write the names (ClassLabel) into both, or give those without names alone"
        )
    if all(file.names == named[0].names for file in named):
        return labels, named[0].names, ()
    twice = next((file for file in named if len({*file.names}) < len(file.names)), None)
    if twice is not None:
        again = next(text for i, text in enumerate(twice.names) if text in twice.names[:i])
        raise ImageError(
            f"{twice.place} names two classes {again}, and {name} holds files with other names, so they cannot be merged by name; "
            "give every class a name of its own"
        )
    declared = itertools.chain.from_iterable(file.names for file in named if file.declared)
    text = sorted(itertools.chain.from_iterable(file.names for file in named if not file.declared))
    merged = [*dict.fromkeys([*declared, *text])]
    numbers = {text: number for number, text in enumerate(merged)}
    labels = np.concatenate([_renumbered(file, numbers) for file in files])
    if not any(file.declared for file in named):
        return labels, merged, ()
    return labels, merged, (f"the files of {name} name other classes or number them differently; they are merged by name into {len(merged)} classes",)


def _renumbered(file: FileLabels, numbers: dict[str, int]) -> NDArray[np.int32]:
    table = np.array([*(numbers[name] for name in file.names), NO_LABEL], np.int32)  # so that number -1 finds -1
    return table[file.numbers]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _int32(column: pa.ChunkedArray) -> NDArray[np.int32]:
    return column.cast(pa.int32()).fill_null(NO_LABEL).to_numpy()
