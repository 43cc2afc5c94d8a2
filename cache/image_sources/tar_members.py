"""Members of tars as a source of images: where each one lies, in columns, and reading it by offset. `tar` and `webdataset` make such sources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

import pyarrow as pa

from ...errors import ImageError
from ..places import BROKEN_LINK, REMOTE_THREADS, SPECIAL, OpenFiles, Place, RandomFile
from .folder import IMAGE_SUFFIXES, is_image
from .items import ImageItem, ItemColumns
from .place_errors import place_errors
from .skipped import Skipped
from .tar_index import BLOCK, Member, TarWalk

_LOCAL_THREADS = 4  # they wait for the disk; parsing is Python's and gains nothing from threads
_ROWS = 8192
SCHEMA = pa.schema({"name": pa.large_binary(), "file": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "crc": pa.uint32()})
NO_IMAGE, BROKEN = -1, -2
"""Offsets that stand for a sample without an image, and for an image that is a link to nothing."""
Row = tuple[bytes, int, int, int, int]
"""(name, number of the file, offset, size, CRC-32 of the header), as in SCHEMA."""


class TarSource:
    """Members of one or more tars, in columns of which each image takes some 65 bytes."""

    def __init__(
        self, name: str, places: Sequence[Place], members: pa.Table, items: ItemColumns, skipped: Skipped, notes: Sequence[str] = ()
    ) -> None:
        """`members` has SCHEMA and the order of `items`; a negative offset stands for an image that is missing."""
        self.name, self.skipped, self._items = name, skipped, items
        self._files = OpenFiles(places)
        self._columns = [members[column].to_numpy() for column in SCHEMA.names[1:]]
        broken = int((members["offset"].to_numpy() == BROKEN).sum())
        links = [f"{broken} images of {name} are links to nothing in the archive; they are recorded as unreadable"] if broken else []
        self.notes: tuple[str, ...] = (*notes, *links)

    @property
    def items(self) -> Sequence[ImageItem]:
        return self._items

    def read(self, index: int) -> bytes:
        """As `ImageSource.read`. Raises ImageError where the tar is no longer the one that was listed: its other images would be garbage too."""
        number, offset, size, crc = (int(column[index]) for column in self._columns)
        if offset == BROKEN:
            raise OSError("a link to nothing in the archive")
        if offset == NO_IMAGE:
            raise OSError(f"the sample has no image: no member KEY{{{','.join(sorted(IMAGE_SUFFIXES))}}}")
        with place_errors(self._files.places[number], archive=True):
            data = self._files[number].read_at(offset - BLOCK, BLOCK + size)
        if len(data) != BLOCK + size or crc32(data[:BLOCK]) != crc:
            raise ImageError(f"{self._files.places[number]} has changed since it was listed; give the same command again once it is whole")
        return data[BLOCK:]


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


def members_of(walk: TarWalk, skipped: Skipped) -> Iterator[Member]:
    """Files and folders of a tar: links as the files that they name, which may be anywhere in it; the rest is counted in `skipped`."""
    links: dict[bytes, Member] = {}
    for member in walk:
        if skipped.set_aside(member.name + b"/" * (member.kind == "folder")):
            continue
        if member.kind == "link":
            links[member.name] = member
        elif member.kind == "other":
            skipped.add(SPECIAL, member.name)
        else:
            yield member
    if not links:
        return
    wanted = {member.target for member in links.values()}
    named = {member.name: member for member in walk if member.name in wanted and member.kind in {"file", "folder"}}
    for name, member in links.items():
        target, seen = member.target, {name}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target].target
        found = named.get(target)
        if found is not None and found.kind == "file":
            yield found._replace(name=name)
        elif found is None and is_image(name):
            yield Member(name, BROKEN, 0, 0, "file")
        else:
            skipped.add("link to a folder" if found else BROKEN_LINK, name)


def threads_for(file: RandomFile) -> int:
    return _LOCAL_THREADS if file.local else REMOTE_THREADS


def _batch(rows: list[Row]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def sample_key(name: bytes) -> bytes:
    """What the members of one WebDataset sample share: all up to the first dot of the file name."""
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]
