"""The tolerance curve on real photographs through a real VAE: it falls, its points are the evaluation's own, and its noise is reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from revq.models.tokenizer import ReVQTokenizer
from revq.stages.evaluate import EvaluateConfig, evaluate
from revq.stages.events import run_quietly
from revq.stages.tolerance import LEVELS


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


def test_without_a_decoder_metric_its_curve_is_missing_with_the_reason(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    value = measure(small_run, imagenet_sample / "val", tmp_path / "out", tolerance_images=2)
    assert value["tolerance"]["images"] == 2
    assert value["tolerance"]["decoder"] is None
    assert "no curve in the decoder's metric: the transform standardize" in value["notes"]["tolerance"]


def test_it_can_be_switched_off(small_run: Path, imagenet_sample: Path, tmp_path: Path) -> None:
    assert measure(small_run, imagenet_sample / "val", tmp_path / "out", tolerance_images=0)["tolerance"] is None
