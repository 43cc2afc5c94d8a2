"""What fails because of the place where the images are, and not because of one image: the run stops, and goes on when the place is back.

Recorded as unreadable, the images of a network mount that goes away would be missing from the store for ever.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...errors import ImageError, one_line
from ..places import Place

_NAMES = """
    EACCES EPERM EIO EREMOTEIO ESTALE ENXIO ENODEV ENOLINK ENOTCONN ESHUTDOWN ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH
    ECONNREFUSED ECONNRESET ECONNABORTED EPIPE EMFILE ENFILE ENOMEM ENOBUFS
"""
_OF_THE_PLACE = frozenset(getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name))  # no system has all of them
_NEIGHBOURS = 4


@contextmanager
def place_errors(place: object, *, archive: bool = False) -> Iterator[None]:
    """Turn an OSError of `place` into an ImageError, which stops the run; one that may be of a single image passes.

    Args:
        archive: other images are in the same file, so that its absence is no single image's either.
    """
    try:
        yield
    except OSError as error:
        of_the_place = isinstance(error, PermissionError | ConnectionError | TimeoutError) or error.errno in _OF_THE_PLACE
        if of_the_place or (archive and isinstance(error, FileNotFoundError | NotADirectoryError)):
            reason = error.strerror or one_line(error)
            raise ImageError(
                f"{place} cannot be read ({reason}), and that is no fault of one image; mend it, then give the same command again to go on"
            ) from error
        raise


def neighbours_gone(is_there: Callable[[int], bool], index: int, count: int) -> bool:
    """Whether most of the images listed around number `index` of `count` are gone as well, and at least two are."""
    others = [i for i in range(max(0, index - _NEIGHBOURS), min(count, index + _NEIGHBOURS + 1)) if i != index]
    gone = sum(not is_there(i) for i in others)
    return gone >= 2 and 2 * gone > len(others)


def is_there(place: Place) -> bool:
    """Raises ImageError where that cannot be found out."""
    with place_errors(place):
        return place.kind() is not None
