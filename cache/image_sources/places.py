"""Files of a source, local or behind an fsspec URL: what is there, and reading a range of bytes from several threads at once.

A place is a local path, `file://PATH`, or any URL that fsspec knows (`s3://...`, `gs://...`, `https://...`, `memory://...`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Protocol

from ...errors import ImageError, one_line
from .place_errors import place_errors
from .skipped import BROKEN_LINK, LINK_AROUND, SPECIAL, STORE, is_aside

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_ATTEMPTS = 4  # of one remote read: 0.5 + 1 + 2 s of waiting between them
_OPEN_FILES = 64
REMOTE_THREADS = 16
FILE, FOLDER = "file", "folder"
_one_reader = Lock()


@dataclass(frozen=True)
class Place:
    """One file or folder."""

    path: str
    """Local path, or path inside `filesystem`."""
    filesystem: Any = None
    """An fsspec file system; None means the local disk."""
    around: tuple[str, str] = ("", "")
    """What stands before and after the path in a chained URL, such as ("zip://", "::s3://bucket/a.zip"); empty for any other."""

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
        """ "file", "folder", or None where nothing is there. Raises ImageError or OSError where that cannot be found out."""
        if self.filesystem is None:
            try:
                return FOLDER if stat.S_ISDIR(os.stat(self.path).st_mode) else FILE
            except (FileNotFoundError, NotADirectoryError):
                return None
        with remote_errors(self), turn(self.filesystem):
            try:
                return FOLDER if self.filesystem.info(self.path)["type"] == "directory" else FILE
            except FileNotFoundError:
                return None

    def scan(self) -> list[tuple[str, str]]:
        """(name, kind) of all that lies directly in this folder; kinds are FILE, FOLDER, BROKEN_LINK and SPECIAL. Links are followed.

        Raises OSError or ImageError where that cannot be listed: a folder that is passed over would be a class that disappears.
        """
        if self.filesystem is None:
            with os.scandir(self.path) as found:
                return [(entry.name, _kind(entry)) for entry in found]
        with remote_errors(self), turn(self.filesystem):
            listed = self.filesystem.ls(self.path, detail=True)
        here = self.path.rstrip("/")  # object stores may list the folder itself
        others = [entry for entry in listed if entry["name"].rstrip("/") != here]
        return [(Place(entry["name"]).base, FOLDER if entry["type"] == "directory" else FILE) for entry in others]

    def entries(self) -> tuple[list[str], list[str]]:
        """Sorted names of the files and of the folders directly in this folder; hidden ones are left out."""
        found = sorted(((name, kind) for name, kind in self.scan() if not name.startswith(".")), key=lambda entry: os.fsencode(entry[0]))
        return [name for name, kind in found if kind != FOLDER], [name for name, kind in found if kind == FOLDER]

    def walk(self) -> Iterator[tuple[str, str]]:
        """(path relative to this folder, kind) of all that is in it at any depth, with forward slashes; kinds are those of `scan`, and STORE.

        Folders that never hold images are given and not looked into, nor are links to a folder around them (LINK_AROUND). Raises as `scan`.
        """
        if self.filesystem is None or not _lists_at_once(self.filesystem):
            yield from self._walk("", (os.path.realpath(self.path),))
            return
        root = self.path.rstrip("/") + "/"
        with remote_errors(self), turn(self.filesystem):
            found = [path.removeprefix(root) for path in self.filesystem.find(self.path)]
        stores = tuple(path.removesuffix("zarr.json") for path in found if path.endswith("/zarr.json"))
        folders = dict.fromkeys(path.partition("/")[0] for path in found if "/" in path)
        yield from ((folder, STORE if f"{folder}/" in stores else FOLDER) for folder in folders)
        yield from ((path, FILE) for path in found if not path.startswith(stores))

    def _walk(self, prefix: str, around: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """`around`: the real paths of the folders from the root to this one, by which a link that leads back is found."""
        folder = self.inside(prefix)
        entries = folder.scan()
        if prefix:
            store = ("zarr.json", FILE) in entries
            yield prefix, STORE if store else FOLDER
            if store:
                return
        for name, kind in entries:
            path = f"{prefix}/{name}" if prefix else name
            if kind != FOLDER or is_aside(os.fsencode(name)):
                yield path, kind
                continue
            real = os.path.realpath(folder.inside(name).path) if self.filesystem is None else path
            if real in around:
                yield path, LINK_AROUND
            else:
                yield from self._walk(path, (*around, real))

    def open(self) -> RandomFile:
        """Raises OSError."""
        return _LocalFile(self.path) if self.filesystem is None else _RemoteFile(self)

    def read(self) -> bytes:
        """The whole file. Raises OSError, and ImageError where a server or the place fails (see `place_errors`)."""
        if self.filesystem is None:
            with place_errors(self), open(self.path, "rb") as file:
                return file.read()
        return _retry(self, lambda: self.filesystem.cat_file(self.path))


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
        self.size = int(_retry(place, lambda: place.filesystem.info(place.path)["size"]))

    def read_at(self, offset: int, count: int) -> bytes:
        stop = min(offset + count, self.size)
        return _retry(self._place, lambda: self._place.filesystem.cat_file(self._place.path, start=offset, end=stop)) if offset < stop else b""


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


def is_there(place: Place) -> bool:
    """Raises ImageError where that cannot be found out."""
    with place_errors(place):
        return place.kind() is not None


def relative_names(places: Sequence[Place]) -> list[str]:
    """Paths of the files relative to the deepest folder that holds all of them, with forward slashes."""
    root = os.path.commonpath([os.path.dirname(place.path) for place in places])
    return [place.path[len(root) :].lstrip("/") for place in places]


def is_url(spec: str) -> bool:
    return _URL.match(spec) is not None


def place_of(spec: str) -> Place:
    """The place that a path or URL names. Raises ImageError where fsspec does not know the URL's protocol."""
    if spec.startswith("file://"):
        return Place(spec.removeprefix("file://"))
    if not is_url(spec):
        return Place(os.path.expanduser(spec))
    import fsspec  # only URLs need it

    with remote_errors(spec), _one_reader:
        filesystem, path = fsspec.core.url_to_fs(spec)
        place = Place(path, filesystem, _around(spec, path))
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
        links[-1] = os.path.realpath(links[-1])
    number = next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)
    protocol, found, _ = links[number].partition("://")
    before = "".join(f"{link}::" for link in links[:number]) + (f"{protocol}://" if found and "://" not in path else "")
    return before, "".join(f"::{link}" for link in links[number + 1 :])


