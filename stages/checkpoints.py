"""The checkpoints of train-rectifier on disk.

`checkpoints/` holds the last few as step-XXXXXXXX.pt, that of the first phase's end (from where a run may be made longer), and best.pt.
Only rank 0 writes; every rank reads the one that rank 0 found sound.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import MismatchError, TrainingError
from ..files import write_bytes
from . import ranks
from .events import Event, Note
from .train_state import TrainState

BEST_NAME = "best.pt"


def save_checkpoint(state: TrainState, folder: Path, *, keep: int, best: bool) -> None:
    """Write one checkpoint, whole or not at all, then drop all but the last `keep`; `best` also writes it as the best one."""
    content = state.state_dict()
    if ranks.rank() == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        if best:
            write_bytes(folder / BEST_NAME, buffer.getvalue())
        write_bytes(_path(folder, state.step), buffer.getvalue())
        for old in _newest_first(folder)[keep:]:
            if old != _path(folder, state.first_steps):
                old.unlink()
    ranks.barrier()


def resume(state: TrainState, folder: Path, device: torch.device) -> Iterator[Event]:
    """Load the newest checkpoint that can be read and that lies on the way to what is planned now.

    Raises:
        TrainingError: there are checkpoints, and none can be read.
        MismatchError: the latents come in another order now.
    """
    paths = _newest_first(folder) if ranks.rank() == 0 else []
    found, damaged = None, []
    for path in paths:
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            if not _on_the_way(content, state.planned):
                continue
            state.load_state_dict(content)
        except MismatchError:
            raise
        except Exception as error:  # torch and zipfile raise many kinds for a torn file
            damaged.append(path.name)
            yield Note(text=f"checkpoint {path.name} is damaged ({type(error).__name__}); going back to the one before", warning=True)
            continue
        found = path.name
        break
    if damaged and len(damaged) == len(paths):
        raise TrainingError(f"no checkpoint in {folder} can be read ({', '.join(damaged)}); start again with --overwrite")
    found = ranks.broadcast(found)
    if found and ranks.rank() > 0:
        state.load_state_dict(torch.load(folder / found, map_location=device, weights_only=True))
    if found:
        yield Note(text=f"resuming at step {state.step}")


def load_best(state: TrainState, folder: Path, device: torch.device) -> None:
    """Take over the averaged rectifier and the codebooks of the best checkpoint."""
    content = torch.load(folder / BEST_NAME, map_location=device, weights_only=True)
    state.average.load_state_dict(content["average"])
    state.quantizer.load_state_dict(content["quantizer"])


def _on_the_way(content: dict[str, Any], planned: tuple[int, int]) -> bool:
    """A run made longer goes on from its first phase: what the last phase did comes after other steps now."""
    return tuple(content["planned"]) == planned or content["step"] <= min(content["first_steps"], planned[0])


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
