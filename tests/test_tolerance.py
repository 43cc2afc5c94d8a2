"""The tolerance curve on real photographs through a real VAE: it falls, its points are the evaluation's own, and its noise is reproducible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from revq.cache.images import load_pixels
from revq.cache.sources import open_source
from revq.models.tokenizer import ReVQTokenizer
from revq.models.vae import FrozenVAE
from revq.stages.configs import EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig
from revq.stages.evaluate import evaluate
from revq.stages.evaluation.tolerance import LEVELS, _noise
from revq.stages.events import Begin, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier


@pytest.fixture(scope="module")
def weighted_run(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    """The small run's tokenizer with a scale in its transform, as the decoder transform has one."""
    tokenizer = ReVQTokenizer.from_pretrained(small_run / "tokenizer")
    generator = torch.Generator().manual_seed(0)
    sensitivity = torch.rand(tokenizer.latent_shape, generator=generator) + 0.05
    tokenizer.transform.scale.copy_((sensitivity / sensitivity.mean()).sqrt())
    folder = tmp_path_factory.mktemp("weighted") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder_run(tmp_path_factory: pytest.TempPathFactory, small_store: Path) -> Path:
    """A tokenizer whose coordinates are those of the decoder's metric, which its axes carry; it has no rectifier."""
    folder = tmp_path_factory.mktemp("decoder")
    codebooks = {"tokens": 256, "codes": 32, "transform": "decoder", "calibration_samples": 32, "iterations": 3}
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(folder / "codebooks"), **codebooks)))
    training = {"steps": 0, "width": 0, "codebook_lr": 0.0}
    run_quietly(
        train_rectifier(TrainRectifierConfig(store=str(small_store), codebooks=str(folder / "codebooks"), out=str(folder / "run"), **training))
    )
    return folder / "run"


def measure(tokenizer: Path, images: Path, out: Path, **settings: Any) -> dict[str, Any]:
    config = {"limit": 6, "batch_size": 4, "workers": 2, "download": False, "device": "cpu", "cache": "off", "tolerance_images": 6, **settings}
    return dict(run_quietly(evaluate(EvaluateConfig(tokenizer=str(tokenizer), images=str(images), out=str(out), **config))))


