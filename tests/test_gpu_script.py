"""The script of `make gpu` is rehearsed at small sizes, so that its first run on a GPU does not end in a slip."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(tmp_path: Path, *options: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--small", "--out", str(out), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads(out.read_text())["parts"] if out.exists() else {}


@pytest.mark.parametrize("part", ["tests", "search", "determinism", "precision", "memory", "faiss", "assignment", "step", "fit", "dcae", "profiles"])
def test_each_part_runs_to_its_end_on_a_processor(part: str, tmp_path: Path) -> None:
    done, parts = run(tmp_path, "--part", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert parts[part]["ended"] == "done"
    rows = dict(parts[part]["rows"])
    assert rows
    assert part != "tests" or "skipped" in rows["tests that need a GPU"] or "passed" in rows["tests that need a GPU"]
    assert all(title in done.stdout for title in rows)


def test_a_part_that_takes_too_long_is_stopped_and_what_has_no_time_left_is_left_out(tmp_path: Path) -> None:
    started = time.monotonic()
    done, parts = run(tmp_path, "--part", "step", "--part", "search", "--budget-s", 5.5)
    assert time.monotonic() - started < 60
    assert parts["step"]["ended"].startswith("stopped after ")
    assert parts["search"]["ended"] == "left out: no time"
    assert done.returncode == 1
    assert "not whole: step, search" in done.stdout
