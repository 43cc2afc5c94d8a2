"""Images that are files of a folder: class folders (`root/CLASS/.../x.jpg`, labels by sorted class name) or flat (`root/x.jpg`, no labels).

As torchvision's ImageFolder has it: links to images and folders are followed, at any depth. A link to nothing that has an image's name is an
image that cannot be read. As it is not there, a folder without an image is no class.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from ...errors import ImageError, ImageNotFoundError
from ..filesystem import protocols_of
from ..places import BROKEN_LINK, FILE, FOLDER, Place, place_of
from .items import ImageItem, ItemColumns, classes_of, iterate, name_column, printable
from .place_errors import is_there, neighbours_gone, place_errors
from .skipped import EMPTY, Skipped
from .walk import walk

_DECODED = {
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jpg jpeg jpe jfif mpo",
    "PNG": "png apng",
    "PPM": "ppm pgm pbm pnm",
    "TIFF": "tif tiff",
    "WEBP": "webp",
}
IMAGE_SUFFIXES = frozenset("." + suffix for suffixes in _DECODED.values() for suffix in suffixes.split())
_SPLIT_WORD = re.compile(rb"(?<![a-z])((train|val|test)(ing|set)?|valid(ation)?|dev|eval(uation)?)(?![a-z])", re.IGNORECASE)


class FolderSource:
    """Image files of a folder, on disk or behind an fsspec URL."""

    def __init__(self, root: str | Path | Place) -> None:
        """List the images under `root`.

        Raises:
            ImageError: `root` is missing, is no folder, holds no image, holds images both beside and inside its sub-folders, or holds splits.
            OSError: a folder cannot be listed.
        """
        self._root = root if isinstance(root, Place) else place_of(os.fspath(root))
        self.name = self._root.full_name
        check_folder(self._root)
        self.skipped = Skipped()
        self._names, self._broken = _list_images(self._root, self.skipped)
        self._items, self.notes = _label(self._root, self._names)
        if self._broken:
            self.notes = (*self.notes, f"{len(self._broken)} images of {self.name} are links to nothing; they are recorded as unreadable")

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        """As `ImageSource.read`. Raises ImageError where an image is gone and its folder or most of its neighbours with it."""
        place = self._place(index)
        try:
            with place_errors(place):
                return place.read()
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._names[index].as_py() in self._broken:
                raise
            folder = place.at(os.path.dirname(place.path))
            if not is_there(folder) or neighbours_gone(self._is_there, index, len(self._names)):
                mend = f"bring {self.name} back as it was, then give the same command again to go on"
                raise ImageError(f"{place} is gone, and so is its folder or what was beside it; {mend}") from error
        with place_errors(place):
            return place.read()

    def _place(self, index: int) -> Place:
        return self._root.inside(os.fsdecode(self._names[index].as_py()))

    def _is_there(self, index: int) -> bool:
        return self._names[index].as_py() in self._broken or is_there(self._place(index))


def check_folder(root: Place) -> None:
    """Raises ImageError where `root` is not a folder, or one in a zip that cannot be read."""
    if root.filesystem is not None and "zip" in protocols_of(root.filesystem):
        _check_zip(root)
    kind = root.kind()
    if kind is None:
        raise ImageNotFoundError(f"image folder {root} does not exist; give a folder of images or of class folders, a .tar or a .parquet")
    if kind == FILE and suffix_of(root.path) == ".zip":
        raise ImageError(f"the images must be a folder, a .tar or a .parquet, but {root} is a zip; give {shlex.quote(f'zip://::{root}')}")
    if kind == FILE:
        raise ImageError(f"the images must be a folder, a .tar or a .parquet, but {root} is a file; give the folder that holds it")


def _check_zip(root: Place) -> None:
    """Raises ImageError where no member of a `zip://` can be read by its name, or none without a password."""
    archive = root.around[1].removeprefix("::")
    for member in root.filesystem.zip.infolist():
        if member.flag_bits & 1:
            raise ImageError(f"{archive} is encrypted ({member.filename}); unpack it with its password, and give the folder")
        if member.filename.startswith("/"):
            names = f"{archive} holds absolute names ({member.filename}), which are not found again under zip://"
            raise ImageError(f"{names}; unpack it, as unzip does without the leading /, and give the folder")


def is_image(name: str | bytes) -> bool:
    """Whether the file name is that of an image, and not hidden."""
    base = os.path.basename(os.fsdecode(name))
    return not base.startswith(".") and suffix_of(base) in IMAGE_SUFFIXES


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def what_it_is(name: bytes) -> str:
    """Why a file that is no image is passed over."""
    return printable(os.fsencode(suffix_of(os.fsdecode(name)))) or "no suffix"


def mixed_message(root: object, flat: object, inside: object) -> str:
    """Images both in class folders and outside of them."""
    return f"{root} holds images both directly ({flat}) and in class folders ({inside}/), so their labels would be a guess; move one kind away"


def splits_among(classes: Sequence[bytes], names: pa.LargeBinaryArray) -> list[bytes]:
    """Those of the top-level folders that are the splits of a data set and no classes; empty where all are classes.

    A split is called as one (`train`), or as another folder but for that word (`train2017` beside `val2017`).

    `train/` beside `cat/` and `bus/` is a class (COCO has it). Folders are splits where there are several such names and no other ones, or
    where they hold folders again, alone or several of them.
    """
    splits = _split_names(classes)
    if not splits or len(splits) < min(len(classes), 2):
        return []
    if len(splits) > 1 and len(splits) == len(classes):
        return splits
    tops = tuple(name + b"/" for name in splits)
    return splits if any(name.startswith(tops) and name.count(b"/") > 1 for name in iterate(names)) else []


def _split_names(folders: Sequence[bytes]) -> list[bytes]:
    """Those that are called as splits are; see `splits_among`."""
    words = {name: match[0].lower() for name in folders if (match := _SPLIT_WORD.search(name))}
    rests = {name: _SPLIT_WORD.sub(b"/", name, count=1) for name in words}
    return [name for name in words if rests[name] == b"/" or any(rests[name] == rests[other] and words[name] != words[other] for other in words)]


def _list_images(root: Place, skipped: Skipped) -> tuple[pa.LargeBinaryArray, set[bytes]]:
    """Names of all images under `root`, sorted by path within each class, and those of them that are links to nothing."""
    flat: list[bytes] = []
    nested: list[bytes] = []
    folders: set[bytes] = set()
    broken: set[bytes] = set()
    for path, kind in walk(root):
        name = os.fsencode(path)
        if skipped.set_aside(name + b"/" * (kind == FOLDER)):
            continue
        if kind == FOLDER:
            folders.add(name.partition(b"/")[0])
        elif kind in {FILE, BROKEN_LINK} and is_image(name):
            (nested if b"/" in name else flat).append(name)
            if kind == BROKEN_LINK:
                broken.add(name)
        else:
            skipped.add(what_it_is(name) if kind == FILE else kind, name)
    if root.around[0].endswith("zip://") and any(b"\\" in name for name in flat):
        raise ImageError(f"{root} parts its names by backslashes ({printable(min(flat))}), which hides its folders; unpack it and give the folder")
    if flat and nested:
        raise ImageError(mixed_message(root, printable(min(flat)), printable(min(nested).partition(b"/")[0])))
    skip_empty_folders(skipped, folders, (name.partition(b"/")[0] for name in nested))
    if not flat and not nested:
        wanted = f"expected files ending in {' '.join(sorted(IMAGE_SUFFIXES))}"
        raise ImageError(
            f"image folder {root} holds no image: {wanted}, found {skipped}{_where_images_are(root, skipped)}"
            if skipped
            else f"image folder {root} holds no file; {wanted}"
        )
    nested.sort(key=lambda path: (path.partition(b"/")[0], path))
    return name_column(nested or sorted(flat)), broken


def _where_images_are(root: Place, skipped: Skipped) -> str:
    """Advice for a folder around folders of archives, as the hub's data sets have them, and for names that fsspec does not find."""
    if root.around[0].endswith("tar://"):
        return "; of names that begin with / or hold .. tar:// finds none: give the plain .tar itself"
    suffix = next((suffix for suffix in (".parquet", ".tar") if skipped.first(suffix)), None)
    if suffix is None:
        return ""
    first = skipped.first(suffix)
    folder = root.inside(os.path.dirname(first))
    here = sum(suffix_of(name) == suffix for name, _ in folder.scan())
    others = skipped.counts()[suffix] - here
    safe = root.at(glob.escape(root.path)) if root.filesystem is None else root
    pattern = shlex.quote(str(safe.inside("*/" * first.count("/") + "*" + suffix)))
    told = f", or {pattern} for the {others} in other folders too (the folders' names are no labels then)" if others else ""
    return f"; give the folder of its archives, {shlex.quote(str(folder))}{told}"


