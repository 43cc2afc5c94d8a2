"""Who writes a folder: one process at a time, and anybody can ask which.

A local folder is held by the operating system's lock on the file `writer.lock` in it, which ends with the process, however it ends; the
file says who holds it. (In an object store there is a lease instead: `cache/lease.py`.) A hold of a whole tree, that of `revq run`, covers
the folders in it as well: their own holds belong to the stages of that very process.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from .errors import HeldError, RevqError
from .files import LOCK_NAME, disk_errors, parse_json, require_folder

_PATIENCE_S = 0.5
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def hold_folder(path: Path | str, purpose: str, *, tree: bool = False) -> Iterator[None]:
    """Hold a local folder, made where it is missing, for writing as long as the block runs. What was made for that, and is empty, goes again.

    Args:
        purpose: told to whoever comes second.
        tree: hold the folders in it too.

    Raises:
        HeldError: another process holds it, or a tree that it is in, or (`tree`) a folder in it.
        OutputError: it is a file, or cannot be written.
    """
    path = Path(path)
    require_folder(path)
    if path.is_dir() and not os.access(path, os.W_OK):
        yield  # nobody can write there; a finished run is still found finished
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with _locked(path / LOCK_NAME, {**this_holder(purpose), "tree": tree}):
            _refuse_overlap(path, tree)
            yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def writer_of(path: Path | str, *, around: bool = False) -> str | None:
    """The other process that is writing a local folder, as `told` tells it; None where there is none.

    Args:
        around: or the folder that it is in, as train-rectifier writes that of the tokenizer.
    """
    path = Path(path).absolute()
    holder = _other_holder(path / LOCK_NAME)
    if holder is None and around:
        outer = _other_holder(path.parent / LOCK_NAME)
        holder = None if outer is None or outer.get("tree") else outer
    return told(holder) if holder else None


@contextmanager
def naming_writer(place: object, writer: Callable[[], str | None]) -> Iterator[None]:
    """Errors of reading `place` say who is writing it, where somebody is: then it is neither damaged nor lost, but not whole yet."""
    try:
        yield
    except RevqError as error:
        name = None
        with contextlib.suppress(RevqError):  # an object store that cannot be reached does not say who writes
            name = writer()
        if name is None or name in str(error):
            raise
        raise type(error)(f"{being_written(place, name)}; wait until it is done, then try again ({error})") from error


def being_written(place: object, writer: str) -> str:
    """That sentence."""
    return f"{place} is being written by another process: {writer}"


def this_holder(purpose: str) -> dict[str, Any]:
    """What a lock says of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "machine": _this_machine(), "user": user, "since": since}


def told(holder: Mapping[str, Any]) -> str:
    """ "process 12 of ann on gpu1, since 2026-01-31 12:00:00 (train-rectifier)" """
    pid, user, host, since, purpose = (holder.get(name, "?") for name in ("pid", "user", "host", "since", "purpose"))
    return f"process {pid} of {user} on {host}, since {since} ({purpose})"


def refusal(place: object, holder: Mapping[str, Any], until: str = "") -> HeldError:
    """Of a second writer."""
    return HeldError(f"{being_written(place, told(holder))}; wait until it is done, or stop it first{until}")


def is_gone(holder: Mapping[str, Any]) -> bool:
    """Whether it is known to have ended: only of a process of this machine can that be known."""
    return holder.get("machine") == _this_machine() and not _is_running(int(holder.get("pid", 0)))


@contextmanager
def _locked(file: Path, holder: Mapping[str, Any]) -> Iterator[None]:
    descriptor = _acquire(file)
    try:
        with disk_errors(file):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        if _is_same_file(descriptor, file):
            file.unlink()  # while it is still held, so that nobody's new lock is removed
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """A descriptor that holds the lock on the file which is at `file` now. It waits a moment: whoever asks who writes holds it for an instant."""
    last = time.monotonic() + _PATIENCE_S
    while True:
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = lock_descriptor(descriptor, blocking=False)
        except OSError as error:  # some network file systems know no locks; there is no protection on them
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        if free and _is_same_file(descriptor, file):
            return descriptor
        holder = {} if free else (parse_json(os.pread(descriptor, 4096, 0)) or {})
        os.close(descriptor)  # where it was free, the holder before us removed the file between our opening and our locking it
        if not free and time.monotonic() > last:
            raise refusal(file.parent, holder)
        time.sleep(0.01)


def _refuse_overlap(path: Path, tree: bool) -> None:
    """Raises HeldError where another process holds the tree that `path` is in, or (`tree`) a folder in it."""
    path = path.absolute()
    for folder in path.parents:
        holder = _other_holder(folder / LOCK_NAME)
        if holder and holder.get("tree"):
            raise refusal(folder, holder)
    for file in sorted(path.glob(f"*/{LOCK_NAME}")) if tree else ():
        if holder := _other_holder(file):
            raise refusal(file.parent, holder)


def _other_holder(file: Path) -> dict[str, Any] | None:
    """Who holds a lock file; None where that is nobody, or this process."""
    try:
        descriptor = _open_to_ask(file)
    except OSError:
        return None
    try:
        if lock_descriptor(descriptor, blocking=False):
            return None  # closing gives it back
        holder = parse_json(os.pread(descriptor, 4096, 0)) or {}
    except OSError:  # no locks on this file system: what can be known is whether a process of this machine runs
        holder = parse_json(os.pread(descriptor, 4096, 0)) or {}
        if holder.get("machine") != _this_machine() or is_gone(holder):
            return None
    finally:
        os.close(descriptor)
    mine = holder.get("pid") == os.getpid() and holder.get("machine") == _this_machine()
    return None if mine else holder or {"purpose": "just begun"}


def _open_to_ask(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR)  # NFS gives a lock only to who may write
    except OSError as error:
        if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise
        return os.open(file, os.O_RDONLY)


def _is_same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


@cache
def _this_machine() -> str:
    """Where a process id means one process: this boot of the machine and its namespace of process ids. Two machines may have one host name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
