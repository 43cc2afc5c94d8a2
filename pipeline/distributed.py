"""How many processes work together. This version runs in one."""

from __future__ import annotations

import os

from ..errors import ConfigError


def world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun tells them in RANK and WORLD_SIZE; (0, 1) without torchrun.

    Raises:
        ConfigError: there is more than one process.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size != 1:
        raise ConfigError(
            f"this version runs in one process, but torchrun started {size}; give the command without torchrun, or with --nproc-per-node 1"
        )
    return rank, size
