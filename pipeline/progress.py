"""Everything that is drawn: progress while a stage works, and what it made when it is done. Besides `cli` only this file prints.

On a terminal a bar of two or three lines; into a pipe plain lines without control characters; with `as_json` the plain lines go to
standard error, so that standard output holds exactly one JSON object.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..errors import RevqError
from ..files import disk_errors
from ..stages.events import Advance, Begin, Event, Note, Result, closing_events
from .distributed import world

RATE_WINDOW_S = 30.0
LINE_EVERY_S = 10.0
LINE_AT_LEAST_S = 1.0
_METRICS = {"rfid": ("rFID", 2), "psnr_db": ("PSNR dB", 2), "ssim": ("SSIM", 3), "lpips_alex": ("LPIPS", 3)}
_REFRESH_PER_S = 5
_FLAGS = {"already_complete", "dry_run"}


def show(events: Iterable[Event], *, as_json: bool, silent: bool = False) -> Mapping[str, Any]:
    """Run a stage to its end while drawing what it says; returns the value of its `Result`. `silent`: draw nothing (every rank but the first)."""
    stream = sys.stderr if as_json else sys.stdout
    console = Console(file=stream, highlight=False)
    on_terminal = stream.isatty() and console.is_terminal and not console.is_dumb_terminal
    value: Mapping[str, Any] = {}
    bars = on_terminal and not as_json and not silent
    with closing_events(events), _Bars(console) if bars else _Lines(stream) as view:
        for event in events:
            if silent and not isinstance(event, Result):
                continue
            if isinstance(event, Begin):
                view.begin(event)
            elif isinstance(event, Advance):
                view.advance(event)
            elif isinstance(event, Note):
                view.note(event)
            elif isinstance(event, Result):
                value = event.value
    return value


class Meter:
    """How far one piece of work is, and how fast it goes: the rate is that of the last half minute."""

    def __init__(self, begin: Begin, now: float) -> None:
        self.begin = begin
        self.started = now
        self.done = begin.done
        self.values: Mapping[str, float] = {}
        self._samples: deque[tuple[float, int]] = deque([(now, begin.done)])

    def advance(self, event: Advance, now: float) -> None:
        """Take in how far the work has come at the time `now`, in seconds."""
        self.done = event.done
        self.values = {**self.values, **event.values}
        self._samples.append((now, event.done))
        while len(self._samples) > 2 and now - self._samples[1][0] > RATE_WINDOW_S:
            self._samples.popleft()

    @property
    def finished(self) -> bool:
        return self.done >= self.begin.total

    @property
    def percent(self) -> int:
        return 100 if self.finished else int(100 * self.done / self.begin.total)

    def rate_per_s(self) -> float | None:
        """Units per second; None before anything is done. Of the whole work once it is finished."""
        first, last = self._samples[0], self._samples[-1]
        if self.finished:
            first = (self.started, self.begin.done)
        seconds, units = last[0] - first[0], last[1] - first[1]
        return units / seconds if seconds > 0 and units > 0 else None

    def remaining_s(self) -> float | None:
        """Seconds to the end at the present rate; None while that is unknown."""
        rate = self.rate_per_s()
        return (self.begin.total - self.done) / rate if rate else None

    def counts(self) -> str:
        return f"{self.done}/{self.begin.total} {self.begin.unit}"

    def rate(self) -> str:
        rate = self.rate_per_s()
        if rate is None:
            return ""
        pace = f"{rate:.{0 if rate >= 100 else 1}f} {self.begin.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
        return pace if self.finished else f"{pace} now"

    def figures(self) -> list[str]:
        return [_figure(name, value) for name, value in self.values.items()]


class _Lines:
    """Plain lines: one at the start, one each 10 % or 10 s (less often in a long run), one at the end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.meter: Meter | None = None
        self.last_line = 0.0
        self.last_tenth = 0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def begin(self, event: Begin) -> None:
        now = time.monotonic()
        self.meter, self.last_line = Meter(event, now), now
        self.last_tenth = self.meter.percent // 10
        self._print(f"{event.task}: {event.total} {event.unit}" + (f", {event.done} done before" if event.done else ""))

    def advance(self, event: Advance) -> None:
        if self.meter is None:
            return
        meter, now = self.meter, time.monotonic()
        if meter.finished:
            return
        meter.advance(event, now)
        waited = now - self.last_line
        tenth_is_due = meter.percent // 10 > self.last_tenth and waited >= LINE_AT_LEAST_S
        time_is_due = waited >= max(LINE_EVERY_S, (now - meter.started) / 60)
        if meter.finished or tenth_is_due or time_is_due:
            self.last_line, self.last_tenth = now, meter.percent // 10
            self._print(self._line(meter, now))

    def note(self, event: Note) -> None:
        self._print(("warning: " if event.warning else "") + event.text)

    def _line(self, meter: Meter, now: float) -> str:
        remaining = meter.remaining_s()
        pace = f"took {_clock(now - meter.started)}" if meter.finished else f"ETA {_clock(remaining)}"
        parts = [f"{meter.counts()} ({meter.percent} %)", meter.rate(), pace, *meter.figures()]
        return f"{meter.begin.task}: " + ", ".join(part for part in parts if part)

    def _print(self, text: str) -> None:
        print(_printable(text), file=self.stream, flush=True)


