"""One writer at a time in an object store, which has no locks: a lease, kept as one small object that its holder renews.

The store itself decides who has it. The lease is created only where there is none, and replaced (to renew it, or to take over one that
has run out) only while it is still the version that was read. A store is tried out before it is trusted; where it does not refuse, the
lease is written and read back after a wait, which most likely finds a second writer, and surely stops one of two at the next renewal.

No answer of a store is believed without looking: a refusal may be the answer to the second sending of a request whose first was heeded.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import HeldError, OutputError
from ..files import parse_json
from ..lock import being_written, is_gone, refusal, this_holder, told
from .filesystem import protocols_of

LEASE_S = 120.0
_RENEW_S = 30.0
_MARGIN_S = 30.0  # before its end a lease is no longer relied on: what is under way then still has to arrive
_SETTLE_S = 2.0
_PATIENCE_S = 10.0
_CREATING = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})  # their pipe_file(mode="create") is the store's own exclusive create
_SWAPPING = frozenset({"s3", "s3a"})
_REFUSALS = {409, 412}


class LeaseObject:
    """The object that holds a lease, with writes on the condition that it is still what it was."""

    def __init__(self, file_system: Any, path: str, told_error: Callable[[Exception], OutputError]) -> None:
        """`path` is where it lies in the fsspec `file_system`; `told_error` makes an error of the store one line."""
        self._fs, self._path, self._told_error = file_system, path, told_error
        protocols = protocols_of(file_system)
        self.creates, self.swaps = bool(protocols & _CREATING), bool(protocols & _SWAPPING)
        """Whether the store refuses to create what is there, and to replace what has changed; what it claims, until `try_out`."""

    def look(self) -> tuple[bytes | None, str | None]:
        """(content, version); (None, None) where there is none. The version is the older of the two, so that a swap by it can only fail."""
        try:
            version = self._fs.info(self._path, **({"refresh": True} if self.swaps else {})).get("ETag")
            return bytes(self._fs.cat_file(self._path)), version
        except FileNotFoundError:
            return None, None
        except Exception as error:
            raise self._told_error(error) from error

    def put(self, data: bytes, version: str | None, *, new: bool) -> str | None:
        """Write `data` where there is nothing yet (`new`), or in place of `version`; returns its version, or None where another was faster.

        Raises:
            OutputError: the store cannot be reached, or it failed.
        """
        failure = None
        try:
            self._write(data, version, new=new)
        except Exception as error:
            failure = error
        there, now = self.look()
        if there == data:
            return now or ""
        if failure is not None and not _is_refusal(failure, new=new):
            raise self._told_error(failure) from failure
        return None

    def try_out(self, data: bytes) -> None:
        """See whether the store refuses what it should, now that the object is there with this content."""
        self.creates = self.creates and self._refuses(data, None, new=True)
        self.swaps = self.creates and self.swaps and self._refuses(data, '"00000000000000000000000000000000"', new=False)

    def remove(self, version: str | None) -> None:
        """Remove it, as far as the store can tell only that version."""
        if self.swaps:
            bucket, key, _ = self._fs.split_path(self._path)
            self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=version)
        else:
            self._fs.rm_file(self._path)

    def _write(self, data: bytes, version: str | None, *, new: bool) -> None:
        condition: dict[str, Any] = {}
        if new and self.creates:
            condition = {"mode": "create"}
        elif not new and self.swaps:
            condition = {"IfMatch": version}
        self._fs.pipe_file(self._path, data, **condition)

    def _refuses(self, data: bytes, version: str | None, *, new: bool) -> bool:
        try:
            self._write(data, version, new=new)
        except Exception as error:
            if _is_refusal(error, new=new):
                return True
            raise self._told_error(error) from error
        return False


class Lease:
    """A lease that this process holds, unless it was lost on the way: then `check` says so."""

    def __init__(self, place: str, kept: LeaseObject, purpose: str) -> None:
        self._place, self._object = place, kept
        self._mine = {**this_holder(purpose), "token": uuid.uuid4().hex}
        self._version: str | None = None
        self._until = 0.0  # by the monotonic clock
        self._lost: HeldError | None = None
        self._renewing = threading.Lock()

    @property
    def note(self) -> str | None:
        """What a user must know where the store cannot exclude a second writer; None where it can."""
        if self._object.creates:
            return None
        return (
            f"{self._place}: this store does not refuse to create what is there already, so two writers that start together may both go on, "
            f"for at most {_RENEW_S:.0f} s, until one of them is stopped; see to it that only one writes"
        )

    def take(self) -> None:
        """Get hold of it.

        Raises:
            OutputError: another process holds it, or the store cannot be reached.
        """
        before = self._refuse_held()
        while not self._put(new=before is None):  # another was faster, and may be done already
            before = self._refuse_held()
        self._object.try_out(self._content)
        if not self._object.creates or (before is not None and not self._object.swaps):
            time.sleep(_SETTLE_S)
        if not self._stands():
            raise self._refusal(parse_json(self._object.look()[0]) or {})

    def check(self) -> None:
        """Return where the lease is held for certain; called before each write.

        Raises:
            OutputError: another process has taken it, or it ran out and the store cannot be reached to renew it.
        """
        if self._lost is None and time.monotonic() < self._until:
            return
        self.renew()

    def renew(self) -> None:
        """Hold it longer. A lease that ran out is held still where nobody has taken it meanwhile.

        Raises:
            OutputError: see `check`. Only a lease that was taken is lost for good.
        """
        with self._renewing:
            while self._lost is None and self._stands():
                if self._put(new=False):
                    return
            if self._lost is None:
                thief = parse_json(self._object.look()[0]) or {}
                who = being_written(self._place, told(thief)) if thief else f"the hold of {self._place} was removed"
                mend = "this one stops, since its hold could not be renewed in time; what it finished is kept, the same command continues"
                self._lost = HeldError(f"{who}; {mend}")
            raise self._lost

    def keep(self, stop: threading.Event) -> None:
        """Renew until `stop`, or until the lease is lost. A renewal that fails is tried again; whoever writes meanwhile is told by `check`."""
        wait_s = _RENEW_S
        while self._lost is None and not stop.wait(wait_s):
            try:
                self.renew()
                wait_s = _RENEW_S
            except OutputError:
                wait_s = _RENEW_S / 10

    def give_back(self) -> None:
        """Remove it, if it is still ours; where that cannot be done it runs out by itself."""
        with contextlib.suppress(Exception):
            if self._stands():
                try:
                    self._object.remove(self._version)
                except Exception:  # some stores cannot remove one version: what ran out holds nothing either
                    self._object.put(json.dumps({**self._mine, "expires": 0}).encode(), self._version, new=False)

    def _refuse_held(self) -> bytes | None:
        """The lease that is there, which nobody holds; None where there is none."""
        there, self._version = self._object.look()
        holder = parse_json(there) or {}
        if _holds(holder):
            raise self._refusal(holder)
        return there

    def _put(self, *, new: bool) -> bool:
        """Write the lease anew on that condition; whether it stands."""
        asked, ends = time.monotonic(), time.time() + LEASE_S
        self._content = json.dumps({**self._mine, "expires": ends, "nonce": uuid.uuid4().hex}).encode()
        version = self._object.put(self._content, self._version, new=new)
        if version is None:
            return False
        self._version, self._until = version, asked + LEASE_S - _MARGIN_S
        return True

    def _stands(self) -> bool:
        """Whether the lease is ours, in whichever version: an earlier renewal that seemed to fail may have arrived since."""
        there, version = self._object.look()
        mine = (parse_json(there) or {}).get("token") == self._mine["token"]
        if mine:
            self._version = version
        return mine

    def _refusal(self, holder: dict[str, Any]) -> HeldError:
        left_s = float(holder.get("expires", time.time())) - time.time()
        return refusal(self._place, holder, f"; if that machine is gone, its hold ends by itself in {max(0.0, left_s):.0f} s")


@contextmanager
def hold_lease(place: str, kept: LeaseObject, purpose: str) -> Iterator[Lease]:
    """Hold a lease as long as the block runs, renewed in the background.

    Args:
        place: what is held, for messages.
        kept: the object that holds it.
        purpose: told to whoever comes second.

    Raises:
        OutputError: another process holds it, or the store cannot be reached.
    """
    lease = Lease(place, kept, purpose)
    lease.take()
    stop = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(stop,), name="revq-lease", daemon=True)
    keeper.start()
    try:
        yield lease
    finally:
        stop.set()
        keeper.join(_PATIENCE_S)
        if not keeper.is_alive():  # else its renewal hangs, and the lease runs out by itself
            lease.give_back()


def lease_writer(kept: LeaseObject) -> str | None:
    """The other process that holds a lease, as `told` tells it; None where none does."""
    holder = parse_json(kept.look()[0]) or {}
    mine = this_holder("")
    if not _holds(holder) or all(holder.get(name) == mine[name] for name in ("pid", "machine")):
        return None
    return told(holder)


def _holds(holder: dict[str, Any]) -> bool:
    return bool(holder) and float(holder.get("expires", 0)) > time.time() and not is_gone(holder)


def _is_refusal(error: Exception, *, new: bool) -> bool:
    """Whether a store answered that the condition of a write does not hold: it is there already, or (not `new`) is another or gone."""
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return status in _REFUSALS or (not new and isinstance(error, FileNotFoundError))
