"""What a stage says while it works. A stage is a generator of these; it never prints. The last event is always a `Result`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Begin:
    """A countable piece of work starts."""

    task: str
    """What is done, in the user's words, such as "encode train"."""
    total: int
    """How many units there are in all."""
    unit: str
    """Plural name of a unit: "images", "codebooks", "steps"."""
    done: int = 0
    """Units that an earlier, interrupted run has already finished."""


@dataclass(frozen=True, kw_only=True)
class Advance:
    """The work begun last has reached `done` units."""

    done: int
    """Units finished so far, counted from the start of the whole work."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Figures worth watching, by name with unit, such as {"val_mse": 0.04}."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line a user should read."""

    text: str
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """The stage is done; `value` is JSON-able and is what `--json` prints."""

    value: Mapping[str, Any]


Event = Begin | Advance | Note | Result


def run_quietly(events: Iterable[Event]) -> Mapping[str, Any]:
    """Run a stage to its end without drawing anything; returns the value of its `Result`."""
    with closing_events(events):
        for event in events:
            if isinstance(event, Result):
                return event.value
    raise AssertionError("a stage ends with a Result")


@contextmanager
def closing_events(events: Iterable[Event]) -> Iterator[None]:
    """Close a stage when the block ends, however it ends: it still gets to leave its files in order and give its folder free, now and not at
    garbage collection."""
    try:
        yield
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