class _Bars:
    """A bar that is redrawn in place; a finished one stays on the screen above the next."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live: Live | None = None
        self.meter: Meter | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def begin(self, event: Begin) -> None:
        self._stop()
        self.meter = Meter(event, time.monotonic())
        self.live = Live(_Frame(self.meter), console=self.console, refresh_per_second=_REFRESH_PER_S)
        self.live.start(refresh=True)

    def advance(self, event: Advance) -> None:
        if self.meter is None:
            return
        self.meter.advance(event, time.monotonic())
        if self.meter.finished:
            self._stop()

    def note(self, event: Note) -> None:
        text = Text(_printable(("warning: " if event.warning else "") + event.text), style="yellow" if event.warning else "")
        self.console.print(text)

    def _stop(self) -> None:
        live, self.live, self.meter = self.live, None, None
        if live is not None:
            live.stop()


def _packed(parts: list[str], width: int) -> list[str]:
    """Lines of at most `width` columns, as full as they get, each begun by two spaces; no part is cut in two."""
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return lines


class _Frame:
    """One picture of a meter, at most as wide as the console: bar and counts; rate, times, figures."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        meter, now = self.meter, time.monotonic()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True, overflow="ellipsis")
        bar.add_column(ratio=1, min_width=8)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_column(no_wrap=True, overflow="ellipsis")
        counts = Text(meter.counts())
        bar.add_row(
            Text(_printable(meter.begin.task)), ProgressBar(total=max(meter.begin.total, 1), completed=meter.done), f"{meter.percent} %", counts
        )
        elapsed = (
            f"took {_clock(now - meter.started)}" if meter.finished else f"{_clock(now - meter.started)} elapsed, {_clock(meter.remaining_s())} left"
        )
        pace = "  ".join(part for part in (meter.rate(), elapsed) if part)
        lines = _packed([pace, *meter.figures()], options.max_width)
        yield Group(bar, *(Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines))


