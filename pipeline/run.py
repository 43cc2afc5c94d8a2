"""All stages one after the other. Each stage sees for itself what is done already, so a run repeated is a run resumed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import HeldError, MismatchError, OutputError
from ..files import local_path
from ..stages import ranks
from ..stages.configs import EvaluateConfig
from ..stages.encode_latents import encode_latents
from ..stages.evaluate import evaluate
from ..stages.events import Begin, Event, Note, Result, closing_events
from ..stages.fit_codebooks import fit_codebooks
from ..stages.output_folder import output_folder
from ..stages.train_rectifier import train_rectifier
from .config import Plan
from .preflight import check_plan
from .reporting.report import write_report

RUN_KIND = "revq-run"


def run(plan: Plan, *, overwrite: bool = False) -> Iterator[Event]:
    """Do what is missing of a plan; the result is that of the evaluation, with every stage's own under "stages".

    Args:
        overwrite: redo the stages that were done with other settings, instead of stopping there.

    Raises:
        OutputError: the folder holds something else, or (without `overwrite`) a stage made with other settings.
        RevqError: see the stages; what a later one would miss is found before the first begins.
    """
    with output_folder(plan.out, kind=RUN_KIND, command="run", tree=True) as folder:
        folder.claim({})
        check_plan(plan, overwrite=overwrite)
        yield from _run(plan, overwrite=overwrite)


def _run(plan: Plan, *, overwrite: bool) -> Iterator[Event]:
    """The stages, in a folder that is held; each holds its own in it."""
    steps: list[tuple[str, Callable[[Any], Iterator[Event]], Any]] = [
        ("encode-latents train", encode_latents, plan.encode_train),
        ("encode-latents val", encode_latents, plan.encode_val),
        ("fit-codebooks", fit_codebooks, plan.fit),
        ("train-rectifier", train_rectifier, plan.train),
        ("evaluate", evaluate_and_report, plan.evaluate),
    ]
    steps = [step for step in steps if step[2] is not None]
    values: dict[str, Mapping[str, Any]] = {}
    for number, (name, stage, config) in enumerate(steps, 1):
        yield Note(text=f"[{number}/{len(steps)}] {name}")
        values[name] = yield from _step(stage, config, overwrite=overwrite)
    evaluation = values.pop("evaluate")
    yield Result(value={**evaluation, "out": str(plan.out), "stages": values})


def _step(stage: Callable[[Any], Iterator[Event]], config: Any, *, overwrite: bool) -> Generator[Event, None, Mapping[str, Any]]:
    """One stage's events but for its result, which is returned."""
    begun, events = False, stage(config)
    try:
        with closing_events(events):
            for event in events:
                if isinstance(event, Result):
                    return event.value
                begun = begun or isinstance(event, Begin)
                yield event
    except HeldError:
        raise
    except (OutputError, MismatchError):
        # Before any work this says that the output was made with other settings; later it is the disk.
        if begun or not overwrite or config.overwrite:
            raise
    yield Note(text="made with other settings before: done anew")
    return (yield from _step(stage, replace(config, overwrite=True), overwrite=False))


def evaluate_and_report(config: EvaluateConfig) -> Iterator[Event]:
    """`evaluate`, and the report made of what it measured, while `evaluate` still holds the folder."""
    events = evaluate(config)
    with closing_events(events):
        for event in events:
            if isinstance(event, Result) and ranks.rank() == 0:
                write_report(local_path(config.out))
            yield event
