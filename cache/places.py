"""Files of a source, local or behind an fsspec URL: what is there, and reading a range of bytes from several threads at once.

A place is a local path, `file://PATH`, or any URL that fsspec knows (`s3://...`, `gs://...`, `https://...`, `memory://...`).
"""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from threading import Lock
from typing import Any, Protocol

from ..errors import ImageError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_ATTEMPTS = 4  # of one remote read: 0.5 + 1 + 2 s of waiting between them
_OPEN_FILES = 64
REMOTE_THREADS = 16


@dataclass(frozen=True)
class Place:
    """One file or folder."""

    path: str
    """Local path, or path inside `filesystem`."""
    filesystem: Any = None
    """An fsspec file system; None means the local disk."""

    def __str__(self) -> str:
        return os.fsencode(self.path).decode("utf-8", "backslashreplace") if self.filesystem is None else self.filesystem.unstrip_protocol(self.path)

    @property
    def base(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def full_name(self) -> str:
        """The same however the path was written: what stores record."""
        return str(self if self.filesystem is not None else Place(os.path.realpath(self.path)))

    def beside(self, base: str) -> Place:
        """Another file of the same folder."""
        return Place(os.path.join(os.path.dirname(self.path), base), self.filesystem)

    def kind(self) -> str | None:
        """ "file", "folder", or None where nothing is there. Raises ImageError where that cannot be found out."""
        if self.filesystem is None:
            return "folder" if os.path.isdir(self.path) else "file" if os.path.exists(self.path) else None
        with remote_errors(self):
            try:
                return "folder" if self.filesystem.info(self.path)["type"] == "directory" else "file"
            except FileNotFoundError:
                return None

    def entries(self) -> tuple[list[str], list[str]]:
        """Sorted names of the files and of the folders directly in this folder; hidden ones are left out."""
        found: list[tuple[str, bool]]
        if self.filesystem is None:
            with os.scandir(self.path) as scan:
                found = [(entry.name, entry.is_dir()) for entry in scan]
        else:
            with remote_errors(self):
                listed = self.filesystem.ls(self.path, detail=True)
            found = [(Place(entry["name"]).base, entry["type"] == "directory") for entry in listed]
        found = sorted((entry for entry in found if not entry[0].startswith(".")), key=lambda entry: os.fsencode(entry[0]))
        return [name for name, folder in found if not folder], [name for name, folder in found if folder]

    def walk(self) -> Iterator[str]:
        """Paths, relative to this folder and with forward slashes, of all files at any depth of its sub-folders; hidden ones are left out."""
        if self.filesystem is None:
            for top in self.entries()[1]:  # a sub-folder may be a link, deeper links are not followed
                for folder, subfolders, names in os.walk(os.path.join(self.path, top)):
                    subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                    prefix = PurePath(folder).relative_to(self.path).as_posix()
                    yield from (f"{prefix}/{name}" for name in names if not name.startswith("."))
            return
        root = self.path.rstrip("/") + "/"
        with remote_errors(self):
            found = self.filesystem.find(self.path)
        relative = (path.removeprefix(root) for path in found)
        yield from (path for path in relative if "/" in path and not any(part.startswith(".") for part in path.split("/")))

    def open(self) -> RandomFile:
        """Raises OSError."""
        return _LocalFile(self.path) if self.filesystem is None else _RemoteFile(self)

    def read(self) -> bytes:
        """The whole file. Raises OSError, and ImageError where a server fails."""
        if self.filesystem is None:
            with open(self.path, "rb") as file:
                return file.read()
        return _retry(self, lambda: self.filesystem.cat_file(self.path))


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

    with remote_errors(spec):
        filesystem, path = fsspec.core.url_to_fs(spec)
        return Place(path, filesystem)


def _retry(place: Place, work: Any) -> Any:
    """A server's failure is no property of an image, which would be recorded as unreadable for ever: try again, then stop the run."""
    for attempt in range(_ATTEMPTS):
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if attempt == _ATTEMPTS - 1:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
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
        raise ImageError(f"{place} needs a package that is not installed ({' '.join(str(error).split())})") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ImageError(f"{place} cannot be opened ({reason}); check the address and your credentials") from error
