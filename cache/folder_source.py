"""Images that are files of a folder: class folders (`root/CLASS/.../x.jpg`, labels by sorted class name) or flat (`root/x.jpg`, no labels)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ..errors import ImageError
from .items import ImageItem, ItemColumns, classes_of, name_column
from .places import Place, place_of

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class FolderSource:
    """Image files of a folder, on disk or behind an fsspec URL."""

    notes: tuple[str, ...] = ()

    def __init__(self, root: str | Path | Place) -> None:
        """List the images under `root`.

        Raises:
            ImageError: `root` is missing, is no folder, holds no image, or holds images both beside and inside its sub-folders.
        """
        self._root = root if isinstance(root, Place) else place_of(os.fspath(root))
        self.name = self._root.full_name
        check_folder(self._root)
        self._names, self._items = _list_folder(self._root)

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        name = os.fsdecode(self._names[index].as_py())
        return Place(os.path.join(self._root.path, name), self._root.filesystem).read()


def check_folder(root: Place) -> None:
    """Raises ImageError where `root` is not a folder."""
    kind = root.kind()
    if kind is None:
        raise ImageError(f"image folder {root} does not exist; give a folder of images or of class folders, a .tar or a .parquet")
    if kind == "file":
        raise ImageError(f"the images must be a folder, a .tar or a .parquet, but {root} is a file; give the folder that holds it")


def is_image(name: str | bytes) -> bool:
    """Whether the file name is that of an image, and not hidden."""
    base = os.path.basename(os.fsdecode(name))
    return not base.startswith(".") and suffix_of(base) in IMAGE_SUFFIXES


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def mixed_message(root: object, flat: object, inside: object) -> str:
    """Images both in class folders and outside of them."""
    return f"{root} holds images both directly ({flat}) and in class folders ({inside}/), so their labels would be a guess; move one kind away"


def _list_folder(root: Place) -> tuple[pa.LargeBinaryArray, ItemColumns]:
    """Names and items of all images under `root`, sorted by path within each class."""
    files, folders = root.entries()
    others = Counter(suffix_of(name) for name in files if not is_image(name))
    flat = [name for name in files if is_image(name)]
    nested: list[bytes] = []
    for path in root.walk() if folders else ():
        if is_image(path):
            nested.append(os.fsencode(path))
        else:
            others[suffix_of(path)] += 1
    if flat and nested:
        first = Place(os.fsdecode(min(nested).partition(b"/")[0]))
        raise ImageError(mixed_message(root, Place(flat[0]), first))
    if flat:
        names = name_column(os.fsencode(name) for name in flat)
        return names, ItemColumns(names)
    if not nested:
        raise ImageError(_nothing_found(root, others))
    nested.sort(key=lambda path: (path.partition(b"/")[0], path))
    names = name_column(nested)
    labels, classes = classes_of(names, map(os.fsencode, folders))  # a class folder without images keeps its number: train and val agree
    return names, ItemColumns(names, labels, [str(Place(os.fsdecode(name))) for name in classes])


def _nothing_found(root: Place, others: Counter[str]) -> str:
    wanted = " ".join(sorted(IMAGE_SUFFIXES))
    if not others:
        return f"image folder {root} holds no file; expected images ({wanted}) in it or in class folders"
    found = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in others.most_common(3))
    return f"image folder {root} holds no image: expected files ending in {wanted}, found {found}"
