"""Where a latent store lies: a local folder, or a folder of an object store behind an fsspec URL (s3://bucket/latents.zarr).

Both give the same few operations on files named by a key, a path below it with forward slashes. A file is written whole or not at
all: locally by temporary file, flush and rename; in an object store one upload either makes the object or does not.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from ..errors import OutputError, StoreError
from ..files import LOCK_NAME, disk_errors, local_path, replacing, sizes_under
from ..lock import hold_folder, writer_of
from .filesystem import asking, is_url, protocols_of, unreachable
from .lease import Lease, LeaseObject, hold_lease, lease_writer
from .places import FILE, Place, nothing_there, place_of

_TEMPORARY = ("*.partial", "*.tmp")  # zarr's and ours, left by a killed process
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf"})


class StoreFolder(ABC):
    """A folder of files, local or remote. Where it is remote, all that reads raises StoreError when it cannot be reached."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.name = name
        """Its path or URL, for messages."""

    def read(self, key: str) -> bytes | None:
        """The bytes of a file; None where there is none."""
        try:
            return bytes(self.place.inside(key).read())
        except OSError as error:
            if nothing_there(error) or isinstance(error, IsADirectoryError):
                return None
            raise

    def children(self, key: str = "") -> list[str]:
        """Sorted names of the files and folders directly in a folder, without temporary ones and the lock; none where it is missing."""
        try:
            return sorted(name for name, _ in self.place.inside(key).scan() if not _is_temporary(name))
        except OSError as error:
            if nothing_there(error):
                return []
            raise

    def is_file(self) -> bool:
        """Whether there is a file where the folder should be."""
        return self.place.kind() == FILE

    def exists(self) -> bool:
        """Whether anything is there. A folder of an object store exists as soon as it holds a file."""
        return self.place.kind() is not None

    @abstractmethod
    def sizes(self, key: str = "") -> dict[str, int]:
        """Size in bytes of every file at any depth of a folder, by sorted key."""

    @abstractmethod
    def creating(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A file object whose content becomes the file when the block ends well, for what is too large for memory. Raises OutputError."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all. Raises OutputError."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none. Raises OutputError."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove the temporary files of killed processes."""

    @abstractmethod
    def zarr_store(self, key: str = "") -> Store:
        """A folder as a Zarr store, for reading."""

    @abstractmethod
    def locked(self, purpose: str) -> AbstractContextManager[str | None]:
        """Hold the folder for writing as long as the block runs; `purpose` is told to whoever comes second. Raises OutputError where it is held.

        Yields what a user must know where a second writer cannot be excluded for certain, else None. Where the hold is lost on the way, every
        write raises OutputError.
        """

    @abstractmethod
    def writer(self) -> str | None:
        """The other process that holds the folder for writing, as `lock.told` tells it; None where there is none."""


class LocalFolder(StoreFolder):
    """A folder of a local or mounted file system."""

    def __init__(self, root: Path) -> None:
        super().__init__(Place(str(root)), str(root))
        self.root = root

    def sizes(self, key: str = "") -> dict[str, int]:
        sizes = sizes_under(self.root / key)
        return {f"{key}/{name}".lstrip("/"): size for name, size in sizes.items() if not _is_temporary(name)}

    def write(self, key: str, data: bytes) -> None:
        with self.creating(key) as file:
            file.write(data)

    @contextmanager
    def creating(self, key: str) -> Iterator[BinaryIO]:
        with replacing(self.root / key) as temporary, open(temporary, "wb") as file:
            yield file

    def remove(self, key: str) -> None:
        path = self.root / key
        with disk_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        for pattern in _TEMPORARY:
            for file in self.root.rglob(pattern):
                file.unlink(missing_ok=True)

    def zarr_store(self, key: str = "") -> Store:
        return LocalStore(self.root / key, read_only=True)

    @contextmanager
    def locked(self, purpose: str) -> Iterator[str | None]:
        with hold_folder(self.root, purpose):
            yield None

    def writer(self) -> str | None:
        return writer_of(self.root)


class RemoteFolder(StoreFolder):
    """A folder of an object store, or of anything else that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Raises StoreError where the URL's protocol is unknown or its package is not installed."""
        url = url.rstrip("/")
        super().__init__(place_of(url, StoreError, use_listings_cache=False), url)  # another process may have written since
        self._fs = self.place.filesystem
        self._lease: Lease | None = None

    def sizes(self, key: str = "") -> dict[str, int]:
        with self.place.asking():
            found = self._fs.find(self._path(key), detail=True)
        keys = {path.removeprefix(self._path()).lstrip("/"): int(info["size"] or 0) for path, info in found.items()}
        return {key: keys[key] for key in sorted(keys) if key != LOCK_NAME}

    def write(self, key: str, data: bytes) -> None:
        with self._writing():
            self._fs.pipe_file(self._prepared(key), data)

    @contextmanager
    def creating(self, key: str) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(prefix="revq-upload-") as file:
            yield file  # type: ignore[misc]
            file.flush()
            with self._writing():
                self._fs.put_file(file.name, self._prepared(key))

    def remove(self, key: str) -> None:
        with self._writing(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(key), recursive=True)

    def sweep(self) -> None:
        """An upload that did not finish left nothing that could be seen."""

    def zarr_store(self, key: str = "") -> Store:
        # The wrapper calls the blocking file system from threads. Zarr's own way is a second, asynchronous one, whose connections nobody closes.
        return FsspecStore(fs=AsyncFileSystemWrapper(self._fs, asynchronous=True), path=self._path(key), read_only=True)

    @contextmanager
    def locked(self, purpose: str) -> Iterator[str | None]:
        with self._writing():
            path = self._prepared(LOCK_NAME)
        with hold_lease(self.name, LeaseObject(self._fs, path, self._unreachable), purpose) as self._lease:
            try:
                yield self._lease.note
            finally:
                self._lease = None

    def writer(self) -> str | None:
        return lease_writer(LeaseObject(self._fs, self._path(LOCK_NAME), self._unreachable))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """For all that writes: the lease is held, and errors are OutputErrors, that of a bucket which is not there among them."""
        if self._lease is not None:
            self._lease.check()
        try:
            with asking(self.name, self._fs, OutputError):
                yield
        except FileNotFoundError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> OutputError:
        return unreachable(self.name, error, OutputError)

    def _path(self, key: str = "") -> str:
        return f"{self.place.path}/{key}" if key else self.place.path

    def _prepared(self, key: str) -> str:
        """The path of a file that is about to be written, its folder made. An object store has no folders, and would be given a new bucket."""
        path = self._path(key)
        if not _OBJECT_STORES & protocols_of(self._fs):
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        return path


def open_folder(path: str | Path | StoreFolder) -> StoreFolder:
    """The folder at a path or URL, which need not exist yet.

    Raises:
        StoreError: the URL's protocol is unknown, or the package that it needs is not installed.
    """
    if isinstance(path, StoreFolder):
        return path
    if is_url(path):
        return RemoteFolder(str(path))
    return LocalFolder(local_path(str(path).removeprefix("file://")))


def _is_temporary(key: str) -> bool:
    name = Path(key)
    return name.name == LOCK_NAME or any(name.match(pattern) for pattern in _TEMPORARY)