def finish(command: str, value: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command made: one JSON object, or a few lines for people that end with what to do next."""
    if as_json:
        print(json.dumps(_finite(value)), flush=True)
        return
    summary = {"evaluate": _evaluation, "run": _evaluation, "info": _description, "compare": _comparison}.get(command, _made)
    lines = [*summary(value), *_next(command, value)]
    console = Console(highlight=False)
    for line in lines:
        if sys.stdout.isatty():
            console.print(Text(_printable(line)))  # wrapped between words
        else:
            print(_printable(line))
    sys.stdout.flush()


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on standard error and an exit code; REVQ_DEBUG=1 shows the traceback instead.

    Exit codes: 1 an error, 130 interrupted by Ctrl-C and 143 by SIGTERM (both to be resumed), 141 when the reader of a pipe went away.
    """
    main_pid = os.getpid()

    def terminate(signal_number: int, frame: FrameType | None) -> NoReturn:
        if os.getpid() != main_pid:
            os._exit(128 + signal_number)
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        with disk_errors("the output"):
            yield
    except BrokenPipeError:
        # Python would complain again when it flushes standard output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except KeyboardInterrupt as stop:
        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        raise SystemExit(143 if isinstance(stop, _Terminated) else 130) from None
    except Exception as error:
        line = _one_line(error)
        if line is None or os.environ.get("REVQ_DEBUG"):
            raise
        rank, size = world()
        print(_printable(f"revq: error{f' on rank {rank}' if size > 1 else ''}: {line}"), file=sys.stderr)
        raise SystemExit(1) from None


def _one_line(error: Exception) -> str | None:
    """The error as one line for people; None for a fault of revq's own, which needs its traceback."""
    if isinstance(error, RevqError):
        return " ".join(str(error).split())
    if world()[1] > 1 and isinstance(error, RuntimeError) and "Connection" in str(error) and "peer" in str(error):
        return "another rank stopped, so this one cannot go on; what it finished is kept, and the first error above says why"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; free some, or give a smaller --batch-size where there is one (what is finished is kept)"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the system'}: {error.strerror} ({errno.errorcode.get(error.errno, error.errno)})"
    return None


def _made(value: Mapping[str, Any]) -> list[str]:
    """Name and value of everything that a stage reports."""
    empty = [name for name, item in value.items() if item is None or item == {} or (item is False and name in _FLAGS)]
    pairs = {_words(name): _told(name, item) for name, item in value.items() if name not in empty}
    width = max(map(len, pairs), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in pairs.items()]


def _next(command: str, value: Mapping[str, Any]) -> list[str]:
    """The command that comes after this one."""
    store, out = value.get("store", "STORE"), value.get("out", "OUT")
    following = {
        "encode-latents": f"revq fit-codebooks {store} CODEBOOKS",
        "fit-codebooks": f"revq train-rectifier {store} {out} RUN",
        "train-rectifier": f"revq evaluate {out} IMAGES EVALUATION",
    }
    if command == "encode-latents" and (value.get("dry_run") or value.get("split") != "train"):
        return []
    return [f"next: {following[command]}"] if command in following else []


def _evaluation(value: Mapping[str, Any]) -> list[str]:
    """The table of rows, why a figure is missing, tokens and bits, and where the report lies."""
    width = 10
    titles = {name: title for name, (title, _) in _METRICS.items()} | {"rfid": value.get("rfid_label", "rFID")}
    lines = [" " * 11 + "".join(f"{title:>{width}}" for title in titles.values())]
    for row, metrics in value["rows"].items():
        lines.append(f"{row:<11}" + "".join(f"{_metric(row, name, metrics.get(name)):>{width}}" for name in _METRICS))
    lines.append("")
    # That PSNR of equal images is infinite stands in the table; what is no text, such as a list of files, is for metrics.json.
    lines += [f"{name}: {reason}" for name, reason in value.get("notes", {}).items() if isinstance(reason, str) and name != "psnr_db"]
    tokens, bits = value.get("tokens_per_image"), value.get("bits_per_image")
    lines.append(f"{value.get('images')} images, {tokens} tokens and {bits:g} bits per image" if tokens and bits else f"{value.get('images')} images")
    return [*lines, f"report: {value.get('report')}"]


def _comparison(value: Mapping[str, Any]) -> list[str]:
    """The table of `revq compare`, names to the left and numbers to the right."""
    table = value["table"]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in table]
    return [*lines, *([f"report: {value['report']}"] if "report" in value else [])]


def _metric(row: str, name: str, value: float | None) -> str:
    if row == "original" and name == "psnr_db" and (value is None or math.isinf(value)):
        return "∞"
    return "n/a" if value is None else f"{value:.{_METRICS[name][1]}f}"


def _description(value: Mapping[str, Any]) -> list[str]:
    """What `revq info` found: pairs, and an indented block for each part."""
    plain = {name: item for name, item in value.items() if not isinstance(item, Mapping)}
    lines = [f"{value.get('path')}: {value.get('kind')}", *_made({name: item for name, item in plain.items() if name not in {"path", "kind"}})]
    for name, part in value.items():
        if name == "rows":
            lines += ["", *_evaluation(value)]
        elif name == "splits":
            lines += ["", *_splits(part)]
        elif isinstance(part, Mapping):
            lines += ["", f"{_words(name)}:", *_made(part)]
    return lines


def _splits(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of a store's splits, then why images failed."""
    names = ("images", "views", "rows", "failed", "bytes", "compression", "state")
    cells = [["split", *names]]
    for name, split in splits.items():
        cells.append([name, *("-" if split[column] is None else _told(column, split[column]) for column in names)])
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in cells
    ]
    for name, split in splits.items():
        lines += ["", f"  source of {name}: {split['source']}, seed {split['seed']}"]
        lines += [f"  failed in {name}: {count} x {reason}" for reason, count in split["failures"].items()]
    return lines if splits else ["  no split yet"]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _told(name: str, value: Any) -> str:
    """One value in a line, with the unit that its name carries."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)} {_told(key, item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "(" + ",".join(_told(name, item) for item in value) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes"):
        return _bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(name: str, value: float) -> str:
    if name.endswith("_db"):
        return f"{_words(name[:-3])} {value:.2f} dB"
    return f"{_words(name)} {value:.4g}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _clock(seconds: float | None) -> str:
    """h:mm:ss; ?:?? while unknown."""
    if seconds is None:
        return "?:??"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _printable(text: str) -> str:
    """`text` with control characters spelled out: a file's name must not drive the terminal, and a line stays one line."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _finite(value: Any) -> Any:
    """`value` with None for what JSON has no word for: infinity and not-a-number."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
