"""fsspec as the sources of images and the stores use it: URLs, one file system in several threads, attempts, and errors in one line."""

from __future__ import annotations

import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any, TypeVar

from ..errors import RevqError, one_line

_URL = re.compile(r"(?!file://)[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_ATTEMPTS = 4  # of one read: 0.5 + 1 + 2 s of waiting between them
_one_reader = Lock()
T = TypeVar("T")
E = TypeVar("E", bound=RevqError)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names something by an fsspec URL, chained ones included; file:// is no URL in this sense, but a local path."""
    return _URL.match(os.fspath(path)) is not None


def protocols_of(filesystem: Any) -> set[str]:
    return {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)


def unreachable(place: object, error: Exception, error_type: type[E]) -> E:
    """What a file system raised (each has its own exceptions) as one line that names the place."""
    reason = one_line(error)
    if isinstance(error, ImportError):
        return error_type(f"{place} needs a package that is not installed ({reason}); for S3: pip install 'revq[s3]'")
    if isinstance(error, ValueError):
        return error_type(f"{place} cannot be opened ({reason}); give a local path, or a URL such as s3://bucket/folder")
    return error_type(f"{place} cannot be reached ({type(error).__name__}: {reason}); check the address, your credentials and the network")


@contextmanager
def asking(place: object, filesystem: Any, error_type: type[RevqError]) -> Iterator[None]:
    """For all that is asked of a file system (None: one that is being opened): its turn, and all but FileNotFoundError as `error_type`."""
    try:
        with _turn(filesystem):
            yield
    except (FileNotFoundError, RevqError):
        raise
    except Exception as error:
        raise unreachable(place, error, error_type) from error


def read_again(place: object, filesystem: Any, work: Callable[[], T], error_type: type[RevqError]) -> T:
    """The result of a read that is tried several times. A file that is missing, or no file, is the caller's: that OSError passes."""
    attempt = 1
    while True:
        try:
            with _turn(filesystem):
                return work()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:
            if attempt == _ATTEMPTS or isinstance(error, PermissionError):
                if isinstance(error, zipfile.BadZipFile | zlib.error):  # of this member alone: the zip's list was read before
                    raise OSError(f"damaged in its archive ({one_line(error)})") from error
                tried = f" after {attempt} attempts" if attempt > 1 else ""
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise error_type(f"{place} cannot be read{tried} ({reason}); mend it, then give the same command again to go on") from error
        time.sleep(0.25 * 2**attempt)
        attempt += 1


def _turn(filesystem: Any) -> AbstractContextManager[Any]:
    """Held while a file system is used that several threads may not use at once; nothing for one that they may.

    fsspec promises that of none: all files of a `tar://` share the seek position of the one archive, `simplecache::` shows a file that is
    still being copied, FTP has one connection, two archives in `memory://` may be one object. So there is one lock for all of these.
    """
    return nullcontext() if _is_shareable(filesystem) else _one_reader


def _is_shareable(filesystem: Any) -> bool:
    """Requests that know nothing of each other (s3, gs, az, http, hf), or a file that each read opens for itself."""
    from fsspec.asyn import AsyncFileSystem  # only URLs need it
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    inner = getattr(filesystem, "fs", None) or getattr(filesystem, "sync_fs", None)
    if isinstance(filesystem, AsyncFileSystem):
        return inner is None or _is_shareable(inner)
    return isinstance(filesystem, LocalFileSystem | MemoryFileSystem) or type(filesystem).__name__ == "HfFileSystem"


def lists_at_once(filesystem: Any) -> bool:
    """Whether its `find` is one listing of everything, as object stores have it. fsspec's general one swallows errors of sub-folders."""
    from fsspec import AbstractFileSystem

    kind = type(filesystem)
    return not hasattr(filesystem, "fs") and (kind.find is not AbstractFileSystem.find or "_find" in vars(kind))
