"""Several processes under torchrun."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path


def test_of_several_ranks_only_the_first_speaks(torchrun: Callable[..., subprocess.CompletedProcess[str]], small_store: Path) -> None:
    done = torchrun(2, "info", small_store)
    assert done.stdout.count("fingerprint") == 2  # the store's and the VAE's
