"""What the tests of train-rectifier share: small runs, stopped runs, and a run's parts made ready to step by hand."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from revq import LatentStore
from revq.models.codebooks import load_codebooks
from revq.stages.configs import TrainRectifierConfig
from revq.stages.events import Advance, Begin, Event
from revq.stages.train_rectifier import train_step
from revq.stages.training.data import open_inputs
from revq.stages.training.run import open_run
from revq.stages.training.state import new_state

SMALL = {"steps": 12, "batch_size": 16, "width": 32, "depth": 1, "evaluations": 4}


def config(store: Path, codebooks: Path, out: Path, **changes: object) -> TrainRectifierConfig:
    return TrainRectifierConfig(**{"store": str(store), "codebooks": str(codebooks), "out": str(out), **SMALL, **changes})  # type: ignore[arg-type]


def stop_at(step: int, events: Iterator[Event]) -> None:
    """Take the events of a run until it tells of that step, then close it as Ctrl-C would."""
    training = False
    for event in events:
        if isinstance(event, Begin):
            training = event.task.startswith("train")
        if training and isinstance(event, Advance) and event.done >= step:
            break
    events.close()  # type: ignore[attr-defined]


def weights(out: Path) -> bytes:
    return (out / "tokenizer" / "model.safetensors").read_bytes()


def metrics_of(run: Path) -> dict[str, list[Any]]:
    """The columns of its metrics.parquet."""
    columns: dict[str, list[Any]] = pq.read_table(run / "metrics.parquet").to_pydict()
    return columns


def newest_step(run: Path) -> int:
    """Of its checkpoints; -1 where there is none."""
    return max((int(path.stem[5:]) for path in run.glob("checkpoints/step-*.pt")), default=-1)


def made_by(events: Generator[Event, None, Any]) -> Any:
    """What a generator of events returns."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


@dataclass(frozen=True)
class Prepared:
    """Everything that steps need."""

    settings: TrainRectifierConfig
    inputs: Any
    state: Any
    run: Any

    def step(self) -> torch.Tensor:
        return train_step(self.run, self.state).sum()

    def weights(self) -> list[torch.Tensor]:
        return [tensor.clone() for module in (self.state.rectifier, self.state.quantizer) for tensor in module.state_dict().values()]


def prepared(store: Path, codebooks: Path, out: Path, **changes: object) -> Prepared:
    settings, fitted = config(store, codebooks, out, **changes), load_codebooks(codebooks)
    inputs = open_inputs(settings, LatentStore.open(store), fitted)
    state = new_state(settings, inputs, fitted.codebooks)
    return Prepared(settings, inputs, state, made_by(open_run(settings, inputs, state, out)))
