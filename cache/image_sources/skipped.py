"""What a source passes over, counted by reason, so that nothing is left out in silence: `open_source` says it, results and summaries hold it.

Never images, whatever is in them: what begins with a dot, and the folders that systems leave behind (macOS's `__MACOSX` and `PaxHeader`,
Synology's `@eaDir` and `#recycle`, QNAP's `@Recycle`, Windows' `$RECYCLE.BIN`, `lost+found`), in capitals or not. Such a folder is counted
once and not looked into.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

HIDDEN, SYSTEM = "hidden", "system folder"
STORE, EMPTY = "Zarr store", "folder without an image"
LINK_AROUND = "link to a folder around it"
_SYSTEM = (
    rb"__MACOSX|PaxHeaders?(?:\.\d+)?|Network Trash Folder|Temporary Items|@eaDir|@tmp|#recycle|#snapshot|@Recycle|@Recently-Snapshot|~snapshot|"
    rb"\$RECYCLE\.BIN|RECYCLER|System Volume Information|FOUND\.\d\d\d|lost\+found"
)
_ASIDE = re.compile(rb"(?:^|/)(?:(\.)[^/]*|(?:" + _SYSTEM + rb")(?=/))", re.IGNORECASE)
_SHOWN = 8


class Skipped:
    """Counts by reason, and the first name of each in the alphabet."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._folders: set[bytes] = set()

    def __len__(self) -> int:
        return self._counts.total()

    def add(self, reason: str, name: bytes, count: int = 1) -> None:
        self._counts[reason] += count
        self._name(reason, name.decode("utf-8", "backslashreplace"))

    def set_aside(self, path: bytes) -> bool:
        """Whether `path` (a folder's ends in a slash) is never an image by the rule above; a folder is counted once for all that is in it."""
        match = _ASIDE.search(path)
        if match is None:
            return False
        whole = path[: match.end()] + b"/" if path[match.end() :] else path
        if whole not in self._folders:
            if whole.endswith(b"/"):
                self._folders.add(whole)
            self.add(HIDDEN if match[1] else SYSTEM, whole)
        return True

    def update(self, other: Skipped) -> None:
        for reason, count in other._counts.items():
            self._counts[reason] += count
            self._name(reason, other._first[reason])

    def _name(self, reason: str, name: str) -> None:
        """Keep the name that comes first in the alphabet, whatever order a folder is listed in."""
        self._first[reason] = min(name, self._first.get(reason, name))

    def counts(self) -> Mapping[str, int]:
        """Most frequent reason first: suffixes (".txt", "no suffix"), and the words above."""
        return dict(sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0])))

    def first(self, reason: str) -> str:
        """The first name of a reason; empty where there is none."""
        return self._first.get(reason, "")

    def __str__(self) -> str:
        """ "10 .txt (a/labels.txt, ...), 1 hidden (.DS_Store)"."""
        told = [f"{count} {reason} ({self._first[reason]}{', ...' if count > 1 else ''})" for reason, count in self.counts().items()]
        return ", ".join(told[:_SHOWN]) + (f" and {len(told) - _SHOWN} more kinds" if len(told) > _SHOWN else "")


def is_aside(name: bytes) -> bool:
    """Whether a folder of this name is never looked into."""
    return _ASIDE.match(name + b"/") is not None
