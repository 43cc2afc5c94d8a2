"""Writes one store again and again and has itself killed at every single file operation on the way; run by test_crash.py.

    python killed_writer.py FOLDER new|overwrite

A child process writes a store and sends itself SIGKILL just before its k-th operation that changes the disk, for k = 1, 2, ... until a
child reaches the end. After each kill nothing that can be read may be half made, the same write is done to its end, and the bytes are
compared with those of a write never killed. Prints how often a child was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_store import PLAN, contents, write

from revq.cache.store import LatentStore, is_store

CHANGES = {"os.rename", "os.mkdir", "os.truncate"}
REMOVALS = {"os.remove", "os.rmdir"}  # shutil.rmtree names files relative to their folder; this process removes nothing else
BEFORE, WANTED = replace(PLAN, images=12, seed=5), replace(PLAN, images=12)  # two shards


def kill_at(operation: int, folder: Path) -> None:
    """From now on, die just before the operation of that number that changes something below `folder`."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in REMOVALS or ((writes or event in CHANGES) and str(folder) in str(arguments[0])):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def is_killed(operation: int, store: Path, overwrite: bool) -> bool:
    """Whether a child that writes `store` was killed there; False: it came to its end before."""
    pid = os.fork()
    if pid == 0:
        kill_at(operation, store)
        write(store, WANTED, overwrite=overwrite)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"the writer ended with {status}"
    return status != 0


def without_progress(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith("progress/") and not name.endswith(".tmp")}


def main(folder: Path, overwrite: bool) -> None:
    write(folder / "whole", WANTED)
    write(folder / "before", BEFORE)
    before, expected = contents(folder / "before"), contents(folder / "whole")
    operation, store = 1, folder / "store"
    while True:
        shutil.rmtree(store, ignore_errors=True)
        if overwrite:
            shutil.copytree(folder / "before", store)
        if not is_killed(operation, store, overwrite):
            break
        if is_store(store) and LatentStore.open(store).splits:
            assert without_progress(contents(store)) in (before, expected), f"killed at {operation}, what can be read is half made"
        write(store, WANTED, overwrite=overwrite)
        assert contents(store) == expected, f"killed at {operation}, the resumed bytes differ"
        operation += 1
    print(operation - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "overwrite")
