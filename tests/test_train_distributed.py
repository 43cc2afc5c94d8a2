"""train-rectifier on several ranks: the same batches, the same curve, and a killed worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from revq import LatentStore
from revq.errors import ConfigError
from revq.models.codebooks import load_codebooks
from revq.stages import ranks
from revq.stages.configs import TrainRectifierConfig
from revq.stages.events import run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.data import Inputs, open_inputs

SMALL = {"batch_size": 24, "width": 32, "depth": 1, "evaluations": 4, "decoder_steps": 4, "decoder_batch_size": 8, "precision": "fp32"}


def config(store: Path, codebooks: Path, out: Path, **changes: object) -> TrainRectifierConfig:
    return TrainRectifierConfig(**{"store": str(store), "codebooks": str(codebooks), "out": str(out), **SMALL, **changes})  # type: ignore[arg-type]


def arguments(store: Path, codebooks: Path, out: Path, **changes: object) -> list[str]:
    """The same as a command."""
    options = [item for name, value in {**SMALL, **changes}.items() for item in (f"--{name.replace('_', '-')}", str(value))]
    return ["train-rectifier", str(store), str(codebooks), str(out), *options]


def curve(run: Path) -> dict[str, list[float]]:
    table = pq.read_table(run / "metrics.parquet").to_pydict()
    evaluated = [row for row, loss in enumerate(table["val_loss"]) if loss is not None]
    return {name: [table[name][row] for row in evaluated] for name in ("step", "val_loss", "val_mse_rectified", "codebook_usage", "train_loss")}


def inputs_of(monkeypatch: pytest.MonkeyPatch, store: Path, codebooks: Path, rank: int, world_size: int) -> Inputs:
    monkeypatch.setattr(ranks, "rank", lambda: rank)
    monkeypatch.setattr(ranks, "world_size", lambda: world_size)
    return open_inputs(config(store, codebooks, Path("unused"), decoder_steps=0), LatentStore.open(store), load_codebooks(codebooks))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_hold_their_part_alone_and_together_take_the_batch_of_one_process(
    small_store: Path, small_codebooks: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    single = inputs_of(monkeypatch, small_store, small_codebooks, 0, 1)
    wanted = {(size, step): single.take(size, 5, step)[1] for size in (24, 12) for step in (0, 3, 11)}
    parts = {key: [] for key in wanted}
    held = []
    for rank in range(world_size):
        inputs = inputs_of(monkeypatch, small_store, small_codebooks, rank, world_size)
        held.append(inputs.train.rows)
        for (size, step), batches in parts.items():
            batches.append(inputs.take(size, 5, step)[1])
    assert torch.equal(torch.cat([torch.from_numpy(rows) for rows in held]), torch.from_numpy(single.train.rows))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for key, batch in wanted.items():
        assert torch.equal(torch.cat(parts[key]), batch)


def test_a_batch_that_the_ranks_do_not_divide_is_refused(small_store: Path, small_codebooks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="batch-size is that of all processes together and must be a multiple of their number 5, not 24; 20 is"):
        inputs_of(monkeypatch, small_store, small_codebooks, 0, 5)


def test_two_ranks_go_on_as_one_and_follow_the_curve_of_one_process(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    shared = {"schedule": "constant", "codebook_lr": 0.01}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "one", epochs=8, **shared)))
    torchrun(2, *arguments(small_store, small_codebooks, tmp_path / "two", epochs=4, **shared))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "two", epochs=8, **shared)))
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    common = sorted(set(ours["step"]) & set(theirs["step"]))
    assert common == [0, 10, 20, 30, 40, 41, 42, 43, 44]
    for step in common:
        assert values_at(ours, step) == pytest.approx(values_at(theirs, step), rel=2e-5)


def test_a_decoder_phase_in_parts_on_two_ranks_follows_the_curve_of_whole_batches_on_one(
    torchrun: Callable[..., subprocess.CompletedProcess[str]], small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    settings = {"steps": 2, "codebook_lr": 0.0, "evaluations": 3}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "one", **settings)))
    torchrun(2, *arguments(small_store, small_codebooks, tmp_path / "two", micro_batch=3, **settings))
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert ours["step"] == theirs["step"]
    for step in ours["step"]:
        assert values_at(ours, step) == pytest.approx(values_at(theirs, step), rel=2e-5)


def values_at(figures: dict[str, list[float]], step: int) -> list[float]:
    return [figures[name][figures["step"].index(step)] or 0.0 for name in ("val_loss", "val_mse_rectified", "codebook_usage")]


def workers_of(launcher: int) -> list[int]:
    """Process ids of torchrun's children that run revq."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent == launcher and b"train-rectifier" in command:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
def test_when_a_worker_is_killed_torchrun_starts_again_from_the_last_checkpoint(
    python: str, small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    settings = {"steps": 150, "evaluations": 30, "decoder_steps": 0}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    launcher += ["--local-addr", "127.0.0.1", "--max-restarts", "1", "--monitor-interval", "0.2", "-m", "revq"]
    command = [sys.executable, *launcher, *arguments(small_store, small_codebooks, tmp_path / "two", **settings)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHON_EXEC": python}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "two").glob("checkpoints/step-*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "resuming at step" in output
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "one", **settings)))
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    for name in ("step", "val_loss", "val_mse_rectified"):
        assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    for name in ("codebook_usage", "train_loss"):  # there are none before the first step
        assert ours[name][1:] == pytest.approx(theirs[name][1:], rel=2e-5), name
