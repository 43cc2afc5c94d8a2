"""Stage two, second half, on a real store."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import config, made_by, newest_step, prepared, stop_at, weights

from revq import LatentStore, ReVQTokenizer
from revq.errors import ConfigError, MismatchError, OutputError, StoreError, TrainingError
from revq.models.codebooks import load_codebooks
from revq.models.quantizer import MultiGroupQuantizer
from revq.stages.events import Note, run_quietly
from revq.stages.train_rectifier import _reset_unused, train_rectifier, train_step
from revq.stages.training import frozen_tokens
from revq.stages.training.checkpoints import resume
from revq.stages.training.data import open_inputs
from revq.stages.training.run import open_run
from revq.stages.training.state import new_state
from revq.stages.training.validation import validate


def test_a_run_leaves_a_tokenizer_metrics_checkpoints_and_tensorboard_events(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run")))
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    assert metrics["step"] == [0, 3, 6, 9, 12]
    assert metrics["val_mse_rectified"][-1] == result["val_mse_rectified"]
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["best.pt", "step-00000009.pt", "step-00000012.pt"]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert ReVQTokenizer.from_pretrained(tmp_path / "run" / "tokenizer").fingerprint == result["fingerprint"]


def test_training_lowers_the_error_of_unseen_latents(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"steps": 80, "lr": 2e-3, "codebook_lr": 0.0, "width": 64, "ema": 0.9}
    result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    assert result["val_mse_rectified"] < 0.99 * result["val_mse_quantized"]


@pytest.mark.parametrize("codebook_lr", [0.0, 0.01], ids=["frozen codebooks", "trained codebooks"])
def test_the_same_command_in_another_folder_gives_the_same_weights_bit_for_bit(
    small_store: Path, small_codebooks: Path, tmp_path: Path, codebook_lr: float
) -> None:
    for name in ("a", "b"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / name, codebook_lr=codebook_lr)))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("codebook_lr", [0.0, 0.01], ids=["frozen codebooks", "trained codebooks"])
def test_stopped_at_any_step_and_given_again_it_ends_with_the_same_weights(
    small_store: Path, small_codebooks: Path, tmp_path: Path, codebook_lr: float
) -> None:
    changes = {"codebook_lr": codebook_lr, "decoder_steps": 4, "decoder_batch_size": 4}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", **changes)))
    for step in (4, 8, 12, 14):
        stop_at(step, train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **changes)))
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **changes)))
    assert any(isinstance(event, Note) and "resuming at step" in event.text for event in events)
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    whole, resumed = (pq.read_table(tmp_path / name / "metrics.parquet", columns=["step", "val_mse_rectified"]) for name in ("whole", "stopped"))
    assert whole.equals(resumed)


def test_killed_at_random_instants_and_given_again_it_ends_with_the_same_weights(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    changes = {"steps": 300, "evaluations": 60, "decoder_steps": 6, "decoder_batch_size": 4}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", **changes)))
    arguments = ["--steps", "300", "--batch-size", "16", "--width", "32", "--depth", "1", "--evaluations", "60"]
    command = [sys.executable, "-m", "revq", "train-rectifier", small_store, small_codebooks, tmp_path / "killed", *arguments]
    command += ["--decoder-steps", "6", "--decoder-batch-size", "4"]
    chance = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            before = newest_step(tmp_path / "killed")
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline and newest_step(tmp_path / "killed") <= before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))
            os.kill(process.pid, signal.SIGKILL)
    assert newest_step(tmp_path / "killed") > 0
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "killed", **changes)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")


def test_a_torn_checkpoint_is_said_and_the_one_before_is_used(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole")))
    stop_at(9, train_rectifier(config(small_store, small_codebooks, tmp_path / "torn")))
    newest = sorted((tmp_path / "torn" / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    notes = [event.text for event in train_rectifier(config(small_store, small_codebooks, tmp_path / "torn")) if isinstance(event, Note)]
    assert "step-00000009.pt is damaged" in notes[0]
    assert notes[1] == "resuming at step 6"
    assert weights(tmp_path / "whole") == weights(tmp_path / "torn")


def test_frozen_codebooks_stay_as_fitted_and_trained_ones_move(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    fitted = load_codebooks(small_codebooks).codebooks
    for lr in (0.0, 0.01):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / str(lr), codebook_lr=lr)))
        trained = ReVQTokenizer.from_pretrained(tmp_path / str(lr) / "tokenizer").quantizer.codebooks
        assert torch.equal(trained, fitted) == (lr == 0)


def test_width_0_trains_the_codebooks_alone_and_gives_a_tokenizer_without_a_rectifier(
    small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", width=0)))
    tokenizer = ReVQTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    assert tokenizer.rectifier is None
    assert result["rectifier_parameters"] == 0
    assert result["val_mse_rectified"] == result["val_mse_quantized"]
    assert not torch.equal(tokenizer.quantizer.codebooks, load_codebooks(small_codebooks).codebooks)


def test_an_epoch_sees_every_latent_once_and_each_epoch_has_its_own_order(small_store: Path, small_codebooks: Path) -> None:
    inputs = open_inputs(config(small_store, small_codebooks, Path("unused")), LatentStore.open(small_store), load_codebooks(small_codebooks))
    epochs = [inputs.positions(20, 7, epoch) for epoch in (0, 1)]
    assert all(torch.equal(epoch.flatten().sort().values, torch.arange(120)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(inputs.positions(20, 8, 0), epochs[0])
    assert torch.equal(inputs.take(20, 7, 9)[0], epochs[1][3])


def test_streamed_latents_are_resumed_to_the_same_weights_and_not_mixed_with_resident_ones(
    small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    changes = {"latents": "stream", "steps": 20, "codebook_lr": 0.0}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", **changes)))
    stop_at(10, train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **changes)))
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "stopped", **changes)))
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "tokenizer")
    inputs = prepared(small_store, small_codebooks, tmp_path / "stopped", steps=20, codebook_lr=0.0)
    with pytest.raises(MismatchError, match="go on with --latents stream"):
        list(resume(inputs.state, tmp_path / "stopped" / "checkpoints", torch.device("cpu")))


@pytest.mark.parametrize("held", [True, False], ids=["quantized latents", "tokens alone"])
def test_a_batch_looked_up_in_the_table_equals_one_quantized_anew(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setattr(frozen_tokens, "_QUANTIZED_BYTES", 1 << 30 if held else 0)
    settings = config(small_store, small_codebooks, Path("unused"), codebook_lr=0.0)
    fitted = load_codebooks(small_codebooks)
    inputs = open_inputs(settings, LatentStore.open(small_store), fitted)
    by_table, anew = (new_state(settings, inputs, fitted.codebooks) for _ in range(2))
    table, none = (made_by(open_run(settings, inputs, state, tmp_path)) for state in (by_table, anew))
    none = dataclasses.replace(none, train=None)
    assert (table.train.quantized is not None) == held
    for _ in range(3):
        assert torch.equal(train_step(table, by_table), train_step(none, anew))


def test_without_a_validation_split_whole_images_are_held_out(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", val_split="none")))
    assert result["validated_on"] == "last 2 % of train"


def test_codes_that_a_step_moved_are_searched_where_they_are_now(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, codebook_lr=0.3)
    for _ in range(3):
        ready.step()
    quantizer, transform = ready.state.quantizer, ready.inputs.transform
    coordinates = transform(ready.inputs.val.batch(torch.arange(len(ready.inputs.val))))
    anew = MultiGroupQuantizer(quantizer.codebooks.detach().clone())
    assert torch.equal(quantizer.encode(coordinates), anew.encode(coordinates))


def test_unused_codes_move_beside_used_ones(small_store: Path, small_codebooks: Path) -> None:
    fitted = load_codebooks(small_codebooks)
    settings = config(small_store, small_codebooks, Path("unused"))
    state = new_state(settings, open_inputs(settings, LatentStore.open(small_store), fitted), fitted.codebooks)
    state.counts.fill_(5)
    state.counts[3, 10:] = 0
    state.counts[3, 7] = 100
    before = state.quantizer.codebooks.detach().clone()
    _reset_unused(state, seed=0)
    moved = (state.quantizer.codebooks.detach() != before).any(2)
    assert moved.sum() == 6  # 20 % of 32
    assert moved[3, 10:16].all()
    assert float((state.quantizer.codebooks[3, 10] - before[3, 7]).detach().norm()) < 1
    assert not state.counts.any()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"at step \d+; nothing was written over: try a lower --lr"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", lr=1e30, steps=100)))
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_validation_counts_no_codes(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, codebook_lr=0.01, steps=3)
    ready.step()
    counts = ready.state.counts.clone()
    assert int(counts.sum()) == 16 * 512  # a batch of 16, a code for each of 512 tokens
    validate(ready.run, ready.state)
    assert torch.equal(ready.state.counts, counts)


def test_from_a_step_that_is_not_finite_on_no_weight_changes(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path)
    ready.step()
    before = ready.weights()
    good = ready.inputs.train.latents.clone()
    ready.inputs.train.latents.fill_(float("nan"))
    ready.step()
    ready.inputs.train.latents.copy_(good)
    ready.step()
    assert int(ready.state.bad_step) == 1
    assert all(torch.equal(now, then) for now, then in zip(ready.weights(), before, strict=True))


class NoWaiting(TorchDispatchMode):
    """Fails on every operation whose result the host must wait for, but in the search by product (on CUDA the fused one takes its place) and
    in what moves unused codes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith(("aten._local_scalar_dense", "aten.equal", "aten.nonzero")):
            allowed = {"_nearest_by_product"}
            assert any(frame.name in allowed for frame in traceback.extract_stack()), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("codebook_lr", [0.0, 0.01], ids=["frozen codebooks", "trained codebooks"])
