"""The folder that a command writes: held against a second writer for the whole run, and claimed for the run's settings.

There is no other way to claim one, so that none is written unheld. Under torchrun rank 0 holds and claims; what is refused there is refused
on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import claim_output, local_path
from ..lock import hold_folder, writer_of
from . import ranks
from .events import Note


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is held."""

    path: Path
    kind: str
    """What it holds, such as "revq-codebooks"."""

    def claim(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> bool:
        """Make it this run's own: see `files.claim_output`. Returns whether an earlier run of the same identity is there to be resumed."""
        return ranks.on_first(lambda: claim_output(self.path, kind=self.kind, identity=identity, overwrite=overwrite))

    def replace(self, identity: Mapping[str, Any]) -> None:
        """Empty it of another run and make it this one's own; for rank 0, once what is to be written has been made."""
        claim_output(self.path, kind=self.kind, identity=identity, overwrite=True)


@contextmanager
def output_folder(path: str | Path, *, kind: str, command: str, tree: bool = False) -> Iterator[OutputFolder]:
    """Hold a folder as long as the block runs; comes before anything slow, and changes nothing that is there.

    Args:
        command: told to whoever comes second.
        tree: hold the folders in it too, against other processes.

    Raises:
        OutputError: another process holds it; it is a file, or cannot be written.
    """
    folder = local_path(path)
    with ranks.held(lambda: hold_folder(folder, command, tree=tree)):
        yield OutputFolder(folder, kind)


def note_on_writer(path: str | Path) -> Iterator[Note]:
    """A warning where another process is writing the local folder that is about to be read: it may be replaced at any time."""
    if writer := writer_of(local_path(path)):
        yield Note(text=f"{path} is being written by another process: {writer}; this reads what is there now", warning=True)
