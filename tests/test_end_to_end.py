"""The four commands from outside, on real photographs through a real VAE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def run(revq_cli: Command, *arguments: object) -> dict[str, Any]:
    """The result that the command prints as JSON."""
    return json.loads(revq_cli(*arguments, "--json", timeout=600).stdout)


@pytest.mark.timeout(900)
def test_the_four_commands_turn_a_vae_into_a_tokenizer_that_the_rectifier_improves(
    revq_cli: Command, imagenet_sample: Path, taef2: str, tmp_path: Path
) -> None:
    store, codebooks, out = tmp_path / "latents.zarr", tmp_path / "codebooks", tmp_path / "run"
    common = ["--vae", taef2, "--image-size", 64, "--workers", 2]
    train = run(revq_cli, "encode-latents", imagenet_sample / "train", store, *common, "--views", 2, "--limit", 300)
    val = run(revq_cli, "encode-latents", imagenet_sample / "val", store, *common, "--split", "val")
    assert (train["rows"], val["rows"], val["latent_shape"]) == (600, 100, [32, 8, 8])

    fitted = run(revq_cli, "fit-codebooks", store, codebooks, "--tokens", 512, "--codes", 64, "--transform", "pca", "--rectifier-share", 0.3)
    assert fitted["bits_per_image"] == 512 * 6

    training = ["--steps", 100, "--decoder-steps", 30, "--batch-size", 32, "--width", 64, "--depth", 2, "--block", "conv", "--codebook-lr", 0]
    trained = run(revq_cli, "train-rectifier", store, codebooks, out, *training, "--lr", 2e-3, "--ema", 0.98, "--evaluations", 4)
    assert Path(trained["tokenizer"]).is_dir()

    metrics = run(revq_cli, "evaluate", out, imagenet_sample / "val", tmp_path / "evaluation", "--no-download", "--workers", 2)
    rows = metrics["rows"]
    assert metrics["images"] == 100
    assert 25.5 < rows["vae"]["psnr_db"] < 28
    assert rows["quantized"]["psnr_db"] < rows["rectified"]["psnr_db"] < rows["vae"]["psnr_db"]
    assert rows["quantized"]["ssim"] < rows["vae"]["ssim"]
    assert (metrics["tokens_per_image"], metrics["bits_per_image"]) == (512, 512 * 6)
    assert set(metrics["fingerprints"]) >= {"tokenizer", "vae", "images"}
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["rows"] == rows
    for name in ("report.html", "report.md", "reconstructions.png"):
        assert (tmp_path / "evaluation" / name).stat().st_size > 1000
