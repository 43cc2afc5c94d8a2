"""How a command ends: what a user can mend becomes one line on standard error, and every end has its exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..errors import RevqError, one_line
from ..files import disk_errors
from .distributed import world
from .terminal_text import printable


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on standard error and an exit code; REVQ_DEBUG=1 shows the traceback instead.

    Exit codes: 1 an error, 130 interrupted by Ctrl-C and 143 by SIGTERM (both to be resumed), 141 when the reader of a pipe went away.
    """
    main_pid = os.getpid()

    def terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
        if os.getpid() != main_pid:
            os._exit(128 + signal_number)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        with disk_errors("the output"):
            yield
    except BrokenPipeError:
        # Python would complain again when it flushes standard output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:
        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("REVQ_DEBUG"):
            raise
        rank, size = world()
        print(printable(f"revq: error{f' on rank {rank}' if size > 1 else ''}: {line}"), file=sys.stderr)
        raise SystemExit(1) from None


def _one_line(error: Exception) -> str | None:
    """The error as one line for people; None for a fault of revq's own, which needs its traceback."""
    if isinstance(error, RevqError):
        return one_line(error, most=None)
    if world()[1] > 1 and isinstance(error, RuntimeError) and "Connection" in str(error) and "peer" in str(error):
        return "another rank stopped, so this one cannot go on; what it finished is kept, and the first error above says why"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; free some, or give a smaller --batch-size where there is one (what is finished is kept)"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    return None
