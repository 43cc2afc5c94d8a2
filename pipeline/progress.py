"""What is drawn while a stage works: a bar of two or three lines on a terminal, plain lines without control characters in a pipe.

With `as_json` the lines go to standard error, so that standard output holds exactly one JSON object.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from itertools import starmap
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from ..stages.events import Advance, Begin, Event, Note, Result, closing_events
from .terminal_text import printable, words

_RATE_WINDOW_S = 30.0
_LINE_EVERY_S = 10.0
_LINE_AT_LEAST_S = 1.0
_UNBROKEN = "\xa0"  # a space that lines are not wrapped at


def show(events: Iterable[Event], *, as_json: bool, silent: bool = False, clock: Callable[[], float] = time.monotonic) -> Mapping[str, Any]:
    """Run a stage to its end while drawing what it says; returns the value of its `Result`.

    Args:
        silent: draw nothing (every rank but the first).
        clock: what time it is, in seconds.
    """
    stream = sys.stderr if as_json else sys.stdout
    console = Console(file=stream, highlight=False, get_time=clock)
    on_terminal = not as_json and stream.isatty() and console.is_terminal and not console.is_dumb_terminal
    work: _Bar | None = None
    value: Mapping[str, Any] = {}
    with _foreign_output_aside() if as_json else nullcontext(), closing_events(events), ExitStack() as drawn:
        for event in events:
            if isinstance(event, Result):
                value = event.value
            elif silent:
                continue
            elif isinstance(event, Note):
                _print_note(event, console, on_terminal)
            elif isinstance(event, Begin):
                drawn.close()  # the bar before it stays as it is
                work = drawn.enter_context(_Bar(event, console) if on_terminal else _Lines(event, console))
            elif work and not work.task.finished:
                work.take(event)
    return value


@contextmanager
def _foreign_output_aside() -> Iterator[None]:
    """What others print meanwhile (a VAE plug-in, a program that it starts) goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _print_note(note: Note, console: Console, on_terminal: bool) -> None:
    text = printable(("warning: " if note.warning else "") + note.text)
    if on_terminal:
        console.print(Text(text, style="yellow" if note.warning else ""))  # above the bar, wrapped between words
    else:
        print(text, file=console.file, flush=True)


class _Cell(ProgressColumn):
    """A column of a bar that holds a text about its task."""

    def __init__(self, tell: Callable[[Task], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis", justify="right"))
        self.tell = tell

    def render(self, task: Task) -> Text:
        return Text(self.tell(task))


class _Bar(Progress):
    """One piece of work, redrawn in place; when it is finished it stays on the screen above the next.

    The rate is that of the last half minute, or since the last unit but one where a unit takes longer; once all is done, that of the whole.
    """

    def __init__(self, begin: Begin, console: Console, *, drawn: bool = True) -> None:
        bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8))
        cells = (_Cell(lambda task: task.description), bar, _Cell(lambda task: f"{_percent(task)} %"), _Cell(_counts))
        super().__init__(*cells, console=console, refresh_per_second=5, speed_estimate_period=_RATE_WINDOW_S, expand=True, disable=not drawn)
        number = self.add_task(printable(begin.task), total=begin.total, completed=begin.done, unit=begin.unit, begun=begin.done, figures={})
        self.advance(number, 0)  # from here the rate counts; and no work at all is finished work
        self.task = self.tasks[number]
        self._moved = self.get_time()

    def take(self, event: Advance) -> None:
        """Show how far the work has come."""
        now = self.get_time()
        self.speed_estimate_period = max(_RATE_WINDOW_S, now - self._moved + 1)
        if event.done > self.task.completed:
            self._moved = now
        self.update(self.task.id, completed=event.done, figures={**self.task.fields["figures"], **event.values})
        if self.task.finished:
            self.stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            told = "  ".join(part.replace(" ", _UNBROKEN) for part in _told(task))
            # Two columns stay free: there the terminal writes its ^C, and a line more would leave a stale one above.
            lines = textwrap.wrap(
                told, max(self.console.width - 2, 1), initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
            yield Text("\n".join(lines).replace(_UNBROKEN, " "), style="dim", no_wrap=True, overflow="ellipsis")


class _Lines(_Bar):
    """The same as plain lines: one at the start, one each 10 % or 10 s (less often in a long run), one at the end."""

    def __init__(self, begin: Begin, console: Console) -> None:
        super().__init__(begin, console, drawn=False)
        self.last_line, self.last_tenth = self.get_time(), _percent(self.task) // 10

    def start(self) -> None:
        task, before = self.task, self.task.fields["begun"]
        self._print(f"{task.total} {task.fields['unit']}" + (f", {before} done before" if before else ""))

    def take(self, event: Advance) -> None:
        super().take(event)
        tenth, now = _percent(self.task) // 10, self.get_time()
        waited, elapsed = now - self.last_line, self.task.elapsed or 0.0
        tenth_is_due = tenth > self.last_tenth and waited >= _LINE_AT_LEAST_S
        if self.task.finished or tenth_is_due or waited >= max(_LINE_EVERY_S, elapsed / 60):
            self.last_line, self.last_tenth = now, tenth
            self._print(", ".join([f"{_counts(self.task)} ({_percent(self.task)} %)", *_told(self.task)]))

    def _print(self, text: str) -> None:
        print(f"{self.task.description}: {text}", file=self.console.file, flush=True)


def _counts(task: Task) -> str:
    return f"{task.completed}/{task.total} {task.fields['unit']}"


def _percent(task: Task) -> int:
    return 100 if task.finished else int(100 * task.completed / (task.total or 1))


def _rate(task: Task) -> str:
    """Units per second, or seconds per unit; empty before anything is done."""
    rate = task.speed
    if task.finished_time is not None:
        rate = (task.completed - task.fields["begun"]) / task.finished_time if task.finished_time else None
    if not rate:
        return ""
    pace = f"{rate:.{0 if rate >= 100 else 1}f} {task.fields['unit']}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return pace if task.finished else f"{pace} now"


def _told(task: Task) -> list[str]:
    """Rate, times and the stage's figures."""
    times = f"took {_clock(task.finished_time)}" if task.finished else f"{_clock(task.elapsed)} elapsed, {_clock(task.time_remaining)} left"
    return [part for part in (_rate(task), times, *starmap(_figure, task.fields["figures"].items())) if part]


def _figure(name: str, value: float) -> str:
    if name.endswith("_db"):
        return f"{words(name[:-3])} {value:.2f} dB"
    return f"{words(name)} {value:.4g}"


def _clock(seconds: float | None) -> str:
    """h:mm:ss; ?:?? while unknown."""
    if seconds is None:
        return "?:??"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
