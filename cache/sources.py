"""Where images come from: folders, tars, WebDataset shards, Parquet files, or the photographs embedded with revq.

A source lists its images once, in an order that depends on nothing but the names, and hands out one image's encoded bytes at a time.
Nothing is unpacked to disk. Each kind has its file: `folder_source`, `tar_source`, `webdataset`, `parquet_source`, `photographs`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..errors import ImageError, RevqError
from .image_sources.file_sets import check_one_set, glob_for
from .image_sources.folder import FolderSource, check_folder, is_image, suffix_of, what_it_is
from .image_sources.items import ImageItem, order_sha256
from .image_sources.patterns import expand, has_glob, is_pattern
from .image_sources.skipped import Skipped
from .image_sources.tar_index import compressed_message
from .image_sources.walk import walk
from .places import BROKEN_LINK, FILE, FOLDER, Place, place_of

__all__ = ["FolderSource", "ImageItem", "ImageSource", "open_source", "order_sha256"]

PHOTOGRAPHS_PREFIX = "photographs:"
_ARCHIVES = (".tar", ".parquet")
_PACKERS = {".tar.gz": "gzip", ".tgz": "gzip", ".tar.bz2": "bzip2", ".tbz2": "bzip2", ".tar.xz": "xz", ".txz": "xz"}
_PACKERS |= {".tar.zst": "zstd", ".tar.lz4": "lz4"}


class ImageSource(Protocol):
    """A list of images that can be read by index from several threads at once."""

    name: str
    """The source's full path or URL, or "photographs:train"; stores record it."""
    notes: tuple[str, ...]
    """What the user should read before the images are used, such as that they have no labels."""
    skipped: Skipped
    """What is there and is none of the images; `notes` of `open_source` end with it."""

    @property
    def items(self) -> Sequence[ImageItem]:
        """All images, in the one order that every run sees."""

    def read(self, index: int) -> bytes:
        """The encoded file of image `index` (`items[index].box` is not cut out yet).

        Raises:
            OSError: this image cannot be read.
            ImageError: the source as a whole cannot be read any longer (see `place_errors`), so that going on would record good images as unreadable.
        """


def open_source(spec: str | Path) -> ImageSource:
    """The images that `spec` names, by the first of these rules that fits:

    1. "photographs:train" and "photographs:held-out" are the embedded photographs.
    2. A glob (`*`, `?`, `[...]`) or braces (`{0000..1023}`, `{a,b}`) that is no existing path names files: all .tar or all .parquet.
    3. A path or fsspec URL of one .tar or one .parquet file.
    4. A folder: of .parquet files; of .tar files; of class folders with images; of images.

    One .tar holds class tars, class folders, images, or (where it has members .cls or .json) WebDataset samples; several .tar are WebDataset
    shards, or class tars where their names are all WordNet ids (n01440764.tar).

    A folder or glob must be of one set of files: train and validation shards side by side are refused.

    Raises:
        ImageError: there is no such source (then it is a FileNotFoundError too), it holds no image, it holds more than one kind, or it is damaged.
    """
    try:
        source = _open(os.fspath(spec))
    except RevqError:  # one of them is a FileNotFoundError too
        raise
    except OSError as error:  # no permission, a disk that fails
        where = Place(os.fsdecode(error.filename or spec))
        raise ImageError(f"{where} cannot be listed ({error.strerror or error}); check that you may read all of {Place(os.fspath(spec))}") from error
    if source.skipped:
        source.notes = (*source.notes, f"{len(source.skipped)} entries of {source.name} are passed over: {source.skipped}")
    return source


def _open(text: str) -> ImageSource:
    if text.startswith(PHOTOGRAPHS_PREFIX):
        from .image_sources.photographs import PhotographSource  # imports scikit-image's location only where it is used

        return PhotographSource(text.removeprefix(PHOTOGRAPHS_PREFIX))
    if is_pattern(text):
        return _open_files(_pattern_name(text), expand(text), one_set=has_glob(text))
    place = place_of(text)
    if place.path.lower().endswith((*_ARCHIVES, *_PACKERS)) and place.kind() == "file":
        return _open_files(place.full_name, [place])
    check_folder(place)
    archives, skipped = _archives_in(place)
    if not archives:
        return FolderSource(place)
    source = _open_files(place.full_name, archives, one_set=True)
    source.skipped.update(skipped)
    return source


def _open_files(name: str, places: Sequence[Place], *, one_set: bool = False) -> ImageSource:
    """Files that must be of one kind, and of one set where nobody has named them one by one."""
    for place in places:
        packer = next((packer for suffix, packer in _PACKERS.items() if place.path.lower().endswith(suffix)), None)
        if packer:
            raise ImageError(compressed_message(str(place), packer))
        if suffix_of(place.path) not in _ARCHIVES:
            raise ImageError(f"{place} is neither .tar nor .parquet, and a pattern must name files of one of these; give a folder for images")
    odd = next((place for place in places if suffix_of(place.path) != suffix_of(places[0].path)), None)
    if odd is not None:
        raise ImageError(f"{name} holds both {places[0].base} and {odd.base}; {_one_kind(name, places)}")
    if one_set:
        check_one_set(name, places)
    if suffix_of(places[0].path) == ".parquet":
        from .image_sources.parquet import ParquetSource

        return ParquetSource(name, places)
    from .image_sources import tar as tar_source

    if tar_source.are_class_tars(places):
        return tar_source.open_class_tars(name, places)
    if len(places) == 1:
        return tar_source.open_tar(places[0])
    from .image_sources.webdataset import open_shards

    return open_shards(name, places)


def _archives_in(folder: Place) -> tuple[list[Place], Skipped]:
    """The .tar and .parquet files directly in a folder, and what else is there. Raises ImageError where there are images as well."""
    names, skipped = [], Skipped()
    found = sorted(folder.scan(), key=lambda entry: os.fsencode(entry[0]))
    for name, kind in found:
        path = os.fsencode(name) + b"/" * (kind == FOLDER)
        if skipped.set_aside(path):
            continue
        if kind in {FILE, BROKEN_LINK} and suffix_of(name) in _ARCHIVES:
            names.append(name)
        else:
            skipped.add(what_it_is(path) if kind == FILE else kind, path)
    archives = [folder.inside(name) for name in names]
    if not archives:
        return [], skipped
    beside = next((path for path, kind in walk(folder) if kind != FOLDER and is_image(path)), None)
    if beside is not None:
        raise ImageError(f"{folder} holds both {Place(names[0])} and images ({Place(beside)}); {_one_kind(str(folder), archives)}")
    return archives, skipped


def _one_kind(name: str, archives: Sequence[Place]) -> str:
    """Advice: a pattern for the archives that are as the first. Raises ImageError where those are several sets."""
    suffix = suffix_of(archives[0].path)
    same = [place for place in archives if suffix_of(place.path) == suffix]
    check_one_set(name, same)
    found = glob_for(same, f"*{suffix}")
    return f"give one kind, such as {found}" if found else "move one kind away"


def _pattern_name(pattern: str) -> str:
    """The same however the pattern's folder is written."""
    place = place_of(pattern)
    return str(Place(os.path.abspath(place.path)) if place.filesystem is None else place)