def skip_empty_folders(skipped: Skipped, folders: Iterable[bytes], classes: Iterable[bytes]) -> None:
    """Count the top-level folders that are no classes, for there is no image in them."""
    for folder in sorted({*folders}.difference(classes)):
        skipped.add(EMPTY, folder + b"/")


def _label(root: Place, names: pa.LargeBinaryArray) -> tuple[ItemColumns, tuple[str, ...]]:
    """Items of sorted images, and what to say of their labels. Raises ImageError where the folders are splits."""
    if b"/" not in names[0].as_py():
        return ItemColumns(names), ()
    labels, classes = classes_of(names)
    splits = splits_among(classes, names)
    shown = [printable(name) for name in classes]
    if splits:
        first = printable(splits[0])
        told = ", ".join(f"{printable(name)}/" for name in splits)
        raise ImageError(
            f"{root} holds the splits {told}, which would be taken for classes; give one of them, such as {shlex.quote(str(root.inside(first)))}"
        )
    notes: tuple[str, ...] = ()
    if len(shown) == 1 and any(name.count(b"/") > 1 for name in iterate(names)):
        notes = (
            f"all images of {root} are of the one class {shown[0]}; where that holds class folders, give {shlex.quote(str(root.inside(shown[0])))}",
        )
    return ItemColumns(names, labels, shown), notes
