"""What a user of train-rectifier watches: losses of the last steps, speed, usage of the codebooks, decoded pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from training_runs import config, metrics_of, prepared, stop_at, weights

from revq import LatentStore, ReVQTokenizer
from revq.models.quantizer import code_counts, dead_codes, perplexity, usage
from revq.stages import train_rectifier as stage
from revq.stages.events import Advance, Begin, Event, run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training import live_figures
from revq.stages.training.live_figures import LiveFigures, row_is_due
from revq.stages.training.validation import preview

TRAIN_LATENTS = 120


def shown_at(step: int, events: list[Event]) -> dict[str, float]:
    """The figures that the progress line shows at a step."""
    return next(dict(event.values) for event in events if isinstance(event, Advance) and event.done == step and "val_mse_rectified" in event.values)


def test_losses_are_means_of_the_last_steps_codebooks_and_rectifier_apart(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, step = [0.0], stage.train_step
    monkeypatch.setattr(stage, "train_step", lambda *parts: taken.append(float(step(*parts).sum())))
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=60)))
    for first, last in ((16, 25), (26, 30), (31, 45), (46, 50), (51, 60)):  # between log points (each 25 steps) and evaluations (each 15)
        shown = shown_at(last, events)
        assert shown["loss"] + shown["codebook_loss"] == pytest.approx(sum(taken[first : last + 1]) / (last + 1 - first), rel=1e-4)
        assert 0 < shown["loss"] < 2 * shown["codebook_loss"] < 4 * shown["loss"]  # a rectifier begins at the codebooks' error
        assert 0 < shown["codebook_usage"] <= 1
        assert shown["images/s"] > 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["step"] == [0, 15, 25, 30, 45, 50, 60]
    means = [a + b for a, b in zip(metrics["train_loss"][1:], metrics["train_codebook_loss"][1:], strict=True)]
    wanted = [sum(taken[a + 1 : b + 1]) / (b - a) for a, b in itertools.pairwise(metrics["step"])]
    assert means == pytest.approx(wanted, rel=1e-4)
    assert [loss is None for loss in metrics["val_loss"]] == [False, False, True, False, False, True, False]


def test_the_line_of_the_decoder_phase_shows_no_codebook_loss(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=4, decoder_steps=2, decoder_batch_size=4)))
    tasks = [event.task for event in events if isinstance(event, Begin)]
    assert tasks == ["train", "train through the decoder", "code usage"]
    assert ["codebook_loss" in shown_at(step, events) for step in (3, 4, 5, 6)] == [True, False, False, False]


def test_rows_of_losses_are_about_two_hundred_in_a_long_run(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    state = prepared(small_store, small_codebooks, tmp_path).state
    for total, wanted in ((100, 4), (5000, 200), (100_000, 200), (500_400, 200)):
        due = 0
        for step in range(25, total + 1, 25):
            state.total_steps, state.step = total, step
            due += row_is_due(state)
        assert due == pytest.approx(wanted, rel=0.02)


def test_a_stopped_run_has_the_rows_of_one_never_stopped(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", steps=60)))
    stop_at(50, train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", steps=60)))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", steps=60)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    whole, stopped = (metrics_of(tmp_path / name) for name in ("whole", "stopped"))
    for figures in (whole, stopped):
        del figures["images_per_s"]
    assert whole == stopped


def test_images_per_second_are_those_that_there_are(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(live_figures, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    ready = prepared(small_store, small_codebooks, tmp_path, batch_size=4096)
    live = LiveFigures(ready.settings, ready.inputs, ready.state)
    ready.step()
    assert live.read(ready.state)["images_per_s"] == TRAIN_LATENTS


def test_the_figures_between_evaluations_are_in_tensorboard_too(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=60)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    metrics = metrics_of(tmp_path / "run")
    for name in ("train_loss", "train_codebook_loss", "codebook_perplexity", "codebook_dead", "val_loss"):
        wanted = [(step, value) for step, value in zip(metrics["step"], metrics[name], strict=True) if value is not None]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)


def test_usage_of_each_trained_codebook_is_that_of_the_tokenizer_over_all_train_latents(
    small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=20)))
    tokenizer = ReVQTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    latents = torch.from_numpy(LatentStore.open(small_store)["train"].latents[:]).float()
    counts = code_counts(tokenizer.quantizer.encode(tokenizer.transform(latents)), 32)
    assert int(counts.sum()) == TRAIN_LATENTS * 512
    table = pq.read_table(tmp_path / "run" / "usage.parquet").to_pydict()
    assert table["token"] == list(range(512))
    assert table["usage"] == usage(counts).tolist()
    assert table["perplexity"] == pytest.approx(perplexity(counts).tolist())
    assert table["dead_codes"] == dead_codes(counts).tolist()


def test_usage_in_the_table_is_that_of_the_last_whole_epoch(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, batch_size=40, steps=4)
    counts = None
    for _ in range(3):
        before = ready.state.counts.clone()
        indices = ready.state.quantizer.encode(ready.inputs.transform(ready.inputs.take(40, 0, ready.state.step)[1]))
        counts = before + code_counts(indices, 32)
        ready.step()
    assert counts is not None
    assert ready.state.usage.tolist() == pytest.approx(
        [float(usage(counts).mean()), float(perplexity(counts).mean()), float(dead_codes(counts).sum())]
    )
    assert not ready.state.counts.any()


def test_frozen_codebooks_leave_no_table_of_usage_and_show_their_quantization(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", codebook_lr=0.0)))
    assert not (tmp_path / "run" / "usage.parquet").exists()
    begun = [(event.task, event.total, event.unit) for event in events if isinstance(event, Begin)]
    assert begun[:2] == [("quantize train", TRAIN_LATENTS, "latents"), ("quantize val", 6, "latents")]
    assert "codebook_loss" not in shown_at(12, events)
    metrics = metrics_of(tmp_path / "run")
    assert len(set(metrics["codebook_usage"])) == 1


def test_previewed_db_are_those_of_the_pictures_of_both_latents(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, previews=3)
    with torch.no_grad():
        ready.state.ema.conv_out.bias.add_(0.1)  # a rectifier that changes something
    figures, picture = preview(ready.run, ready.state, 3)
    vae, transform = ready.inputs.vae, ready.inputs.transform
    latents = torch.from_numpy(LatentStore.open(small_store)["val"].latents[:3]).float()
    quantized = transform.from_coordinates(ready.state.quantizer.decode(ready.state.quantizer.encode(transform(latents)))).detach()
    kinds = {"quantized": quantized, "rectified": ready.state.ema(quantized).detach()}
    reference = vae.decode(latents).clamp(-1, 1).double()
    for name, kind in kinds.items():
        errors = (vae.decode(transform.unstandardize(kind)).clamp(-1, 1).double() - reference) / 2
        decibels = [10 * torch.log10(1 / (error**2).mean()) for error in errors]
        assert figures[f"preview_{name}_db"] == pytest.approx(float(sum(decibels)) / 3, abs=1e-3)
    assert figures["preview_quantized_db"] != figures["preview_rectified_db"]
    assert torch.equal(picture[:, :64, :64], ((reference[0] + 1) * 127.5).round().byte())


def test_previewed_db_are_on_the_progress_line(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=2, previews=2)))
    assert shown_at(2, events)["preview_rectified_db"] == metrics_of(tmp_path / "run")["preview_rectified_db"][-1]
