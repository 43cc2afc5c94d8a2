"""Stage two, first half, on a real store."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from revq import LatentStore
from revq.cache.batches import ResidentLatents
from revq.errors import CodebookError, ConfigError, MismatchError, OutputError
from revq.models.codebooks import Codebooks, load_codebooks
from revq.models.quantizer import MultiGroupQuantizer
from revq.stages.encode_latents import EncodeLatentsConfig, encode_latents
from revq.stages.events import Advance, Begin, Note, run_quietly
from revq.stages.fit_codebooks import FitCodebooksConfig, fit_codebooks

SMALL = {"tokens": 512, "codes": 32, "iterations": 4, "calibration_samples": 32}


def config(store: Path, out: Path, **changes: object) -> FitCodebooksConfig:
    return FitCodebooksConfig(**{"store": str(store), "out": str(out), "transform": "standardize", **SMALL, **changes})  # type: ignore[arg-type]


def latent_error(store: Path, fitted: Codebooks, split: str) -> float:
    latents = ResidentLatents(LatentStore.open(store)[split])
    standardised = fitted.transform.standardize(latents.batch(torch.arange(len(latents))))
    quantizer = MultiGroupQuantizer(fitted.codebooks)
    quantized = fitted.transform.from_coordinates(quantizer.decode(quantizer.encode(fitted.transform.to_coordinates(standardised))))
    return float((quantized - standardised).detach().square().mean())


def test_codebooks_are_written_with_their_transform_and_usage(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.codebooks.shape == (512, 32, 4)
    assert fitted.counts.sum(1).tolist() == [120] * 512
    assert result["latents"] == 120
    assert result["bits_per_image"] == 512 * 5
    assert result["coordinate_mse"] == pytest.approx(latent_error(small_store, fitted, "train"), rel=0.01)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["codebooks.safetensors", "config.json"]


def test_the_same_command_twice_fits_once_and_another_folder_gets_the_same_bytes(small_store: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / name, transform="pca")))
    first, second = ((tmp_path / name / "codebooks.safetensors").read_bytes() for name in ("a", "b"))
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    events = list(fit_codebooks(config(small_store, tmp_path / "a", transform="pca")))
    assert isinstance(events[0], Note)
    assert "complete already" in events[0].text
    assert len(events) == 2


def test_stopped_after_any_block_and_given_again_it_ends_with_the_same_bytes(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "whole")))
    stopped = fit_codebooks(config(small_store, tmp_path / "stopped"))
    for event in stopped:
        if isinstance(event, Advance) and event.done >= 96:
            stopped.close()  # type: ignore[attr-defined]
            break
    assert len(list((tmp_path / "stopped" / "partial").iterdir())) >= 3
    with pytest.raises(CodebookError, match="not finished"):
        load_codebooks(tmp_path / "stopped")
    run_quietly(fit_codebooks(config(small_store, tmp_path / "stopped")))
    whole, resumed = ((tmp_path / name / "codebooks.safetensors").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed


def test_finished_blocks_are_taken_as_they_are_and_counted_in_the_progress(small_store: Path, tmp_path: Path) -> None:
    stopped = fit_codebooks(config(small_store, tmp_path / "out"))
    for event in stopped:
        if isinstance(event, Advance) and event.done >= 64:
            stopped.close()  # type: ignore[attr-defined]
            break
    block = tmp_path / "out" / "partial" / "tokens-00000-00032.safetensors"
    tensors = load_file(block)
    save_file({**tensors, "codebooks": torch.full_like(tensors["codebooks"], 7.0)}, block)
    begun = [event for event in fit_codebooks(config(small_store, tmp_path / "out")) if isinstance(event, Begin)]
    assert begun[-1].done == 64
    assert bool((load_codebooks(tmp_path / "out").codebooks[:32] == 7.0).all())


def test_pca_loses_less_than_plain_coordinates_on_unseen_latents(imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    store = tmp_path / "latents.zarr"
    for split, limit in (("train", 200), ("val", 40)):
        settings = {"images": str(imagenet_sample / split), "split": split, "limit": limit, "image_size": 64, "workers": 2}
        run_quietly(encode_latents(EncodeLatentsConfig(store=str(store), vae=taef2, **settings)))  # type: ignore[arg-type]
    errors = {}
    for transform in ("standardize", "pca"):
        run_quietly(fit_codebooks(config(store, tmp_path / transform, transform=transform, codes=16)))
        errors[transform] = latent_error(store, load_codebooks(tmp_path / transform), "val")
    assert errors["pca"] < 0.9 * errors["standardize"]


def test_the_decoder_transform_measures_how_much_each_position_moves_the_picture(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder")))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.sensitivity is not None
    assert fitted.sensitivity.shape == (32, 8, 8)
    assert float(fitted.sensitivity.min()) > 0
    assert len(result["sensitivity_per_channel"]) == 32
    assert float(fitted.transform.scale.std()) > 0.1
    latents = ResidentLatents(LatentStore.open(small_store)["val"]).batch(torch.arange(12))
    assert torch.allclose(fitted.transform.inverse(fitted.transform(latents)), latents, atol=1e-3)


def test_sensitivity_agrees_with_moving_one_latent_value_by_hand(small_store: Path, tmp_path: Path, taef2: str) -> None:
    from revq import FrozenVAE

    run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder", calibration_samples=512)))
    fitted = load_codebooks(tmp_path / "out")
    assert fitted.sensitivity is not None
    vae, latents = FrozenVAE.load(taef2), ResidentLatents(LatentStore.open(small_store)["train"]).batch(torch.arange(100))
    by_hand, by_gradient = [], []
    for position in [(0, 3, 3), (5, 4, 4), (17, 0, 7), (31, 5, 2)]:
        moved = latents.clone()
        step = 0.02 * fitted.transform.std[position]
        moved[(slice(None), *position)] += step
        with torch.no_grad():
            change = (vae.decode(moved) - vae.decode(latents)) / 0.02
        by_hand.append(float(change.square().flatten(1).sum(1).mean()))
        by_gradient.append(float(fitted.sensitivity[position]))
    assert by_gradient == pytest.approx(by_hand, rel=0.35)


def test_images_kept_for_the_rectifier_are_not_fitted_on(small_store: Path, tmp_path: Path) -> None:
    result = run_quietly(fit_codebooks(config(small_store, tmp_path / "out", rectifier_share=0.25)))
    assert result["latents"] == 90


def test_max_samples_draws_by_the_seed(small_store: Path, tmp_path: Path) -> None:
    results = [run_quietly(fit_codebooks(config(small_store, tmp_path / str(seed), max_samples=50, seed=seed))) for seed in (0, 1)]
    assert [result["latents"] for result in results] == [50, 50]
    assert results[0]["coordinate_mse"] != results[1]["coordinate_mse"]


def test_tokens_that_do_not_divide_and_too_many_codes_are_refused_before_anything_is_written(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match="500 tokens do not divide"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", tokens=500)))
    with pytest.raises(CodebookError, match="use --codes 120 or fewer"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=121)))
    assert not (tmp_path / "out").exists()


def test_another_vae_for_the_decoder_transform_is_refused(small_store: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="fingerprint"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", transform="decoder", vae="revq-tiny-f8c8")))
    assert not (tmp_path / "out").exists()


def test_codebooks_of_other_settings_are_kept_unless_overwritten(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    before = (tmp_path / "out" / "codebooks.safetensors").read_bytes()
    with pytest.raises(OutputError, match="codes: 32 there, 16 asked"):
        run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=16)))
    assert (tmp_path / "out" / "codebooks.safetensors").read_bytes() == before
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out", codes=16, overwrite=True)))
    assert load_codebooks(tmp_path / "out").codebooks.shape == (512, 16, 4)


def test_a_damaged_codebook_file_is_named(small_store: Path, tmp_path: Path) -> None:
    run_quietly(fit_codebooks(config(small_store, tmp_path / "out")))
    path = tmp_path / "out" / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CodebookError, match=r"codebooks\.safetensors is damaged"):
        load_codebooks(tmp_path / "out")


@pytest.mark.parametrize("changes", [{"codes": 1}, {"tokens": 0}, {"transform": "fourier"}, {"backend": "gpu"}, {"rectifier_share": 1.0}], ids=str)
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes)).replace("_", "-")):
        config(Path("store"), Path("out"), **changes)
