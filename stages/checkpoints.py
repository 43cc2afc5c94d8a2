"""The state of train-rectifier, and its checkpoints on disk.

Shapes: T tokens, K codes per codebook.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_bytes
from ..models.quantizer import MultiGroupQuantizer
from ..models.rectifier import Rectifier
from .events import Event, Note

_KEPT_CHECKPOINTS = 2


@dataclass(kw_only=True)
class TrainState:
    """All that changes while training."""

    rectifier: Rectifier
    average: Rectifier
    quantizer: MultiGroupQuantizer
    optimizer: torch.optim.Optimizer
    step: int = 0
    counts: Tensor
    """(T,K) int64: how often each code was used since the last reset of unused codes."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Rows of metrics.parquet so far."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        modules = {name: getattr(self, name).state_dict() for name in ("rectifier", "average", "quantizer", "optimizer")}
        return {**modules, "step": self.step, "counts": self.counts, "history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in ("rectifier", "average", "quantizer", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.history = state["step"], state["history"]
        self.counts.copy_(state["counts"])


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write one checkpoint, whole or not at all, then drop all but the last few."""
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    write_bytes(folder / f"step-{state.step:08d}.pt", buffer.getvalue())
    for old in sorted(folder.glob("step-*.pt"))[:-_KEPT_CHECKPOINTS]:
        old.unlink()


def resume(state: TrainState, folder: Path, device: torch.device) -> Iterator[Event]:
    """Load the newest checkpoint that can be read."""
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            state.load_state_dict(torch.load(path, map_location=device, weights_only=True))
        except Exception as error:  # torch and zipfile raise many kinds for a torn file
            yield Note(text=f"checkpoint {path.name} is damaged ({type(error).__name__}); going back to the one before", warning=True)
            continue
        yield Note(text=f"resuming at step {state.step}")
        return
