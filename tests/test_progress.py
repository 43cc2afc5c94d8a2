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

from revq.pipeline.progress import show
from revq.pipeline.summaries import finish
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


class Clock:
    """Shows the time that it is set to, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(begin: Begin, *advances: tuple[float, Advance]) -> list[str]:
    """The lines of work whose advances come at these seconds after its begin."""
    clock, out = Clock(), io.StringIO()

    def events() -> Iterator[Event]:
        yield begin
        for clock.now, advance in advances:
            yield advance
        yield Result(value={})

    with redirect_stdout(out):
        show(events(), as_json=False, clock=clock)
    return out.getvalue().splitlines()


def test_resumed_work_says_what_was_done_before_and_its_rate_counts_only_this_run():
    lines = paced(Begin(task="t", total=100, unit="steps", done=50), (5.0, Advance(done=60)), (20.0, Advance(done=100)))
    assert lines == [
        "t: 100 steps, 50 done before",
        "t: 60/100 steps (60 %), 2.0 steps/s now, 0:05 elapsed, 0:20 left",
        "t: 100/100 steps (100 %), 2.5 steps/s, took 0:20",
    ]


def test_the_rate_follows_the_last_half_minute_and_that_of_finished_work_is_of_the_whole():
    slow = [(float(second), Advance(done=second)) for second in range(1, 101)]
    fast = [(float(second), Advance(done=100 + 10 * (second - 100))) for second in range(101, 161)]
    lines = paced(Begin(task="t", total=1600, unit="steps"), *slow, *fast, (400.0, Advance(done=1600)))
    assert "t: 100/1600 steps (6 %), 1.0 steps/s now, 1:40 elapsed, 25:00 left" in lines
    assert "t: 160/1600 steps (10 %), 2.8 steps/s now, 1:46 elapsed, 8:35 left" in lines
    assert "t: 640/1600 steps (40 %), 10.0 steps/s now, 2:34 elapsed, 1:36 left" in lines
    assert lines[-1] == "t: 1600/1600 steps (100 %), 4.0 steps/s, took 6:40"


def test_a_slow_unit_is_told_in_seconds_each_and_nothing_is_told_before_the_first():
    advances = [(20.0, Advance(done=0, values={"mse": 0.5})), (90.0, Advance(done=1)), (200.0, Advance(done=2))]
    assert paced(Begin(task="t", total=10, unit="codebooks"), *advances) == [
        "t: 10 codebooks",
        "t: 0/10 codebooks (0 %), 0:20 elapsed, ?:?? left, mse 0.5",
        "t: 1/10 codebooks (10 %), 90.0 s each now, 1:30 elapsed, 13:30 left, mse 0.5",
        "t: 2/10 codebooks (20 %), 110.0 s each now, 3:20 elapsed, 14:40 left, mse 0.5",
    ]


def test_a_long_run_says_less_often_how_far_it_is():
    lines = paced(Begin(task="t", total=100_000, unit="steps"), *((float(second), Advance(done=second)) for second in range(1, 7201)))
    assert 200 < len(lines) < 210  # not 721
    assert lines[-1].endswith("1:59:23 elapsed, 25:47:17 left")


def test_no_work_at_all_is_finished_work():
    assert paced(Begin(task="t", total=0, unit="images"), (1.0, Advance(done=0))) == ["t: 0 images"]
    program = TERMINAL_PROGRAM.replace("total=1281167", "total=0").replace("done=1000", "done=0")
    assert "100 % 0/0 images" in on_a_terminal(program, 80)


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


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_bar_on_a_terminal_has_rate_and_time_and_never_overflows(columns: int):
    text = on_a_terminal(TERMINAL_PROGRAM, columns)
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = re.split(r"[\r\n]+", plain)
    assert max(map(len, lines)) <= columns
    assert 0 < max(len(line) for line in lines if line.startswith("  ")) <= columns - 2, "the terminal's own ^C fits on the last line"
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
            r"original +– +– +0\.0000 +∞ +1\.0000",
            r"vae +– +– +0\.1000 +25\.91 +0\.8101",
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
    program = "from revq.pipeline.exit_codes import one_line_errors\nwith one_line_errors():\n    raise MemoryError"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "revq: error: out of memory; free some, or give a smaller --batch-size where there is one (what is finished is kept)\n"


def test_a_fault_of_revq_itself_keeps_its_traceback():
    program = "from revq.pipeline.exit_codes import one_line_errors\nwith one_line_errors():\n    raise KeyError('x')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
