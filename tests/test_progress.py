"""What is drawn: plain lines, the bar on a terminal, the table of an evaluation, and the rates behind them."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pexpect
import pytest

from revq.pipeline.progress import Meter, finish, show
from revq.stages.events import Advance, Begin, Event, Note, Result


def work(total: int = 20, *, done: int = 0) -> Iterator[Event]:
    yield Note(text="here we go")
    yield Begin(task="encode train", total=total, unit="images", done=done)
    for count in range(done + 1, total + 1):
        yield Advance(done=count, values={"psnr_db": 20 + count / 10})
    yield Note(text="one image is odd", warning=True)
    yield Result(value={"images": total})


def shown(events: Iterator[Event], *, as_json: bool = False) -> tuple[object, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        value = show(events, as_json=as_json)
    return value, out.getvalue(), err.getvalue()


def test_piped_progress_is_a_few_plain_lines_with_rate_and_time():
    value, out, err = shown(work(2000))
    assert value == {"images": 2000}
    assert err == ""
    lines = out.splitlines()
    assert lines[:2] == ["here we go", "encode train: 2000 images"]
    assert re.fullmatch(r"encode train: 2000/2000 images \(100 %\), \d+ images/s, took 0:00, psnr 220.00 dB", lines[-2])
    assert lines[-1] == "warning: one image is odd"
    assert len(lines) < 15
    assert all(character.isprintable() or character == "\n" for character in out)


def test_progress_goes_to_standard_error_when_json_is_asked():
    _, out, err = shown(work(), as_json=True)
    assert out == ""
    assert "encode train: 20/20 images" in err


def test_resumed_work_says_what_was_done_before_and_its_rate_counts_only_this_run():
    _, out, _ = shown(work(20, done=15))
    assert "encode train: 20 images, 15 done before" in out
    meter = Meter(Begin(task="t", total=100, unit="steps", done=50), now=0.0)
    meter.advance(Advance(done=60), now=5.0)
    assert meter.rate_per_s() == pytest.approx(2.0)
    assert meter.remaining_s() == pytest.approx(20.0)


def test_the_rate_follows_the_last_half_minute():
    meter = Meter(Begin(task="t", total=10_000, unit="steps"), now=0.0)
    for second in range(1, 101):
        meter.advance(Advance(done=second), now=float(second))
    for second in range(101, 161):
        meter.advance(Advance(done=100 + 10 * (second - 100)), now=float(second))
    assert meter.rate_per_s() == pytest.approx(10.0, rel=0.05)


def test_a_slow_unit_is_told_in_seconds_each_and_nothing_is_told_before_the_first():
    meter = Meter(Begin(task="t", total=10, unit="codebooks"), now=0.0)
    assert (meter.rate(), meter.remaining_s()) == ("", None)
    meter.advance(Advance(done=1), now=90.0)
    assert meter.rate() == "90.0 s each now"
    assert meter.remaining_s() == pytest.approx(810.0)


def test_no_work_at_all_is_finished_work():
    meter = Meter(Begin(task="t", total=0, unit="images"), now=0.0)
    assert (meter.percent, meter.rate_per_s()) == (100, None)


def test_control_characters_in_a_file_name_do_not_reach_the_terminal():
    def events() -> Iterator[Event]:
        yield Note(text="bad image a\x1b[31m\nb\udcff.jpg", warning=True)
        yield Result(value={})

    _, out, _ = shown(events())
    assert out == "warning: bad image a\\x1b[31m\\nb\\udcff.jpg\n"


def test_the_stage_is_closed_when_drawing_is_interrupted():
    closed = []

    def events() -> Iterator[Event]:
        try:
            yield Begin(task="t", total=1, unit="steps")
        finally:
            closed.append(True)

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with redirect_stdout(Full()), pytest.raises(KeyboardInterrupt):
        show(events(), as_json=False)
    assert closed == [True]


TERMINAL_PROGRAM = textwrap.dedent(
    """
    import time
    from revq.pipeline.progress import show
    from revq.stages.events import Advance, Begin, Note, Result

    def events():
        yield Note(text="a warning " + "that is long " * 12, warning=True)
        yield Begin(task="a task with a rather long name", total=1281167, unit="images", done=1000)
        for step in range(1, 9):
            yield Advance(done=160000 * step, values={"val_mse_quantized": 0.0123456, "val_mse_rectified": 0.01, "psnr_db": 23.4, "loss": 1e-5})
            time.sleep(0.1)
        yield Result(value={})

    show(events(), as_json=False)
    """
)


def on_a_terminal(program: str, columns: int, **environment: str) -> str:
    """What a program writes to a terminal of so many columns."""
    size = {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}
    child = pexpect.spawn(
        sys.executable, ["-c", program], dimensions=(24, columns), env={**os.environ, **size, **environment}, timeout=60, encoding="utf-8"
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return str(child.before)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_bar_on_a_terminal_has_rate_and_time_and_never_overflows(columns: int):
    text = on_a_terminal(TERMINAL_PROGRAM, columns)
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r\n", text)
    lines = [line.split("\r")[-1] for line in plain.split("\n")]
    assert max(map(len, lines)) <= columns
    assert "images/s" in plain
    assert "left" in plain
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor comes back"
    for figure in ("psnr 23.40 dB", "loss 1e-05"):  # none is cut off: what does not fit goes to another line
        assert figure in plain


def test_a_terminal_that_cannot_draw_gets_plain_lines():
    text = on_a_terminal(TERMINAL_PROGRAM, 80, TERM="dumb")
    assert "\x1b" not in text
    assert "a task with a rather long name: 1281167 images, 1000 done before" in text


@dataclass(frozen=True)
class Summary:
    name: str
    command: str
    value: dict[str, object]
    expected: list[str]


EVALUATION = {
    "images": 100,
    "rows": {
        "original": {"rfid": None, "psnr_db": None, "ssim": 1.0, "lpips_alex": 0.0},
        "vae": {"rfid": None, "psnr_db": 25.912, "ssim": 0.8101, "lpips_alex": 0.1},
        "quantized": {"rfid": None, "psnr_db": 22.1, "ssim": 0.7, "lpips_alex": 0.2},
        "rectified": {"rfid": None, "psnr_db": 22.6, "ssim": 0.71, "lpips_alex": 0.2},
    },
    "tokens_per_image": 512,
    "bits_per_image": 4608.0,
    "notes": {"rfid": "the Inception weights are not here", "psnr_db": "original: infinite", "failed": [{"key": "a"}]},
    "report": "runs/evaluation/report.html",
}
SUMMARIES = [
    Summary(
        "evaluation",
        "evaluate",
        EVALUATION,
        [
            r"original +n/a +∞ +1\.000 +0\.000",
            r"vae +n/a +25\.91 +0\.810 +0\.100",
            r"rfid: the Inception weights are not here",
            r"100 images, 512 tokens and 4608 bits per image",
            r"report: runs/evaluation/report\.html",
        ],
    ),
    Summary(
        "encode",
        "encode-latents",
        {"store": "a.zarr", "split": "train", "latent_shape": [32, 8, 8], "bytes": 1_500_000},
        [r"  latent shape +\(32,8,8\)", r"  bytes +1\.5 MB", r"next: revq fit-codebooks a\.zarr CODEBOOKS"],
    ),
    Summary("dry run", "encode-latents", {"store": "a.zarr", "split": "train", "dry_run": True}, [r"  dry run +yes"]),
    Summary(
        "fit",
        "fit-codebooks",
        {"out": "cb", "usage": {"min": 1.0, "median": 1.0}},
        [r"  usage +min 1, median 1", r"next: revq train-rectifier STORE cb RUN"],
    ),
]


@pytest.mark.parametrize("case", SUMMARIES, ids=lambda case: case.name)
def test_a_result_is_summed_up_in_lines_for_people(case: Summary):
    out = io.StringIO()
    with redirect_stdout(out):
        finish(case.command, case.value, as_json=False)
    for pattern in case.expected:
        assert re.search(f"^{pattern}$", out.getvalue(), re.MULTILINE), out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_json_has_no_infinity():
    out = io.StringIO()
    with redirect_stdout(out):
        finish("evaluate", {"psnr_db": float("inf"), "rows": [1.5, float("nan")]}, as_json=True)
    assert json.loads(out.getvalue(), parse_constant=pytest.fail) == {"psnr_db": None, "rows": [1.5, None]}


def test_out_of_memory_is_one_line_that_names_the_batch_size():
    program = "from revq.pipeline.progress import one_line_errors\nwith one_line_errors():\n    raise MemoryError"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "revq: error: out of memory; free some, or give a smaller --batch-size where there is one (what is finished is kept)\n"


def test_a_fault_of_revq_itself_keeps_its_traceback():
    program = "from revq.pipeline.progress import one_line_errors\nwith one_line_errors():\n    raise KeyError('x')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
