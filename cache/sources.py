"""Where images come from: a folder of class folders, a flat folder, or the photographs embedded with revq.

A source lists its images once, in an order that depends on nothing but the names, and hands out one image's encoded bytes at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import ImageError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
PHOTOGRAPHS_PREFIX = "photographs:"


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image of a source, known by name before a byte of it is read."""

    key: str
    """Path relative to the source's root, with forward slashes; bytes that are not UTF-8 stand as backslash escapes."""
    label: int = -1
    """Number of its class; -1 means that it has none."""
    class_name: str = ""
    """Name of its class; empty means that it has none."""
    box: tuple[int, int, int, int] | None = None
    """(left, top, right, bottom) of the region of the file that stands as the image, in pixels; None means the whole file."""


class ImageSource(Protocol):
    """A list of images that can be read by index from several threads at once."""

    name: str
    """A folder's full path, or "photographs:train"; stores record it."""

    @property
    def items(self) -> Sequence[ImageItem]:
        """All images, in the one order that every run sees."""

    def read(self, index: int) -> bytes:
        """The encoded file of image `index` (`items[index].box` is not cut out yet). Raises OSError where it cannot be read."""


class FolderSource:
    """Image files on disk, either in class folders (`root/CLASS/.../x.jpg`, labels by sorted class name) or flat (`root/x.jpg`, no labels)."""

    def __init__(self, root: str | Path) -> None:
        """List the images under `root`.

        Raises:
            ImageError: `root` is missing, is no folder, holds no image, or holds images both beside and inside its sub-folders.
        """
        self._root = Path(root).expanduser()
        self.name = str(self._root.resolve())
        self._paths, self._items = _list_folder(self._root)

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        return (self._root / self._paths[index]).read_bytes()


def open_source(spec: str | Path) -> ImageSource:
    """The images that `spec` names: a folder, or the embedded "photographs:train" and "photographs:held-out".

    Raises:
        ImageError: there is no such source, or it holds no image.
    """
    if str(spec).startswith(PHOTOGRAPHS_PREFIX):
        from .photographs import PhotographSource  # imports scikit-image's location only where it is used

        return PhotographSource(str(spec).removeprefix(PHOTOGRAPHS_PREFIX))
    return FolderSource(spec)


def order_sha256(items: Sequence[ImageItem]) -> str:
    """Hexadecimal SHA-256 over key, label and box of `items` in their order: two sources with the same value give the same rows."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.key}\0{item.label}\0{item.box}\n".encode())
    return digest.hexdigest()


def _list_folder(root: Path) -> tuple[list[str], list[ImageItem]]:
    """Relative paths and items of all images under `root`, sorted by path within each class."""
    if not root.exists():
        raise ImageError(f"image folder {root} does not exist; give a folder of class folders, or a flat folder of images")
    if not root.is_dir():
        raise ImageError(f"the images must be a folder, but {root} is a file; give the folder that holds it")
    flat, classes, others = _scan(root)
    nested = {name: _walk(root, name, others) for name in classes}
    if flat and any(nested.values()):
        inside = next(name for name in classes if nested[name])
        raise ImageError(
            f"{root} holds images both directly ({flat[0]}) and in class folders ({inside}/), so their labels would be a guess; move one kind away"
        )
    if flat:
        return flat, [ImageItem(_printable(name)) for name in flat]
    paths: list[str] = []
    items: list[ImageItem] = []
    for label, name in enumerate(classes):  # a class folder without images keeps its number, so that train and val agree
        class_name = _printable(name)
        paths += nested[name]
        items += [ImageItem(_printable(path), label, class_name) for path in nested[name]]
    if not items:
        raise ImageError(_nothing_found(root, others))
    return paths, items


def _scan(root: Path) -> tuple[list[str], list[str], Counter[str]]:
    """Sorted image names and sub-folder names directly in `root`, and a count of the other files by suffix."""
    images: list[str] = []
    folders: list[str] = []
    others: Counter[str] = Counter()
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif _is_image(entry.name):
                images.append(entry.name)
            else:
                others[_suffix(entry.name)] += 1
    return sorted(images), sorted(folders), others


def _walk(root: Path, class_folder: str, others: Counter[str]) -> list[str]:
    """Sorted paths, relative to `root`, of the images at any depth of `class_folder`; other files are counted into `others`."""
    found: list[str] = []
    for folder, subfolders, names in os.walk(root / class_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(folder).relative_to(root).as_posix()
        for name in names:
            if _is_image(name):
                found.append(f"{prefix}/{name}")
            elif not name.startswith("."):
                others[_suffix(name)] += 1
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and _suffix(name) in IMAGE_SUFFIXES


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _printable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _nothing_found(root: Path, others: Counter[str]) -> str:
    wanted = " ".join(sorted(IMAGE_SUFFIXES))
    if not others:
        return f"image folder {root} holds no file; expected images ({wanted}) in it or in class folders"
    found = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in others.most_common(3))
    return f"image folder {root} holds no image: expected files ending in {wanted}, found {found}"
