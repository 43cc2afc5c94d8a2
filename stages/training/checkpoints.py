"""The checkpoints of train-rectifier on disk.

`checkpoints/` holds the last few, each named by its step, that of the latent phase's end (from where a run may be made longer), and best.pt.
Only rank 0 writes; every rank reads the one that rank 0 found sound.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import TrainingError
from ...files import read_json, write_bytes
from .. import ranks
from ..events import Event, Note
from .state import TrainState

BEST_NAME = "best.pt"


def save_checkpoint(state: TrainState, folder: Path, *, keep: int, best: bool) -> None:
    """Write one checkpoint, whole or not at all; then drop all but it and the `keep` - 1 before it. `best` also writes it as the best one."""
    content = state.state_dict()
    if ranks.rank() == 0:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        if best:
            write_bytes(folder / BEST_NAME, buffer.getvalue())
        newest = _path(folder, state.step)
        write_bytes(newest, buffer.getvalue())
        _flush_names(folder)
        # What lies further on is of a plan that was given up, or of before a damaged checkpoint: it must not crowd out the good ones.
        others = [path for path in _newest_first(folder) if path != newest]
        earlier = [path for path in others if path < newest]
        for old in set(others) - set(earlier[: keep - 1]) - {_path(folder, state.latent_steps)}:
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
        content, faults = _read(path, state, device)
        if faults:
            damaged.append(path.name)
            yield Note(text=f"checkpoint {path.name} is damaged ({faults}) and left out", warning=True)
            continue
        if not _on_the_way(content, state.planned):
            continue
        state.load_state_dict(content)
        found = path.name
        break
    if damaged and len(damaged) == len(paths):
        raise TrainingError(f"no checkpoint in {folder} can be read ({', '.join(damaged)}); start again with --overwrite")
    found = ranks.broadcast(found)
    if found and ranks.rank() > 0:
        state.load_state_dict(torch.load(folder / found, map_location=device, weights_only=True))
    if found:
        yield Note(text=f"resuming at step {state.step}")
    elif damaged:
        yield Note(text=f"none of the other checkpoints lies on the way to {state.planned[0]} steps: starting at step 0", warning=True)


def began_with(out: Path, identity: Mapping[str, Any]) -> str | None:
    """ "resident" or "stream", whichever the run of these settings in `out` began with; None where it has no checkpoint that can be read."""
    config = read_json(out / "config.json") if ranks.rank() == 0 else None
    began = None
    if config is not None and config.get("identity") == json.loads(json.dumps(dict(identity))):
        for path in _newest_first(out / "checkpoints"):
            try:
                began = "stream" if torch.load(path, map_location="cpu", mmap=True, weights_only=True)["streamed"] else "resident"
                break
            except Exception:  # as in `resume`, which will say so
                continue
    found: str | None = ranks.broadcast(began)
    return found


def take_weights(state: TrainState, folder: Path, step: int, device: torch.device) -> Generator[Event, None, int]:
    """Take over the averaged rectifier and the codebooks of the best checkpoint, made at `step`; where it cannot be read, keep those of the end.

    Returns:
        The step of the weights that the state has now.
    """
    if step == state.step:
        return step
    name = ranks.broadcast(_readable(folder, step, state) if ranks.rank() == 0 else None)
    if name is None:
        text = f"the best weights, of step {step}, cannot be read from {folder / BEST_NAME}: the tokenizer gets those of step {state.step}"
        yield Note(text=text, warning=True)
        return state.step
    content = torch.load(folder / name, map_location=device, weights_only=True)
    state.ema.load_state_dict(content["ema"])
    state.quantizer.load_state_dict(content["quantizer"])
    return step


def _readable(folder: Path, step: int, state: TrainState) -> str | None:
    """A sound checkpoint of this step: the best one, or another that was kept."""
    for path in (folder / BEST_NAME, _path(folder, step)):
        content, faults = _read(path, state, torch.device("cpu"))
        if not faults and content["step"] == step:
            return path.name
    return None


def _read(path: Path, state: TrainState, device: torch.device) -> tuple[dict[str, Any], str]:
    """A checkpoint, and what keeps it from being a whole one of this run; "" where nothing does."""
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return content, state.faults(content)
    except Exception as error:  # missing, torn, or no checkpoint: torch and zipfile raise many kinds
        return {}, type(error).__name__


def _on_the_way(content: dict[str, Any], planned: tuple[int, int]) -> bool:
    """A run made longer goes on from its latent phase: what the decoder phase did comes after other steps now."""
    return tuple(content["planned"]) == planned or content["step"] <= min(content["latent_steps"], planned[0])


def _flush_names(folder: Path) -> None:
    """Have the folder's new names on disk, before older files go: a crash of the machine may else keep the removal and lose the rename."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
