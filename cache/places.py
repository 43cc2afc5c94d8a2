"""A file or folder, local or behind an fsspec URL: what is there, and reading a range of bytes from several threads at once.

A place is a local path, `file://PATH`, or any URL that fsspec knows (`s3://...`, `gs://...`, `https://...`, `memory://...`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol, TypeVar

from ..errors import ImageError, RevqError
from .filesystem import asking, is_url, read_again

_OPEN_FILES = 64
REMOTE_THREADS = 16
FILE, FOLDER, BROKEN_LINK, SPECIAL = "file", "folder", "broken link", "no regular file"
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One file or folder."""

    path: str
    """Local path, or path inside `filesystem`."""
    filesystem: Any = None
    """An fsspec file system; None means the local disk."""
    around: tuple[str, str] = ("", "")
    """What stands before and after the path in a chained URL, such as ("zip://", "::s3://bucket/a.zip"); empty for any other."""
    error_type: type[RevqError] = ImageError
    """What the failures of a file system become."""

    def __str__(self) -> str:
        if self.filesystem is None:
            return os.fsencode(self.path).decode("utf-8", "backslashreplace")
        before, after = self.around
        return f"{before}{self.path}{after}" if before else self.filesystem.unstrip_protocol(self.path)

    @property
    def base(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def full_name(self) -> str:
        """The same however the path was written: what stores record."""
        return str(self if self.filesystem is not None else Place(os.path.realpath(self.path)))

    def at(self, path: str) -> Place:
        """Another path of the same file system."""
        return replace(self, path=path)

    def inside(self, name: str) -> Place:
        """What lies in this folder under the relative path `name`."""
        return self.at(os.path.join(self.path, name))

    def beside(self, base: str) -> Place:
        """Another file of the same folder."""
        return self.at(os.path.join(os.path.dirname(self.path), base))

    def kind(self) -> str | None:
        """ "file", "folder", or None where nothing is there. Raises `error_type` or OSError where that cannot be found out."""
        if self.filesystem is None:
            try:
                return FOLDER if stat.S_ISDIR(os.stat(self.path).st_mode) else FILE
            except OSError as error:
                if nothing_there(error):
                    return None
                raise
        with self.asking():
            try:
                return FOLDER if self.filesystem.info(self.path)["type"] == "directory" else FILE
            except FileNotFoundError:
                return None

    def scan(self) -> list[tuple[str, str]]:
        """(name, kind) of all that lies directly in this folder; kinds are FILE, FOLDER, BROKEN_LINK and SPECIAL. Links are followed.

        Raises OSError or `error_type` where that cannot be listed: a folder that is passed over would be a class that disappears.
        """
        if self.filesystem is None:
            with os.scandir(self.path) as found:
                return [(entry.name, _kind(entry)) for entry in found]
        with self.asking():
            listed = self.filesystem.ls(self.path, detail=True)
        here = self.path.rstrip("/")  # object stores may list the folder itself
        others = [entry for entry in listed if entry["name"].rstrip("/") != here]
        return [(Place(entry["name"]).base, FOLDER if entry["type"] == "directory" else FILE) for entry in others]

    def open(self) -> RandomFile:
        """Raises OSError."""
        return _LocalFile(self.path) if self.filesystem is None else _RemoteFile(self)

    def read(self) -> bytes:
        """The whole file. Raises OSError, and `error_type` where a server fails."""
        if self.filesystem is None:
            with open(self.path, "rb") as file:
                return file.read()
        return self.again(lambda: self.filesystem.cat_file(self.path))

    def asking(self) -> AbstractContextManager[None]:
        """For all that is asked of its remote file system; see `filesystem.asking`."""
        return asking(self, self.filesystem, self.error_type)

    def again(self, work: Callable[[], T]) -> T:
        """The result of reading from its remote file system.

        A server's failure is no property of an image, which would be recorded as unreadable for ever: it is tried again, then stops the run.
        """
        return read_again(self, self.filesystem, work, self.error_type)


def nothing_there(error: OSError) -> bool:
    """Whether it says that there is no such file or folder; a name that is too long for the file system can be none's."""
    return isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        kind = FOLDER if entry.is_dir() else FILE if entry.is_file() else SPECIAL
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return BROKEN_LINK
    return BROKEN_LINK if kind == SPECIAL and entry.is_symlink() and not os.path.exists(entry.path) else kind


class RandomFile(Protocol):
    """An open file from which several threads may read at once."""

    size: int
    local: bool

    def read_at(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; fewer at the end of the file. Raises OSError, and ImageError where a server fails."""


class _LocalFile:
    local = True

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, offset)
        while len(data) < count and (more := os.pread(self._descriptor, count - len(data), offset + len(data))):
            data += more
        return data

    def __del__(self) -> None:  # closed when the last thread that reads from it lets go
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class _RemoteFile:
    local = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self.size = int(place.again(lambda: place.filesystem.info(place.path)["size"]))

    def read_at(self, offset: int, count: int) -> bytes:
        stop = min(offset + count, self.size)
        return self._place.again(lambda: self._place.filesystem.cat_file(self._place.path, start=offset, end=stop)) if offset < stop else b""


class OpenFiles:
    """Files that are opened when first read, the most recent ones kept open: 1024 shards would be more than a process may open."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._open: OrderedDict[int, RandomFile] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, number: int) -> RandomFile:
        with self._lock:
            file = self._open.pop(number, None)
            if file is None:
                file = self.places[number].open()
            self._open[number] = file
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return file


def relative_names(places: Sequence[Place]) -> list[str]:
    """Paths of the files relative to the deepest folder that holds all of them, with forward slashes."""
    root = os.path.commonpath([os.path.dirname(place.path) for place in places])
    return [place.path[len(root) :].lstrip("/") for place in places]


def place_of(spec: str, error_type: type[RevqError] = ImageError, **options: Any) -> Place:
    """The place that a path or URL names, `options` being fsspec's.

    Raises `error_type` where the URL's protocol is unknown, or the package that it needs is not installed.
    """
    if not is_url(spec):
        return Place(os.path.expanduser(spec.removeprefix("file://")), error_type=error_type)
    from fsspec.core import url_to_fs  # only URLs need it

    with asking(spec, None, error_type):
        filesystem, path = url_to_fs(spec, **options)
        place = Place(path, filesystem, _around(spec, path), error_type)
        if place.around[0].endswith(("tar://", "zip://")) and (not path or not filesystem.exists(path)):
            dotted = place.at(os.path.join(".", path).rstrip("/"))  # the names of an archive made of "." begin with it, and fsspec keeps it
            return dotted if filesystem.exists(dotted.path) else place
        return place


def _around(spec: str, path: str) -> tuple[str, str]:
    """Place.around of the place that a URL names; a local archive is named by its full path."""
    if "::" not in spec:
        return "", ""
    links = spec.split("::")
    if not is_url(links[-1]):
        links[-1] = os.path.realpath(links[-1].removeprefix("file://"))
    number = next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
    protocol, found, _ = links[number].partition("://")
    before = "".join(f"{link}::" for link in links[:number]) + (f"{protocol}://" if found and "://" not in path else "")
    return before, "".join(f"::{link}" for link in links[number + 1 :])
