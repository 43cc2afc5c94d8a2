"""Images inside tars, read by offset: nothing is unpacked, and no tar is read through again for an image.

- A tar of class tars, as `ILSVRC2012_img_train.tar`: `CLASS.tar` inside, labels by sorted class name. A folder of such class tars is the same.
- A tar of class folders, or of images alone. A folder around everything (`tar cf photos.tar photos`) is peeled off.
- `ILSVRC2012_img_val.tar`: images alone; their labels come from `ILSVRC2012_devkit_t12.tar.gz` beside it (see `imagenet_devkit`).

Keys and labels are those of the same images in folders. Of two members with one name the later holds, as when a tar is unpacked; a link to
a member is that member, and one to anything else an image that cannot be read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import ImageError
from ..places import FILE, Place, RandomFile, place_of
from .folder import IMAGE_SUFFIXES, is_image, mixed_message, skip_empty_folders, splits_among, what_it_is
from .imagenet_devkit import DEVKIT_NAME, is_val_name, val_labels
from .items import ItemColumns, classes_of, iterate, name_column, printable
from .skipped import Skipped
from .tar_index import Member, TarWalk
from .tar_members import SCHEMA, Row, TarSource, members_of, open_archive, sample_key, table_of, threads_for
from .walk import walk
from .webdataset import open_shards

_CLASS_TAR = re.compile(r"n\d{8}\.tar")


@dataclass(frozen=True)
class _Listing:
    """What one tar holds."""

    images: pa.Table
    """With SCHEMA."""
    tars: list[Member]
    folders: set[bytes]
    """All folders, with or without images."""
    skipped: Skipped
    rooted: bool
    """The root has an entry of its own, so that nothing is packed around what it holds."""
    is_shard: bool
    """An image has its label beside it: a WebDataset shard."""


def open_tar(place: Place) -> TarSource:
    """The images of one tar.

    Raises:
        ImageError: the tar cannot be read by offset (see `tar_index`), holds no image, or holds images both directly and in class folders.
    """
    file = open_archive(place)
    listing = _list_members(TarWalk(file, str(place)), 0)
    if listing.tars and len(listing.images):
        raise ImageError(f"{place} holds both images and tars, so their labels would be a guess; pack one kind alone")
    if listing.tars:
        inner = [(member.name, 0, file, member.offset, member.offset + member.size) for member in listing.tars]
        return _class_tars(place.full_name, [place], inner, listing.skipped)
    if listing.is_shard:
        return open_shards(place.full_name, [place])
    if not len(listing.images):
        found = f", found {listing.skipped}" if listing.skipped else " and it is empty"
        raise ImageError(f"{place} holds no image: expected members ending in {' '.join(sorted(IMAGE_SUFFIXES))}{found}")
    return _plain_tar(place, listing)


def are_class_tars(places: Sequence[Place]) -> bool:
    """Whether several tars are named by WordNet ids alone."""
    return len(places) > 1 and all(_CLASS_TAR.fullmatch(place.base) for place in places)


def open_class_tars(name: str, places: Sequence[Place]) -> TarSource:
    """Class tars that are files of their own: what unpacking `ILSVRC2012_img_train.tar` leaves."""
    files = [open_archive(place) for place in places]
    return _class_tars(
        name, places, [(os.fsencode(place.base), i, file, 0, file.size) for i, (place, file) in enumerate(zip(places, files, strict=True))], Skipped()
    )


def in_order(members: pa.Table) -> pa.Table:
    """Sorted by top-level folder, then by name; of members with one name, the last."""
    names = members["name"].combine_chunks()
    tops = name_column(name.partition(b"/")[0] for name in iterate(names))
    keys = pa.table({"top": tops, "name": names, "row": np.arange(len(names))})
    members = members.take(pc.sort_indices(keys, [(key, "ascending") for key in keys.column_names]))
    names = members["name"].combine_chunks()
    if len(names) < 2:
        return members
    return members.filter(pa.concat_arrays([pc.not_equal(names.slice(1), names.slice(0, len(names) - 1)), pa.array([True])]))


def _list_members(walk: TarWalk, number: int) -> _Listing:
    tars: list[Member] = []
    folders: set[bytes] = set()
    labels: set[bytes] = set()
    skipped = Skipped()

    def images() -> Iterator[Row]:
        for member in members_of(walk, skipped):
            folders.add(member.name if member.kind == "folder" else member.name.rpartition(b"/")[0])
            if member.kind == "folder":
                continue
            if is_image(member.name):
                yield member.name, number, member.offset, member.size, member.header_crc
            elif member.name.endswith(b".tar"):
                tars.append(member)
            else:
                skipped.add(what_it_is(member.name), member.name)
                if member.name.endswith((b".cls", b".json")):
                    labels.add(sample_key(member.name))

    table = table_of(images())
    is_shard = bool(labels) and any(sample_key(name) in labels for name in iterate(table["name"].combine_chunks()))
    return _Listing(table, tars, folders, skipped, walk.rooted, is_shard)


def _class_tars(name: str, places: Sequence[Place], inner: Sequence[tuple[bytes, int, RandomFile, int, int]], skipped: Skipped) -> TarSource:
    """Tars whose names are classes: (name, number of the file, file, start, stop) of each."""
    bare, _ = _unwrapped(name_column(tar[0].removesuffix(b".tar") for tar in inner), rooted=False)
    tars = dict(sorted(zip(iterate(bare), inner, strict=True)))

    def images_of(class_name: bytes) -> _Listing:
        tar_name, number, file, start, stop = tars[class_name]
        where = str(places[number]) if len(places) > 1 else f"{printable(tar_name)} in {places[0]}"
        listing = _list_members(TarWalk(file, where, start, stop), number)
        if listing.tars:
            raise ImageError(f"{where} holds tars again; give a tar of class tars, of class folders or of images")
        images = in_order(listing.images)
        names = name_column(class_name + b"/" + member for member in iterate(images["name"].combine_chunks()))
        return replace(listing, images=images.set_column(0, SCHEMA.field("name"), names))

    with ThreadPoolExecutor(threads_for(inner[0][2])) as pool:
        listings = dict(zip(tars, pool.map(images_of, tars), strict=True))
    for class_name, listing in listings.items():
        skipped.update(listing.skipped)
        if not len(listing.images):
            skipped.add("class tar without an image", class_name + b".tar")
    tables = {class_name: listing.images for class_name, listing in listings.items() if len(listing.images)}
    if not tables:
        raise ImageError(f"{name} holds {len(tars)} class tars, and none of them an image")
    members = pa.concat_tables(tables.values())
    labels = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables.values()])
    return TarSource(name, places, members, ItemColumns(members["name"].combine_chunks(), labels, list(map(printable, tables))), skipped)


def _unwrapped(names: pa.LargeBinaryArray, *, rooted: bool) -> tuple[pa.LargeBinaryArray, bytes]:
    """Names without the folders that are around all of them, and those folders.

    Where the root has an entry (`tar -C imgs -cf x.tar .`) it is known what is in it, so that a lone folder of images is a class.
    """
    around = b""
    while len(names):
        tops = {name.partition(b"/")[0] + b"/" for name in iterate(names) if b"/" in name}
        flat = sum(b"/" not in name for name in iterate(names))
        inner = name_column(name.partition(b"/")[2] for name in iterate(names))
        if flat or len(tops) != 1 or (rooted and any(b"/" not in name for name in iterate(inner))):
            break
        names, around = inner, around + tops.pop()
    return names, around


def _plain_tar(place: Place, listing: _Listing) -> TarSource:
    """Class folders, images alone, or ImageNet's validation images."""
    members, skipped, path = listing.images, listing.skipped, place.full_name
    names, around = _unwrapped(members["name"].combine_chunks(), rooted=listing.rooted)
    flat = next((name for name in iterate(names) if b"/" not in name), None)
    nested = min((name for name in iterate(names) if b"/" in name), default=None)
    if flat is not None and nested is not None:
        raise ImageError(mixed_message(place, printable(flat), printable(nested.partition(b"/")[0])))
    members = in_order(members.set_column(0, SCHEMA.field("name"), names))
    names = members["name"].combine_chunks()
    if nested is not None:
        labels, classes = classes_of(names)
        _refuse_splits(place, around, splits_among(classes, names))
        tops = {folder.removeprefix(around).partition(b"/")[0] for folder in listing.folders if folder.startswith(around)}
        skip_empty_folders(skipped, tops - {b"", around[:-1]}, classes)
        return TarSource(path, [place], members, ItemColumns(names, labels, list(map(printable, classes))), skipped)
    if all(is_val_name(name) for name in iterate(names)):
        return _val_tar(place, members, skipped)
    notes = [f"all images of {path} lie in the folder {printable(around)}, which is taken for no class: they have no labels"] if around else []
    return TarSource(path, [place], members, ItemColumns(names), skipped, notes)