def test_a_step_never_waits_for_the_device(small_store: Path, small_codebooks: Path, tmp_path: Path, codebook_lr: float) -> None:
    ready = prepared(small_store, small_codebooks, tmp_path, codebook_lr=codebook_lr, batch_size=40, steps=4, decoder_steps=2, decoder_batch_size=4)
    with NoWaiting():
        for _ in range(6):  # an epoch ends after the third
            ready.step()
    assert ready.state.done
    assert (ready.state.usage is not None) == (codebook_lr > 0)


def test_ten_epochs_and_ten_more_equal_twenty(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"steps": None, "schedule": "constant", "decoder_steps": 2, "decoder_batch_size": 4, "batch_size": 40}
    for name, epochs in (("twenty", 20), ("ten and ten", 10), ("ten and ten", 20)):
        result = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / name, epochs=epochs, **settings)))
        assert result["steps"] == 3 * epochs + 2
    assert weights(tmp_path / "twenty") == weights(tmp_path / "ten and ten")
    with pytest.raises(OutputError, match="has been trained for 60 steps, more than the 30 asked for"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "ten and ten", epochs=10, **settings)))


def test_a_schedule_that_depends_on_its_length_cannot_be_made_longer(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=2, schedule="cosine")))
    with pytest.raises(OutputError, match="steps: 2 there, 3 asked"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=3, schedule="cosine")))