def turn(filesystem: Any) -> AbstractContextManager[Any]:
    """Held while a file system is used that several threads may not use at once; nothing for one that they may.

    fsspec promises that of none: all files of a `tar://` share the seek position of the one archive, `simplecache::` shows a file that is
    still being copied, FTP has one connection, two archives in `memory://` may be one object. So there is one lock for all of these.
    """
    return nullcontext() if _is_shareable(filesystem) else _one_reader


def _is_shareable(filesystem: Any) -> bool:
    """Requests that know nothing of each other (s3, gs, az, http, hf), or a file that each read opens for itself."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    inner = getattr(filesystem, "fs", None) or getattr(filesystem, "sync_fs", None)
    if isinstance(filesystem, AsyncFileSystem):
        return inner is None or _is_shareable(inner)
    return isinstance(filesystem, LocalFileSystem | MemoryFileSystem) or type(filesystem).__name__ == "HfFileSystem"


def _lists_at_once(filesystem: Any) -> bool:
    """Whether its `find` is one listing of everything, as object stores have it. fsspec's general one swallows errors of sub-folders."""
    from fsspec import AbstractFileSystem

    kind = type(filesystem)
    return not hasattr(filesystem, "fs") and (kind.find is not AbstractFileSystem.find or "_find" in vars(kind))


def _retry(place: Place, work: Any) -> Any:
    """A server's failure is no property of an image, which would be recorded as unreadable for ever: try again, then stop the run."""
    for attempt in range(_ATTEMPTS):
        try:
            with turn(place.filesystem):
                return work()
        except FileNotFoundError:
            raise
        except PermissionError:
            with place_errors(place):
                raise
        except Exception as error:
            if attempt == _ATTEMPTS - 1:
                if isinstance(error, zipfile.BadZipFile | zlib.error):  # of this member alone: the zip's list was read before
                    raise OSError(f"damaged in its archive ({one_line(error)})") from error
                reason = f"{type(error).__name__}: {one_line(error)}"[:200]
                raise ImageError(f"{place} cannot be read after {_ATTEMPTS} attempts ({reason}); give the same command again to go on") from error
            time.sleep(0.5 * 2**attempt)


@contextmanager
def remote_errors(place: Place | str) -> Iterator[None]:
    """Whatever a file system raises (each has its own exceptions) as one line that names the place."""
    try:
        yield
    except (FileNotFoundError, ImageError):
        raise
    except ImportError as error:
        raise ImageError(f"{place} needs a package that is not installed ({one_line(error)})") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise ImageError(f"{place} cannot be opened ({reason}); check the address and your credentials") from error
