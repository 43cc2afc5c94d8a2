"""The decoder phase in parts: the same gradients, as many latents at once as memory holds, and what is said where it holds none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from revq.errors import TrainingError, VAEError
from revq.models.rectifier import Rectifier
from revq.models.transform import LatentTransform
from revq.models.vae import EMBEDDED_VAE, FrozenVAE
from revq.stages.configs import FitCodebooksConfig, TrainRectifierConfig
from revq.stages.events import Advance, Begin, Event, Note, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.losses import PixelLoss
from revq.stages.training.micro_batches import backward_in_parts
from revq.stages.training.network import RectifierNetwork

SETTINGS = {"steps": 4, "batch_size": 16, "width": 32, "depth": 1, "evaluations": 2, "codebook_lr": 0.0, "decoder_steps": 4, "decoder_batch_size": 4}


def config(store: Path, codebooks: Path, out: Path, **changes: object) -> TrainRectifierConfig:
    return TrainRectifierConfig(**{"store": str(store), "codebooks": str(codebooks), "out": str(out), **SETTINGS, **changes})  # type: ignore[arg-type]


def tokenizer(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "tokenizer" / "model.safetensors")


def notes(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Note))


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int, spare_calls: int = 0) -> None:
    """From now on the loss of more than `most` latents runs out of memory, but for the first so many calls with gradients."""
    plain, calls = PixelLoss.__call__, []

    def picture_loss(self: PixelLoss, rectified: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(latents) > most and sum(calls) > spare_calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return plain(self, rectified, latents)

    monkeypatch.setattr(PixelLoss, "__call__", picture_loss)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_gradients_added_over_parts_are_those_of_the_whole_batch(micro_batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vae, rectifier = FrozenVAE.load(EMBEDDED_VAE), Rectifier(channels=8, width=32, depth=1)
    torch.nn.init.normal_(rectifier.conv_out.weight, std=0.01, generator=generator)
    latents, noise = (torch.randn(8, 8, 8, 8, generator=generator) for _ in range(2))
    transform = LatentTransform(mean=torch.zeros(8, 8, 8), std=torch.ones(8, 8, 8), tokens=128)
    made = []
    for size in (8, micro_batch):
        trained = copy.deepcopy(rectifier)
        pictures = PixelLoss(vae=vae, transform=transform, micro_batch=size)
        loss = backward_in_parts(RectifierNetwork(trained, bf16=False, network=trained), pictures, latents + 0.3 * noise, latents)
        made.append((loss, [weight.grad for weight in trained.parameters()]))
    (whole_loss, whole), (loss, parts) = made
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole_loss)
    for one, other in zip(whole, parts, strict=True):
        assert one is not None
        assert float(one.norm()) > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_the_micro_batch_may_change_within_a_folder_and_changes_rounding_alone(small_store: Path, small_codebooks: Path, tmp_path: Path) -> None:
    settings = {"precision": "fp32"}
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "whole", **settings)))
    stopped = train_rectifier(config(small_store, small_codebooks, tmp_path / "parts", **settings))
    next(event for event in stopped if isinstance(event, Advance) and event.done == 4)
    stopped.close()  # type: ignore[attr-defined]
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "parts", micro_batch=3, **settings)))
    assert "resuming at step 4" in notes(events)
    whole, parts = tokenizer(tmp_path / "whole"), tokenizer(tmp_path / "parts")
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_before_the_latent_phase_the_decoder_phase_is_tried_and_the_advice_is_taken(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "asked", micro_batch=2)))
    short_of_memory(monkeypatch, most=2)
    with pytest.raises(TrainingError, match=r"not fit in the memory of cpu with 4 latents at once; give --micro-batch 2, whose result is the same"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "found")))
    assert not (tmp_path / "found" / "checkpoints").exists()
    run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "found", micro_batch=2)))
    asked, found = tokenizer(tmp_path / "asked"), tokenizer(tmp_path / "found")
    assert all(torch.equal(found[name], tensor) for name, tensor in asked.items())


def test_where_not_even_one_latent_fits_nothing_is_trained(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, most=0)
    with pytest.raises(TrainingError, match=r"does not fit in the memory of cpu with 1 latents at once; free it .* the same folder takes it"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", micro_batch=1)))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_memory_that_ends_later_is_an_error_whose_advice_the_same_folder_takes(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        short_of_memory(patched, most=2, spare_calls=3)  # the trial and two steps
        with pytest.raises(TrainingError) as caught:
            run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run")))
    assert str(caught.value) == "out of memory at step 6; the same command goes on from the last checkpoint, with --micro-batch 2"
    short_of_memory(monkeypatch, most=2)
    events = list(train_rectifier(config(small_store, small_codebooks, tmp_path / "run", micro_batch=2)))
    assert "resuming at step" in notes(events)
    assert tokenizer(tmp_path / "run")


def test_memory_that_ends_in_the_latent_phase_is_not_answered_with_a_setting_that_the_folder_refuses(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> torch.Tensor:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")

    monkeypatch.setattr("revq.stages.train_rectifier.latent_loss", full)
    with pytest.raises(TrainingError, match=r"^out of memory at step 0; .* with the device free of other work, or more of them under torchrun"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run")))


def test_a_decoder_without_gradients_is_refused_before_the_latent_phase(
    small_store: Path, small_codebooks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenVAE, "decode", torch.no_grad()(FrozenVAE.decode))
    with pytest.raises(VAEError, match=r"gives no gradients, which decoder-steps needs; let its decode run without torch\.no_grad"):
        run_quietly(train_rectifier(config(small_store, small_codebooks, tmp_path / "run")))
    assert not (tmp_path / "run" / "checkpoints").exists()
    run_quietly(train_rectifier(dataclasses.replace(config(small_store, small_codebooks, tmp_path / "without"), decoder_steps=0)))


def test_the_sensitivity_of_the_decoder_is_computed_a_few_latents_at_a_time(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sizes = FrozenVAE.decode, []
    monkeypatch.setattr(FrozenVAE, "decode", lambda self, latents: sizes.append(len(latents)) or plain(self, latents))
    settings = {"codes": 16, "iterations": 1, "transform": "decoder", "calibration_samples": 18, "max_samples": 20}
    events = fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(tmp_path / "codebooks"), **settings))  # type: ignore[arg-type]
    next(event for event in events if isinstance(event, Begin) and event.task == "covariance")
    assert sizes == [4, 4, 4, 4, 2]