def test_the_last_checkpoints_and_the_best_are_kept(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", keep=3, lr=0.5, codebook_lr=0.0)))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best.pt", "step-00000006.pt", "step-00000009.pt", "step-00000012.pt"]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    assert metrics["val_loss"][metrics["step"].index(best["step"])] == min(metrics["val_loss"])
    assert best["step"] < 12  # at this rate it gets worse


def test_a_run_that_gets_no_better_stops_early_with_its_best_weights(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"steps": 40, "evaluations": 20, "lr": 0.5, "codebook_lr": 0.0, "patience": 2}
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    assert any(isinstance(event, Note) and "the latent phase ends at step" in event.text for event in events)
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    best = metrics["val_loss"].index(min(metrics["val_loss"]))
    assert len(metrics["step"]) == best + 3
    assert metrics["step"][-1] < 40
    assert events[-1].value["val_mse_rectified"] == metrics["val_mse_rectified"][best]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    rectifier = ReVQTokenizer.from_pretrained(tmp_path / "run" / "tokenizer").rectifier
    assert rectifier is not None
    assert all(torch.equal(tensor, checkpoint["ema"][name]) for name, tensor in rectifier.state_dict().items())
    rerun = run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    assert rerun == events[-1].value


def test_previews_are_pictures_in_tensorboard_and_figures_in_the_table(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", previews=3)))
    metrics = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pydict()
    assert metrics["preview_rectified_db"][0] == metrics["preview_quantized_db"][0]
    assert metrics["preview_rectified_db"][-1] != metrics["preview_quantized_db"][-1]
    assert all(10 < value < 60 for value in metrics["preview_rectified_db"])
    assert 0 < metrics["codebook_usage"][-1] <= 1
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (tag,) = events.Tags()["images"]
    pictures = events.Images(tag)
    assert [picture.step for picture in pictures] == metrics["step"]
    assert (pictures[0].width, pictures[0].height) == (3 * 64, 3 * 64)


def test_without_a_compiler_training_goes_on_without_compilation(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--batch-size", "16", "--width", "32", "--depth", "1", "--compile", "on", "--precision", "fp32"]
    command = [sys.executable, "-m", "revq", "train-rectifier", small_store, small_codebooks, tmp_path / "run", *arguments]
    environment = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning: torch.compile is not to be had here" in done.stdout
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "eager", steps=2, precision="fp32")))
    assert weights(tmp_path / "run") == weights(tmp_path / "eager")


def test_weights_and_biases_where_it_is_not_installed_is_refused_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("revq.stages.training.log.importlib.util.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run_quietly(train_rectifier(config(Path("store"), Path("codebooks"), Path("out"), wandb=True)))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="Weights & Biases is an option that the development install leaves out")
def test_weights_and_biases_gets_the_figures(small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", wandb=True)))
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_codebooks_of_another_store_are_refused(small_store: Path, small_codebooks: Path, tmp_path: Path, taef2: str, imagenet_sample: Path) -> None:
    from revq.stages.configs import EncodeLatentsConfig
    from revq.stages.encode_latents import encode_latents

    other = {"store": str(tmp_path / "other"), "image_size": 128, "limit": 8, "workers": 1}
    run_quietly(encode_latents(EncodeLatentsConfig(images=str(imagenet_sample / "val"), vae=taef2, **other)))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="fingerprint"):
        run_quietly(train_rectifier(config(tmp_path / "other", small_codebooks, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_settings_is_kept(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=2)))
    before = weights(tmp_path / "run")
    with pytest.raises(OutputError, match="steps: 2 there, 3 asked"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=3)))
    assert weights(tmp_path / "run") == before


@pytest.mark.parametrize("changes", [{"width": 33}, {"lr": 0.0}, {"ema": 1.0}, {"precision": "fp8"}, {"block": "mlp"}, {"steps": -1}], ids=str)
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(Path("store"), Path("codebooks"), Path("out"), **changes)


def test_a_validation_split_that_was_named_and_is_not_there_is_an_error(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r'has no split "vall" to validate on, only train, val'):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", val_split="vall")))
    assert not (tmp_path / "run").exists()
