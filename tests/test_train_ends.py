"""How train-rectifier ends where it should not go on, what it takes from a decoder phase, and checkpoints that are damaged or of another plan."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import config, metrics_of, newest_step, prepared, stop_at, weights

from revq import ReVQTokenizer
from revq.errors import TrainingError
from revq.stages.events import Event, Note, run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.state import LATENT_SCORE, record_best

LAST_PHASE = {"steps": 0, "decoder_steps": 8, "decoder_batch_size": 8, "codebook_lr": 0.0, "ema": 0.0}


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Note)]


def rectifier_of(run: Path) -> dict[str, torch.Tensor]:
    rectifier = ReVQTokenizer.from_pretrained(run / "tokenizer").rectifier
    assert rectifier is not None
    return rectifier.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("lr", [1e18, 300.0], ids=["not finite", "finite"])
def test_a_run_that_diverges_at_its_very_last_step_writes_no_tokenizer_and_no_checkpoint(
    small_store: Path, small_codebooks: Path, tmp_path: Path, lr: float
) -> None:
    with pytest.raises(TrainingError, match=r"diverged by step 1: val_loss is \S+, and was 0\.\d+ at step 0; .* try a lower --lr"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=1, lr=lr, codebook_lr=0.0, ema=0.0)))
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert newest_step(tmp_path / "run") == 0
    assert torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)["step"] == 0
    assert metrics_of(tmp_path / "run")["step"] == [0]


@pytest.mark.parametrize(("score", "goes_on"), [(9.9, True), (10.1, False), (math.inf, False), (math.nan, False)])
def test_a_run_has_diverged_where_its_score_is_ten_times_that_of_its_start(
    small_store: Path, small_codebooks: Path, tmp_path: Path, score: float, goes_on: bool
) -> None:
    state = prepared(small_store, small_codebooks, tmp_path).state
    rows = [{"step": 0, LATENT_SCORE: 1.0}, {"step": 3, LATENT_SCORE: score}]
    state.history.append(rows[0])
    assert record_best(state, rows[0], LATENT_SCORE)
    if goes_on:
        assert not record_best(state, rows[1], LATENT_SCORE)
    else:
        with pytest.raises(TrainingError, match="diverged"):
            record_best(state, rows[1], LATENT_SCORE)
    assert state.best["step"] == 0


def test_a_decoder_phase_that_harms_leaves_the_tokenizer_the_weights_it_began_with(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", lr=0.05, **LAST_PHASE)))
    scores = metrics_of(tmp_path / "run")["val_pixel_loss"]
    assert min(scores) == scores[0] < scores[-1]
    (note,) = [note for note in notes(events) if "ends no better than it began" in note]
    assert note.endswith("the tokenizer gets the weights of step 0")
    result = events[-1].value  # type: ignore[union-attr]
    assert result["val_mse_rectified"] == result["val_mse_quantized"]
    assert not any(name.startswith("leave") and tensor.any() for name, tensor in rectifier_of(tmp_path / "run").items())


def test_a_decoder_phase_that_helps_gives_its_last_weights(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {**LAST_PHASE, "decoder_steps": 16, "lr": 3e-3, "width": 64}
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    scores = metrics_of(tmp_path / "run")["val_pixel_loss"]
    assert scores[-1] < scores[0]
    assert not notes(events)
    last = torch.load(tmp_path / "run" / "checkpoints" / "step-00000016.pt", weights_only=True)
    assert same(rectifier_of(tmp_path / "run"), last["ema"])


def test_patience_ends_a_decoder_phase_that_never_beats_its_start(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {**LAST_PHASE, "decoder_steps": 40, "evaluations": 40, "lr": 0.1, "patience": 3}
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    assert metrics_of(tmp_path / "run")["step"] == [0, 1, 2, 3]
    assert notes(events) == ["no better since step 0: the decoder phase ends at step 3"]
    assert not any(name.startswith("leave") and tensor.any() for name, tensor in rectifier_of(tmp_path / "run").items())


def test_each_phase_is_evaluated_at_both_ends_and_between(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"steps": 40, "decoder_steps": 8, "decoder_batch_size": 4, "evaluations": 4}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", **settings)))
    metrics = metrics_of(tmp_path / "run")
    evaluated = [step for step, loss in zip(metrics["step"], metrics["val_loss"], strict=True) if loss is not None]
    assert evaluated == [0, 10, 20, 30, 40, 42, 44, 46, 48]
    pictured = [step for step, loss in zip(metrics["step"], metrics["val_pixel_loss"], strict=True) if loss is not None]
    assert pictured == [40, 42, 44, 46, 48]


def test_best_weights_that_cannot_be_read_are_said_and_the_last_ones_taken(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = config(small_store, small_codebooks, tmp_path / "run", steps=40, evaluations=20, lr=0.5, codebook_lr=0.0, patience=2, keep=1)
    run_quietly(train_rectifier(settings))
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    best.write_bytes(best.read_bytes()[:1000])
    events = list(train_rectifier(settings))
    assert any(note.startswith("the best weights, of step ") and "cannot be read" in note for note in notes(events))
    last = torch.load(tmp_path / "run" / "checkpoints" / f"step-{newest_step(tmp_path / 'run'):08d}.pt", weights_only=True)
    assert same(rectifier_of(tmp_path / "run"), last["ema"])
    assert events[-1].value["val_mse_rectified"] == last["history"][-1]["val_mse_rectified"]  # type: ignore[union-attr]


def test_where_no_sound_checkpoint_lies_on_the_way_the_run_says_that_it_starts_anew(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"schedule": "constant", "decoder_steps": 2, "decoder_batch_size": 4, "keep": 1}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=6, **settings)))
    end_of_latent_phase = tmp_path / "run" / "checkpoints" / "step-00000006.pt"
    end_of_latent_phase.write_bytes(end_of_latent_phase.read_bytes()[:1000])
    said = notes(list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=9, **settings))))
    assert said[0].startswith("checkpoint step-00000006.pt is damaged")
    assert said[1] == "none of the other checkpoints lies on the way to 9 steps: starting at step 0"
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", steps=9, **settings)))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_of_a_shorter_plan_do_not_crowd_out_those_of_the_longer_one(
    small_store: Path, small_codebooks: Path, tmp_path: Path, keep: int
) -> None:
    settings = {"schedule": "constant", "decoder_steps": 4, "decoder_batch_size": 4, "keep": keep, "evaluations": 20}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", steps=6, **settings)))
    assert newest_step(tmp_path / "run") == 10
    longer = config(small_store, small_codebooks, tmp_path / "run", steps=12, **settings)
    stop_at(8, train_rectifier(longer))
    assert newest_step(tmp_path / "run") == 8
    assert "resuming at step 8" in notes(list(train_rectifier(longer)))


def test_a_new_checkpoint_is_in_place_before_the_last_one_goes(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, left = Path.unlink, []

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("step-"):
            others = [other for other in path.parent.glob("step-*.pt") if other != path]
            left.append(max(torch.load(other, weights_only=True)["step"] for other in others) - int(path.stem[5:]))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", keep=1)))
    assert left == [3, 3, 3, 3]
