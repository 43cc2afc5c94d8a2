"""Where a latent store lies: a local folder, or a folder of an object store behind an fsspec URL (s3://bucket/latents.zarr).

Both give the same few operations on files named by a key, a path below it with forward slashes. A file is written whole or not at
all: locally by temporary file, flush and rename; in an object store one upload either makes the object or does not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from ..errors import OutputError, StoreError, one_line
from ..files import LOCK_NAME, disk_errors, replacing, sizes_under
from ..lock import hold_folder, writer_of
from .lease import Lease, LeaseObject, hold_lease, lease_writer

_TEMPORARY = ("*.partial", "*.tmp")  # zarr's and ours, left by a killed process
F = TypeVar("F", bound=Callable[..., Any])


class StoreFolder(ABC):
    """A folder of files, local or remote."""

    name: str
    """Its path or URL, for messages."""

    @abstractmethod
    def read(self, key: str) -> bytes | None:
        """The bytes of a file; None where there is none."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Write a file, whole or not at all. Raises OutputError."""

    @abstractmethod
    def creating(self, key: str) -> AbstractContextManager[BinaryIO]:
        """A file object whose content becomes the file when the block ends well, for what is too large for memory. Raises OutputError."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""

    @abstractmethod
    def children(self, key: str = "") -> list[str]:
        """Sorted names of the files and folders directly in a folder, without temporary ones and the lock; none where it is missing."""

    @abstractmethod
    def sizes(self, key: str = "") -> dict[str, int]:
        """Size in bytes of every file at any depth of a folder, by sorted key."""

    @abstractmethod
    def is_file(self) -> bool:
        """Whether there is a file where the folder should be."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether anything is there. A folder of an object store exists as soon as it holds a file."""

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
        self.root = root
        self.name = str(root)

    def read(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

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

    def children(self, key: str = "") -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / key) if not _is_temporary(Path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, key: str = "") -> dict[str, int]:
        sizes = sizes_under(self.root / key)
        return {f"{key}/{name}".lstrip("/"): size for name, size in sizes.items() if not _is_temporary(Path(name))}

    def is_file(self) -> bool:
        return self.root.exists() and not self.root.is_dir()

    def exists(self) -> bool:
        return self.root.exists()

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


def _told(method: F) -> F:
    """Errors of an object store, of which every library has its own, as one line with the address."""

    @wraps(method)
    def wrapped(self: RemoteFolder, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except OutputError:
            raise
        except Exception as error:
            raise _remote_error(self.name, error) from error

    return wrapped  # type: ignore[return-value]


class RemoteFolder(StoreFolder):
    """A folder of an object store, or of anything else that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Raises StoreError where the URL's protocol is unknown or its package is not installed."""
        self.name = url.rstrip("/")
        self._fs, self._root = open_filesystem(self.name)
        self._lease: Lease | None = None

    @_told
    def read(self, key: str) -> bytes | None:
        try:
            return bytes(self._fs.cat_file(self._path(key)))
        except (FileNotFoundError, IsADirectoryError):
            return None

    @_told
    def write(self, key: str, data: bytes) -> None:
        self._check_lease()
        self._fs.pipe_file(self._prepared(key), data)

    @contextmanager
    def creating(self, key: str) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(prefix="revq-upload-") as file:
            yield file  # type: ignore[misc]
            file.flush()
            self._upload(file.name, key)

    @_told
    def _upload(self, local: str, key: str) -> None:
        self._check_lease()
        self._fs.put_file(local, self._prepared(key))

    @_told
    def remove(self, key: str) -> None:
        self._check_lease()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(key), recursive=True)

    @_told
    def children(self, key: str = "") -> list[str]:
        try:
            found = self._fs.ls(self._path(key), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found if path.rstrip("/") != self._path(key)}
        return sorted(names - {LOCK_NAME, ""})

    @_told
    def sizes(self, key: str = "") -> dict[str, int]:
        found = self._fs.find(self._path(key), detail=True)
        keys = {path.removeprefix(self._root).lstrip("/"): int(info["size"] or 0) for path, info in found.items()}
        return {key: keys[key] for key in sorted(keys) if key != LOCK_NAME}

    @_told
    def is_file(self) -> bool:
        return bool(self._fs.isfile(self._root))

    @_told
    def exists(self) -> bool:
        return bool(self._fs.exists(self._root))

    def sweep(self) -> None:
        """An upload that did not finish left nothing that could be seen."""

    def zarr_store(self, key: str = "") -> Store:
        # The wrapper calls the blocking file system from threads. Zarr's own way is a second, asynchronous one, whose connections nobody closes.
        return FsspecStore(fs=AsyncFileSystemWrapper(self._fs, asynchronous=True), path=self._path(key), read_only=True)

    @contextmanager
    def locked(self, purpose: str) -> Iterator[str | None]:
        with hold_lease(self.name, self._lease_object(writing=True), purpose) as self._lease:
            try:
                yield self._lease.note
            finally:
                self._lease = None

    @_told
    def writer(self) -> str | None:
        return lease_writer(self._lease_object())

    @_told
    def _lease_object(self, *, writing: bool = False) -> LeaseObject:
        path = self._prepared(LOCK_NAME) if writing else self._path(LOCK_NAME)
        return LeaseObject(self._fs, path, lambda error: _remote_error(self.name, error))

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _prepared(self, key: str) -> str:
        """The path of a file that is about to be written, its folder made. An object store has no folders, and would be given a new bucket."""
        path = self._path(key)
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if not _OBJECT_STORES & protocols:
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        return path


_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf"})
_OPTIONS = {"use_listings_cache": False}  # another process may have written since


def is_url(path: str | Path) -> bool:
    """Whether it names something by an fsspec URL; file:// is no URL in this sense, but a local path."""
    return "://" in str(path) and not str(path).startswith("file://")


def open_folder(path: str | Path | StoreFolder) -> StoreFolder:
    """The folder at a path or URL, which need not exist yet.

    Raises:
        StoreError: the URL's protocol is unknown, or the package that it needs is not installed.
    """
    if isinstance(path, StoreFolder):
        return path
    if is_url(path):
        return RemoteFolder(str(path))
    return LocalFolder(Path(str(path).removeprefix("file://")).expanduser())


def open_filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL.

    Raises:
        StoreError: the protocol is unknown, or the package that it needs is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        file_system, path = url_to_fs(url, **_OPTIONS)
    except ImportError as error:
        raise StoreError(f"{url} needs a package that is not installed ({one_line(error)}); for S3: pip install 'revq[s3]'") from error
    except ValueError as error:
        raise StoreError(f"{url} cannot be opened ({one_line(error)}); give a local path, or a URL such as s3://bucket/folder") from error
    return file_system, str(path).rstrip("/")


def _remote_error(name: str, error: Exception) -> OutputError:
    reason = f"{type(error).__name__}: {one_line(error)}"
    return OutputError(f"{name} cannot be reached or written ({reason}); check the address, your credentials and the network")


def _is_temporary(path: Path) -> bool:
    return path.name == LOCK_NAME or any(path.match(pattern) for pattern in _TEMPORARY)


def local_root(folder: StoreFolder) -> Path | None:
    """The folder of a local folder; None for a remote one."""
    return folder.root if isinstance(folder, LocalFolder) else None


def remove_if_empty(folder: StoreFolder, key: str) -> None:
    """Remove a folder that holds nothing; an object store has no such folders."""
    root = local_root(folder)
    if root is not None:
        with contextlib.suppress(OSError):
            os.rmdir(root / key)
