"""fit-codebooks on latents, decoders and settings that are odd or wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from test_fit_codebooks import config, latent_error

from revq import LatentStore
from revq.cache.batches import ResidentLatents
from revq.errors import CodebookError, ConfigError, StoreError
from revq.models.codebooks import load_codebooks
from revq.models.quantizer import MultiGroupQuantizer
from revq.stages.configs import EncodeLatentsConfig, FitCodebooksConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import Note, run_quietly
from revq.stages.fit_codebooks import fit_codebooks

PLAIN_VAE = """
import torch, torch.nn.functional as F

class Means(torch.nn.Module):
    \"\"\"Colours of 8 x 8 squares; twice their mean, which the decoder ignores; and a channel that is always one.\"\"\"

    def encode(self, images):
        colours = F.avg_pool2d(images, 8)
        return torch.cat([colours, 2 * colours.mean(1, keepdim=True), torch.ones_like(colours[:, :1])], 1)

    def decode(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=8)

class Grey(Means):
    def encode(self, images):
        return torch.full_like(F.avg_pool2d(images, 8), 0.25)

class Blind(Means):
    def decode(self, latents):
        return F.interpolate(0 * latents[:, :3], scale_factor=8)

class Dim(Means):
    def decode(self, latents):
        return super().decode(latents) / 2

class Dimmer(Means):
    def decode(self, latents):
        return super().decode(latents) / 64
"""


def test_latents_that_do_not_fit_in_memory_give_the_same_codebooks_bit_for_bit(
    small_store: Path, taef2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(name: str) -> bytes:
        settings = {"tokens": 512, "codes": 8, "iterations": 2, "transform": "decoder", "calibration_samples": 20, "vae": taef2}
        run_quietly(fit_codebooks(FitCodebooksConfig(store=str(small_store), out=str(tmp_path / name), **settings)))  # type: ignore[arg-type]
        return (tmp_path / name / "codebooks.safetensors").read_bytes()

    resident = fit("resident")
    held = []
    read = ResidentLatents._read
    monkeypatch.setattr(ResidentLatents, "_read", lambda self, split: held.append(len(self)) or read(self, split))
    monkeypatch.setattr("revq.cache.batches._free_host_bytes", lambda: 0)
    assert fit("streamed") == resident
    assert max(held) <= 20  # the calibration's alone


def test_the_axes_do_not_depend_on_how_bright_the_decoders_pictures_are(tmp_path: Path, imagenet_sample: Path) -> None:
    found = []
    for factory in ("Dim", "Dimmer"):
        store = encode_with(factory, tmp_path, imagenet_sample / "val")
        settings = {"tokens": 64, "codes": 8, "iterations": 2, "transform": "decoder", "calibration_samples": 64}
        run_quietly(fit_codebooks(FitCodebooksConfig(store=str(store), out=str(tmp_path / factory / "codebooks"), **settings)))  # type: ignore[arg-type]
        found.append(load_codebooks(tmp_path / factory / "codebooks").transform)
    dim, dimmer = found
    assert torch.allclose(dim.scale, dimmer.scale, rtol=1e-4)
    metrics = [transform.axes.T @ transform.axes for transform in found if transform.axes is not None]  # the axes' signs are free
    assert torch.allclose(*metrics, atol=1e-3)


def encode_with(factory: str, tmp_path: Path, images: Path) -> Path:
    (tmp_path / "plain_vae.py").write_text(PLAIN_VAE)
    store = tmp_path / f"{factory}.zarr"
    settings = {"images": str(images), "vae": f"{tmp_path / 'plain_vae.py'}:{factory}", "image_size": 64, "limit": 60, "workers": 2}
    run_quietly(encode_latents(EncodeLatentsConfig(store=str(store), **settings)))  # type: ignore[arg-type]
    return store


@pytest.mark.parametrize("transform", ["decoder", "pca", "standardize"])
def test_constant_and_redundant_channels_and_those_the_decoder_ignores_are_fitted_all_the_same(
    transform: str, tmp_path: Path, imagenet_sample: Path
) -> None:
    store = encode_with("Means", tmp_path, imagenet_sample / "val")
    settings = config(store, tmp_path / "out", transform=transform, tokens=80, codes=16)
    notes = [event.text for event in fit_codebooks(settings) if isinstance(event, Note)]
    assert any("64 of 320 latent positions never vary" in note for note in notes)
    fitted = load_codebooks(tmp_path / "out")
    latents = ResidentLatents(LatentStore.open(store)["train"]).batch(torch.arange(60))
    quantizer = MultiGroupQuantizer(fitted.codebooks)
    quantized = fitted.transform.inverse(quantizer.decode(quantizer.encode(fitted.transform(latents)))).detach()
    assert torch.allclose(fitted.transform.inverse(fitted.transform(latents)), latents, atol=1e-3)
    assert float((quantized[:, 4] - 1).abs().max()) < 1e-3
    assert float((quantized[:, :3] - latents[:, :3]).square().mean()) < 0.5 * float(latents[:, :3].var())


def test_latents_that_are_all_the_same_leave_every_codebook_one_living_code_and_say_so(tmp_path: Path, imagenet_sample: Path) -> None:
    store = encode_with("Grey", tmp_path, imagenet_sample / "val")
    events = list(fit_codebooks(config(store, tmp_path / "out", transform="pca", tokens=48, codes=8)))
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any("336 codes in 48 of 48 codebooks are used by no latent" in note for note in notes)
    assert latent_error(store, load_codebooks(tmp_path / "out"), "train") < 1e-9


def test_a_decoder_that_ignores_its_latents_cannot_calibrate(tmp_path: Path, imagenet_sample: Path) -> None:
    store = encode_with("Blind", tmp_path, imagenet_sample / "val")
    with pytest.raises(CodebookError, match="--transform pca"):
        run_quietly(fit_codebooks(config(store, tmp_path / "out", transform="decoder", tokens=80, codes=8)))


def test_a_value_that_is_not_finite_in_the_store_is_named_by_its_row(tmp_path: Path, imagenet_sample: Path) -> None:
    store = encode_with("Means", tmp_path, imagenet_sample / "val")
    array = zarr.open_group(str(store / "train"), mode="r+", zarr_format=3)["latents"]
    array[17] = np.full(array.shape[1:], np.nan, array.dtype)
    with pytest.raises(StoreError, match='row 17 of split "train" is not finite'):
        run_quietly(fit_codebooks(config(store, tmp_path / "out", tokens=80, codes=8)))


def test_too_few_latents_for_the_codes_are_told_with_what_to_do(small_store: Path, tmp_path: Path) -> None:
    notes = [event.text for event in fit_codebooks(config(small_store, tmp_path / "out")) if isinstance(event, Note)]
    assert notes[0] == (
        "120 latents for 32 codes are 3.8 per code, FAISS advises 39; codes will suit unseen images less well: "
        "encode more images or --views, or take --codes 2 or fewer"
    )


@pytest.mark.parametrize("changes", [{"codes": 1}, {"tokens": 0}, {"transform": "fourier"}, {"backend": "gpu"}, {"rectifier_share": 1.0}], ids=str)
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes)).replace("_", "-")):
        config(Path("store"), Path("out"), **changes)
