"""Images inside tars, read by offset: nothing is unpacked, and no tar is read through again for an image.

- A tar of class tars, as `ILSVRC2012_img_train.tar`: `CLASS.tar` inside, labels by sorted class name. A folder of such class tars is the same.
- A tar of class folders, or of images alone. A folder around everything (`tar cf photos.tar photos`) is peeled off.
- `ILSVRC2012_img_val.tar`: images alone; their labels come from `ILSVRC2012_devkit_t12.tar.gz` beside it (see `imagenet_devkit`).

Keys are those of the same images in folders. Of two members with one name the later holds, as when a tar is unpacked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ImageError
from .folder_source import IMAGE_SUFFIXES, is_image, mixed_message
from .imagenet_devkit import DEVKIT_NAME, is_val_name, val_labels
from .items import ImageItem, ItemColumns, classes_of, iterate, name_column, printable
from .places import REMOTE_THREADS, OpenFiles, Place, RandomFile
from .tar_index import BLOCK, Member, TarWalk

_LOCAL_THREADS = 4  # they wait for the disk; parsing is Python's and gains nothing from threads
_ROWS = 8192
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
SCHEMA = pa.schema({"name": pa.large_binary(), "file": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "crc": pa.uint32()})
Row = tuple[bytes, int, int, int, int]
"""(name, number of the file, offset, size, CRC-32 of the header), as in SCHEMA."""


class TarSource:
    """Members of one or more tars, in columns of which each image takes some 65 bytes."""

    def __init__(self, name: str, places: Sequence[Place], members: pa.Table, items: ItemColumns, notes: tuple[str, ...] = ()) -> None:
        """`members` has SCHEMA and the order of `items`; a negative offset stands for an image that is missing."""
        self.name, self.notes, self._items = name, notes, items
        self._files = OpenFiles(places)
        self._columns = [members[column].to_numpy() for column in SCHEMA.names[1:]]

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        """As `ImageSource.read`. Raises ImageError where the tar is no longer the one that was listed: its other images would be garbage too."""
        number, offset, size, crc = (int(column[index]) for column in self._columns)
        if offset < 0:
            raise OSError(f"the sample has no image: no member KEY{{{','.join(sorted(IMAGE_SUFFIXES))}}}")
        data = self._files[number].read_at(offset - BLOCK, BLOCK + size)
        if len(data) != BLOCK + size or crc32(data[:BLOCK]) != crc:
            raise ImageError(f"{self._files.places[number]} has changed since it was listed; give the same command again once it is whole")
        return data[BLOCK:]


@dataclass(frozen=True)
class _Listing:
    """What one tar holds."""

    images: pa.Table
    """With SCHEMA."""
    tars: list[Member]
    folders: set[bytes]
    """Top-level folders, with or without images."""
    others: int
    is_shard: bool
    """There are labels beside images: a WebDataset shard."""


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
        return _class_tars(place.full_name, [place], inner)
    if listing.is_shard:
        from .webdataset import open_shards

        return open_shards(place.full_name, [place])
    if not len(listing.images):
        raise ImageError(f"{place} holds no image: expected members ending in {' '.join(sorted(IMAGE_SUFFIXES))}, found {listing.others} others")
    return _plain_tar(place, listing)


def are_class_tars(places: Sequence[Place]) -> bool:
    """Whether several tars are named by WordNet ids alone."""
    return len(places) > 1 and all(_CLASS_TAR.fullmatch(place.base) for place in places)


def open_class_tars(name: str, places: Sequence[Place]) -> TarSource:
    """Class tars that are files of their own: what unpacking `ILSVRC2012_img_train.tar` leaves."""
    files = [open_archive(place) for place in places]
    return _class_tars(
        name, places, [(os.fsencode(place.base), i, file, 0, file.size) for i, (place, file) in enumerate(zip(places, files, strict=True))]
    )


def open_archive(place: Place) -> RandomFile:
    """Raises ImageError where `place` is no file that can be read."""
    try:
        return place.open()
    except OSError as error:
        raise ImageError(f"{place} cannot be opened ({error.strerror or error})") from error


def table_of(rows: Iterable[Row]) -> pa.Table:
    """Rows as columns, with few of them in memory as objects at a time."""
    batches, block = [], []
    for row in rows:
        block.append(row)
        if len(block) == _ROWS:
            batches.append(_batch(block))
            block = []
    return pa.Table.from_batches([*batches, _batch(block)], SCHEMA)


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


def refuse_link(member: Member, where: str) -> None:
    """Raises ImageError where an image's bytes are not where its name is."""
    if member.kind == "link" and is_image(member.name):
        raise ImageError(f"{where} holds {printable(member.name)} as a link, not as a file; pack it again with tar's --hard-dereference -h")


