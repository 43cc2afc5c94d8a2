"""One writer at a time. A second one is refused and told who holds the place.

A local folder is held by the operating system's lock on a file, which ends with the process, however it ends. An object store has no
such lock: there the holder keeps a lease that it renews, and that others may take once it has run out.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import OutputError
from ..files import disk_errors

LEASE_S = 120.0
_RENEW_S = 30.0
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def lock_file(path: Path, purpose: str) -> Iterator[None]:
    """Hold `path`, a file that this makes and removes.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    descriptor = _acquire(path)
    try:
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_holder(purpose)).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody's new lock is removed
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """A descriptor that holds the lock on the file which is at `path` now."""
    import fcntl

    while True:
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise _refusal(path.parent, _parse(holder)) from None
        except OSError as error:  # some network file systems know no locks; there is no protection on them
            if error.errno not in _NO_LOCKS:
                raise
            return descriptor
        if _is_same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # the holder before us removed the file between our opening and our locking it


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def lease(
    name: str,
    purpose: str,
    *,
    read: Callable[[], bytes | None],
    write: Callable[[bytes], None],
    remove: Callable[[], None],
    settle_s: float = 0.2,
) -> Iterator[None]:
    """Hold a lease, kept as one small object and renewed in the background.

    Two who come within `settle_s` of each other both write, and the one whose lease stands after that wait has it.

    Args:
        name: of the object, for messages.
        read, write, remove: that object's content; None where there is none.
        settle_s: seconds between writing the lease and trusting it.

    Raises:
        OutputError: another process holds it.
    """
    _refuse_held(name, read())
    mine = {**_holder(purpose), "token": uuid.uuid4().hex}
    stop = threading.Event()

    def renew() -> None:
        write(json.dumps({**mine, "expires": time.time() + LEASE_S}).encode())

    def keep() -> None:
        while not stop.wait(_RENEW_S):
            with contextlib.suppress(OutputError):  # a renewal that fails is tried again; what the store refuses, the writer will be told
                renew()

    renew()
    time.sleep(settle_s)
    _refuse_held(name, read(), mine["token"])
    keeper = threading.Thread(target=keep, name="revq-lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        stop.set()
        keeper.join()
        if _parse(read()).get("token") == mine["token"]:
            remove()


def _refuse_held(name: str, content: bytes | None, token: str | None = None) -> None:
    """Raises OutputError where a lease is held by another than `token`: not run out, and not of a process of this machine that is gone."""
    holder = _parse(content)
    if not holder or holder.get("token") == token:
        return
    gone = holder.get("host") == socket.gethostname() and not _is_running(int(holder.get("pid", 0)))
    if float(holder.get("expires", 0)) > time.time() and not gone:
        raise _refusal(name.rsplit("/", 1)[0], holder)


def _holder(purpose: str) -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "user": user, "since": since}


def _refusal(place: Path | str, holder: dict[str, Any]) -> OutputError:
    who = "process {pid} of {user} on {host}, since {since} ({purpose})"
    names = {name: holder.get(name, "?") for name in ("pid", "user", "host", "since", "purpose")}
    until = f"; if that machine is gone, its hold ends by itself in {holder['expires'] - time.time():.0f} s" if "expires" in holder else ""
    return OutputError(f"{place} is being written by another process: {who.format(**names)}; wait until it is done, or stop it first{until}")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


def _parse(content: bytes | None) -> dict[str, Any]:
    """The holder that a lock names; empty where there is none, or it was torn."""
    try:
        value = json.loads(content or b"")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