def test_more_noise_is_worse_and_the_curve_starts_at_the_vae(weighted_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = measure(weighted_run, imagenet_sample / "val", tmp_path / "out")
    tolerance = value["tolerance"]
    for kind in ("isotropic", "decoder"):
        assert [point["noise"] for point in tolerance[kind]] == [0.0, *LEVELS]
        psnr = [point["psnr_db"] for point in tolerance[kind]]
        assert psnr == sorted(psnr, reverse=True)
        assert psnr[0] == pytest.approx(value["rows"]["vae"]["psnr_db"], abs=1e-3)
        assert all(point["lpips_alex"] is None and point["rfid"] is None for point in tolerance[kind])
    assert tolerance["isotropic"][3] != tolerance["decoder"][3]
    assert "tolerance" not in value["notes"]


def test_the_tokenizers_own_points_are_its_rows_at_the_size_of_its_errors(weighted_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = measure(weighted_run, imagenet_sample / "val", tmp_path / "out")
    for row, mark in value["tolerance"]["marks"].items():
        assert mark["psnr_db"] == pytest.approx(value["rows"][row]["psnr_db"], abs=1e-3)
        assert mark["noise"]["isotropic"] == pytest.approx(value["latent_error"][row]["latent_mse"] ** 0.5, rel=1e-4)
        assert mark["noise"]["decoder"] == pytest.approx(value["latent_error"][row]["decoder_mse"] ** 0.5, rel=1e-4)


def test_the_noise_depends_on_the_seed_and_not_on_the_batches(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    images = imagenet_sample / "val"
    curves = [
        [point["psnr_db"] for point in measure(small_run, images, tmp_path / name, **settings)["tolerance"]["isotropic"]]
        for name, settings in {"a": {}, "b": {"batch_size": 1}, "c": {"seed": 1}}.items()
    ]
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[2][1:] != pytest.approx(curves[0][1:], abs=1e-3)


def test_noise_in_the_decoders_metric_is_white_in_the_coordinates_and_isotropic_noise_in_the_latents(decoder_run: Path) -> None:
    tokenizer = ReVQTokenizer.from_pretrained(decoder_run / "tokenizer")
    noise = {kind: raw / tokenizer.transform.std for kind, raw in _noise(tokenizer, range(16), seed=3).items()}
    coordinates = {kind: tokenizer.transform.to_coordinates(standardised) for kind, standardised in noise.items()}
    draws = torch.stack([torch.randn(tokenizer.latent_shape, generator=torch.Generator().manual_seed(3 * 1_000_003 + i)) for i in range(16)])
    assert torch.allclose(noise["isotropic"], draws, atol=1e-5)
    assert torch.allclose(coordinates["decoder"].flatten(1), draws.flatten(1), atol=1e-3)
    # Where the picture hardly moves the noise is large; by the decoder's measure both kinds are of size 1.
    assert float(noise["decoder"].square().mean()) > 2
    assert float(coordinates["isotropic"].square().mean()) == pytest.approx(1.2, abs=0.2)  # above 1: 32 products leave directions below nothing


def test_the_tokenizers_error_in_the_decoders_metric_is_that_of_its_coordinates(decoder_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = measure(decoder_run, imagenet_sample / "val", tmp_path / "out", limit=4, tolerance_images=4)
    tokenizer, source = ReVQTokenizer.from_pretrained(decoder_run / "tokenizer"), open_source(imagenet_sample / "val")
    images = torch.stack([torch.from_numpy(load_pixels(source.read(i), 64).array) for i in range(4)])
    coordinates = tokenizer.transform(tokenizer.vae.encode(images / 127.5 - 1))
    error = float((tokenizer.quantizer.decode(tokenizer.quantizer.encode(coordinates)) - coordinates).square().mean())
    assert value["latent_error"]["quantized"]["decoder_mse"] == pytest.approx(error, rel=1e-4)
    assert value["tolerance"]["marks"]["quantized"]["noise"]["decoder"] == pytest.approx(error**0.5, rel=1e-4)
    assert value["tolerance"]["decoder"][1] != value["tolerance"]["isotropic"][1]
    assert "tolerance" not in value["notes"]


@pytest.mark.parametrize(("run", "images", "points"), [("weighted_run", 20, 3), ("small_run", 20, 6), ("decoder_run", 20, 2)])
def test_the_curve_decodes_no_more_pictures_than_the_rows_unless_it_is_told_to(
    run: str, images: int, points: int, request: pytest.FixtureRequest, imagenet_sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, task, decode = {"evaluate": 0, "tolerance": 0}, "", FrozenVAE.decode

    def counted(self: FrozenVAE, latents: torch.Tensor) -> torch.Tensor:
        decoded[task] += len(latents)
        return decode(self, latents)

    config = EvaluateConfig(
        tokenizer=str(request.getfixturevalue(run)), images=str(imagenet_sample / "val"), out=str(tmp_path / "out"), limit=images, batch_size=images,
        workers=2, download=False, device="cpu", cache="off",
    )  # fmt: skip
    events = evaluate(config)
    for event in events:
        if isinstance(event, Begin):
            task = event.task
            monkeypatch.setattr(FrozenVAE, "decode", counted)
        if task == "tolerance" and not isinstance(event, Begin):
            monkeypatch.undo()  # what comes now are the pictures of the report
    rows = decoded["evaluate"] - 2 * 16  # the check of the round trip decodes its 16 images twice
    assert event.value["tolerance"]["images"] == points  # type: ignore[union-attr]
    assert rows == images * (2 if run == "decoder_run" else 3)
    assert rows / 2 < decoded["tolerance"] <= rows


def test_of_refined_tokens_the_points_are_those_of_the_rows(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    plain, value = (
        measure(small_run, imagenet_sample / "val", tmp_path / f"{steps}", limit=2, tolerance_images=2, refine=steps) for steps in (0, 12)
    )
    assert value["rows"]["rectified"]["psnr_db"] > plain["rows"]["rectified"]["psnr_db"] + 0.01
    for row in ("quantized", "rectified"):
        assert value["tolerance"]["marks"][row]["psnr_db"] == pytest.approx(value["rows"][row]["psnr_db"], abs=1e-3)


def test_without_a_decoder_metric_its_curve_is_missing_with_the_reason(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = measure(small_run, imagenet_sample / "val", tmp_path / "out", tolerance_images=2)
    assert value["tolerance"]["images"] == 2
    assert value["tolerance"]["decoder"] is None
    assert "no curve in the decoder's metric: the transform standardize" in value["notes"]["tolerance"]


def test_it_can_be_left_out(small_run: Path, imagenet_sample: Path, tmp_path: Path, revq_cli: Callable[..., Any]) -> None:
    assert measure(small_run, imagenet_sample / "val", tmp_path / "out", tolerance=False)["tolerance"] is None
    options = ["--limit", 6, "--no-tolerance", "--no-download", "--device", "cpu", "--json"]
    again = revq_cli("evaluate", small_run, imagenet_sample / "val", tmp_path / "out", *options)
    assert "nothing to do" in again.stderr  # the same evaluation
    assert json.loads(again.stdout)["tolerance"] is None