def threads_for(file: RandomFile) -> int:
    return _LOCAL_THREADS if file.local else REMOTE_THREADS


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _list_members(walk: TarWalk, number: int) -> _Listing:
    tars: list[Member] = []
    folders: set[bytes] = set()
    sidecars = others = 0

    def images() -> Iterator[Row]:
        nonlocal sidecars, others
        for member in walk:
            refuse_link(member, walk.where)
            top, slash, _ = member.name.partition(b"/")
            if (slash or member.kind == "folder") and not top.startswith(b"."):
                folders.add(top)
            if member.kind != "file" or hidden(member.name):
                continue
            if is_image(member.name):
                yield member.name, number, member.offset, member.size, member.header_crc
            elif member.name.endswith(b".tar"):
                tars.append(member)
            else:
                others += 1
                sidecars += member.name.endswith((b".cls", b".json"))

    table = table_of(images())
    return _Listing(table, tars, folders, others, is_shard=bool(sidecars and len(table)))


def hidden(name: bytes) -> bool:
    return name.startswith(b".") or b"/." in name


def _class_tars(name: str, places: Sequence[Place], inner: Sequence[tuple[bytes, int, RandomFile, int, int]]) -> TarSource:
    """Tars whose names are classes: (name, number of the file, file, start, stop) of each."""
    tars = dict(sorted((tar[0].removesuffix(b".tar"), tar) for tar in inner))

    def images_of(class_name: bytes) -> pa.Table:
        tar_name, number, file, start, stop = tars[class_name]
        where = str(places[number]) if len(places) > 1 else f"{printable(tar_name)} in {places[0]}"
        listing = _list_members(TarWalk(file, where, start, stop), number)
        if listing.tars:
            raise ImageError(f"{where} holds tars again; give a tar of class tars, of class folders or of images")
        images = in_order(listing.images)
        return images.set_column(
            0, SCHEMA.field("name"), name_column(class_name + b"/" + member for member in iterate(images["name"].combine_chunks()))
        )

    with ThreadPoolExecutor(threads_for(inner[0][2])) as pool:
        tables = list(pool.map(images_of, tars))
    members = pa.concat_tables(tables)
    if not len(members):
        raise ImageError(f"{name} holds {len(tars)} class tars, and none of them an image")
    labels = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])
    return TarSource(name, places, members, ItemColumns(members["name"].combine_chunks(), labels, list(map(printable, tars))))


def _plain_tar(place: Place, listing: _Listing) -> TarSource:
    """Class folders, images alone, or ImageNet's validation images."""
    members, folders, path = listing.images, listing.folders, place.full_name
    names = members["name"].combine_chunks()
    inside = sum(b"/" in name for name in iterate(names))
    while len(folders) == 1 and inside == len(names):
        names = name_column(name.partition(b"/")[2] for name in iterate(names))
        folders = {name.partition(b"/")[0] for name in iterate(names) if b"/" in name}
        inside = sum(b"/" in name for name in iterate(names))
    if 0 < inside < len(names):
        flat = next(name for name in iterate(names) if b"/" not in name)
        nested = min(name for name in iterate(names) if b"/" in name)
        raise ImageError(mixed_message(place, printable(flat), printable(nested.partition(b"/")[0])))
    members = in_order(members.set_column(0, SCHEMA.field("name"), names))
    names = members["name"].combine_chunks()
    if inside:
        labels, classes = classes_of(names, folders)
        return TarSource(path, [place], members, ItemColumns(names, labels, list(map(printable, classes))))
    if not all(is_val_name(name) for name in iterate(names)):
        return TarSource(path, [place], members, ItemColumns(names))
    devkit = place.beside(DEVKIT_NAME)
    if devkit.kind() != "file":
        note = f"{place} holds no labels and there is no {DEVKIT_NAME} beside it, so its images have no class"
        return TarSource(path, [place], members, ItemColumns(names), (note,))
    labels, wnids = val_labels(devkit, iterate(names))
    return TarSource(path, [place], members, ItemColumns(names, labels, wnids))