def _refuse_splits(place: Place, around: bytes, splits: Sequence[bytes]) -> None:
    """Raises ImageError where top-level folders are splits of a data set."""
    if splits:
        told, url = ", ".join(f"{printable(name)}/" for name in splits), f"tar://{printable(around + splits[0])}::{place}"
        advice = f"give one of them, such as {shlex.quote(url)}" if _holds_an_image(url) else "unpack it and give one of them"
        raise ImageError(f"{place} holds the splits {told}, which would be taken for classes; {advice}")


def _holds_an_image(url: str) -> bool:
    """fsspec does not find names that begin with a slash."""
    try:
        return any(is_image(path) for path, _ in walk(place_of(url)))
    except (ImageError, OSError):
        return False


def _val_tar(place: Place, members: pa.Table, skipped: Skipped) -> TarSource:
    """`ILSVRC2012_img_val.tar`, with labels where the devkit is beside it."""
    path, names, devkit = place.full_name, members["name"].combine_chunks(), place.beside(DEVKIT_NAME)
    if devkit.kind() != FILE:
        note = f"{place} holds no labels and there is no {DEVKIT_NAME} beside it, so its images have no class"
        return TarSource(path, [place], members, ItemColumns(names), skipped, [note])
    labels, wnids = val_labels(devkit, iterate(names))
    return TarSource(path, [place], members, ItemColumns(names, labels, wnids), skipped)
