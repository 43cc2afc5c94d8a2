"""One writer for every folder that a command makes: the second is refused before it changes a byte, readers are told, and whoever is killed
holds nothing. The first writer is a real process at its real work, frozen by SIGSTOP while the test looks at what it left so far."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import flat_folder
from test_lock import another_holding

from revq.cache.batches import ResidentLatents, StreamingLatents
from revq.cache.store import LatentStore
from revq.errors import HeldError, RevqError, StoreError
from revq.files import LOCK_NAME
from revq.lock import hold_folder
from revq.models.codebooks import load_codebooks
from revq.models.tokenizer import ReVQTokenizer
from revq.pipeline.compare import compare
from revq.pipeline.config import load_plan
from revq.pipeline.info import info
from revq.pipeline.run import evaluate_and_report, run
from revq.stages.configs import EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig
from revq.stages.evaluate import evaluate
from revq.stages.events import Begin, Event, Note, closing_events, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier

Cli = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.usefixtures("empty_torch_home")
PLAN = """
out = "{out}"
[encode-latents]
train = "{images}/train"
val = "{images}/val"
vae = "{vae}"
image_size = 64
limit = {limit}
shard_rows = 4
batch_size = 4
[fit-codebooks]
transform = "standardize"
codes = 8
iterations = 2
[train-rectifier]
steps = 20
batch_size = 8
width = 32
depth = 1
[evaluate]
limit = 8
tolerance_images = 8
download = false
"""


@dataclass(frozen=True)
class Command:
    """A command at its work in `out`, and the same as events."""

    words: list[str]
    out: Path
    begun: str
    """What appears in `out` when it is in the middle of it."""
    events: Callable[[], Iterator[Event]]
    read: Callable[[], object]
    """Something that needs the finished folder."""


@pytest.fixture
def commands(
    small_store: Path, small_codebooks: Path, tokenizer_folder: Path, imagenet_sample: Path, taef2: str, tmp_path: Path
) -> Callable[[str], Command]:
    """Each of the four, with much to do."""
    store, codebooks, out = str(small_store), str(small_codebooks), tmp_path / "out"

    def make(name: str) -> Command:
        if name == "fit-codebooks":
            words = [store, str(out), "--tokens", "512", "--codes", "32", "--transform", "standardize", "--iterations", "100000"]
            fit = FitCodebooksConfig(store=store, out=str(out), tokens=512, codes=32, transform="standardize", iterations=100_000)
            return Command([name, *words], out, "partial", lambda: fit_codebooks(fit), lambda: load_codebooks(out))
        if name == "train-rectifier":
            words = [store, codebooks, str(out), "--steps", "100000", "--batch-size", "16", "--width", "32", "--depth", "1", "--evaluations", "2"]
            small: dict[str, Any] = {"steps": 100_000, "batch_size": 16, "width": 32, "depth": 1, "evaluations": 2}
            train = TrainRectifierConfig(store=store, codebooks=codebooks, out=str(out), **small)
            return Command(
                [name, *words], out, "checkpoints", lambda: train_rectifier(train), lambda: ReVQTokenizer.from_pretrained(out / "tokenizer")
            )
        if name == "evaluate":
            images = flat_folder(tmp_path / "images", imagenet_sample, 60)
            words = [str(tokenizer_folder), str(images), str(out), "--no-download", "--batch-size", "1", "--cache", "off", "--device", "cpu"]
            config = EvaluateConfig(
                tokenizer=str(tokenizer_folder), images=str(images), out=str(out), download=False, batch_size=1, cache="off", device="cpu"
            )
            both = [str(out), str(tmp_path / "images")]
            return Command([name, *words], out, "config.json", lambda: evaluate_and_report(config), lambda: run_quietly(compare(both)))
        (tmp_path / "plan.toml").write_text(PLAN.format(out=out, images=imagenet_sample, vae=taef2, limit=100))
        plan = load_plan(str(tmp_path / "plan.toml"))
        return Command(
            ["run", str(tmp_path / "plan.toml")], out, "latents.zarr", lambda: run(plan), lambda: run_quietly(compare([str(out), "other"]))
        )

    return make


@contextmanager
def at_work(command: Command) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a command, frozen."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "revq", *command.words], text=True, **quiet) as process:
        deadline = time.monotonic() + 200
        while not (command.out / command.begun).exists():
            assert process.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        try:
            yield process
        finally:
            process.kill()


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def goes_on(events: Iterator[Event]) -> bool:
    """Whether a stage gets as far as to begin some work, where it is ended."""
    with closing_events(events):
        return any(isinstance(event, Begin) for event in events)


@pytest.mark.parametrize("name", ["fit-codebooks", "train-rectifier", "evaluate", "run"])
def test_a_second_process_is_refused_a_reader_is_told_and_who_was_killed_holds_nothing(
    commands: Callable[[str], Command], revq_cli: Cli, name: str
) -> None:
    command = commands(name)
    with at_work(command) as first:
        who = f"is being written by another process: process {first.pid} of "
        before = digests(command.out)
        refused = revq_cli(*command.words, "--overwrite", check=1)
        assert refused.stdout == ""
        assert refused.stderr.count("\n") == 1
        assert f"revq: error: {command.out} {who}" in refused.stderr
        assert f"({name}); wait until it is done, or stop it first" in refused.stderr
        assert digests(command.out) == before
        notes = [event.text for event in info(str(command.out)) if isinstance(event, Note)]
        assert [who in text for text in notes] == [True]
        assert str(first.pid) in run_quietly(info(str(command.out)))["being_written_by"]
        with pytest.raises(RevqError, match=who):
            command.read()
        if name == "run":
            with pytest.raises(HeldError, match=who):
                run_quietly(train_rectifier(TrainRectifierConfig(store="s", codebooks="c", out=str(command.out / "rectifier"))))
    assert (command.out / LOCK_NAME).exists()
    assert goes_on(command.events())
    assert not (command.out / LOCK_NAME).exists()


def test_of_three_that_train_in_one_folder_at_once_one_does_and_two_are_told(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    words = ["train-rectifier", small_store, small_codebooks, tmp_path / "out", "--steps", 300, "--batch-size", 16, "--width", 32, "--depth", 1]
    command = [sys.executable, "-m", "revq", *map(str, words)]
    three = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.pid: process.communicate(timeout=200)[1] for process in three}
    codes = {process.pid: process.returncode for process in three}
    assert sorted(codes.values()) == [0, 1, 1], said
    winner = next(pid for pid, code in codes.items() if code == 0)
    assert all(f"process {winner} of " in said[pid] for pid, code in codes.items() if code == 1)
    assert not list((tmp_path / "out").rglob(LOCK_NAME))


def test_a_run_is_described_at_every_moment_of_its_making(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "plan.toml").write_text(PLAN.format(out=out, images=imagenet_sample, vae=taef2, limit=16))
    said = set()
    with subprocess.Popen([sys.executable, "-m", "revq", "run", str(tmp_path / "plan.toml")], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for part in ("", "latents.zarr", "codebooks", "rectifier", "rectifier/tokenizer", "evaluation"):
                if (out / part).exists():
                    value = run_quietly(info(str(out / part)))
                    said |= {part} if str(process.pid) in str(value.get("being_written_by")) else set()
            time.sleep(0.01)
    assert process.returncode == 0
    assert said >= {"", "latents.zarr", "codebooks", "rectifier", "evaluation"}
    assert "being_written_by" not in run_quietly(info(str(out)))
    assert not list(out.rglob(LOCK_NAME))


def test_the_ranks_of_one_torchrun_are_refused_together(torchrun: Cli, small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    words = ["train-rectifier", small_store, small_codebooks, tmp_path / "out", "--steps", 2, "--batch-size", 16, "--width", 32, "--depth", 1]
    with hold_folder(tmp_path / "out", "a test"):
        done = torchrun(2, *words, check=1, timeout=200)
    errors = [line for line in done.stderr.splitlines() if line.startswith("revq: error")]
    assert f"out is being written by another process: process {os.getpid()} of " in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_do_anew_what_another_process_is_writing(imagenet_sample: Path, taef2: str, tmp_path: Path, revq_cli: Cli) -> None:
    out = tmp_path / "out"
    (tmp_path / "plan.toml").write_text(PLAN.format(out=out, images=imagenet_sample, vae=taef2, limit=16))
    with hold_folder(out / "codebooks", "by hand"):
        done = revq_cli("run", tmp_path / "plan.toml", "--overwrite", check=1)
    assert "codebooks is being written by another process" in done.stderr
    assert "(by hand)" in done.stderr
    assert not (out / "latents.zarr").exists()  # refused at once, not when its turn comes


def test_an_evaluation_of_a_run_that_is_being_trained_on_says_so(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = flat_folder(tmp_path / "images", imagenet_sample, 2)
    with another_holding(small_run) as process:
        config = EvaluateConfig(tokenizer=str(small_run), images=str(images), out=str(tmp_path / "out"), download=False, tolerance=False)
        notes = [event.text for event in evaluate(config) if isinstance(event, Note)]
    assert any(f"being written by another process: process {process.pid} " in text and "reads what is there now" in text for text in notes)


def test_whoever_reads_a_store_while_it_is_replaced_is_told_that_it_is_being_written(small_store: Path, tmp_path: Path) -> None:
    shutil.copytree(small_store, tmp_path / "s")
    split = LatentStore.open(tmp_path / "s")["train"]
    stream = StreamingLatents(split)
    shutil.rmtree(tmp_path / "s" / "train")
    readings: list[Callable[[], object]] = [split.manifest, lambda: ResidentLatents(split), lambda: list(stream.sequential(8))]
    with another_holding(tmp_path / "s") as process:
        (tmp_path / "s" / "manifest" / "train.parquet").unlink()
        for read in readings:
            with pytest.raises(StoreError, match=f"s is being written by another process: process {process.pid} "):
                read()
        with pytest.raises(StoreError, match=f"{process.pid} .*has no split"):
            LatentStore.open(tmp_path / "s")["train"]


@pytest.mark.parametrize("end", ["closed", "interrupted", "failed"])
def test_however_a_stage_ends_its_folder_is_free_again(small_store: Path, tmp_path: Path, end: str) -> None:
    def stage() -> Iterator[Event]:
        store = str(small_store) if end != "failed" else "nowhere"
        return fit_codebooks(FitCodebooksConfig(store=store, out=str(tmp_path / "out"), tokens=512, codes=32, transform="standardize"))

    events = stage()
    with contextlib.suppress(RevqError, KeyboardInterrupt):
        next(events)
        events.close() if end == "closed" else events.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    with hold_folder(tmp_path / "out", "next"):
        pass
