"""FrozenVAE: every way to load one, and what it does when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from revq import FrozenVAE
from revq.errors import MismatchError, VAEError


def save_tiny(network: torch.nn.Module, folder: Path) -> Path:
    network.save_pretrained(folder)
    return folder


def tiny_kl() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, **blocks)


def test_the_taef2_plug_in_has_the_shape_of_the_papers_latents_and_gives_pictures_back(taef2: str, imagenet_sample: Path) -> None:
    from revq.cache.images import load_pixels

    vae = FrozenVAE.load(taef2)
    assert vae.latent_shape(64) == (32, 8, 8)
    paths = sorted(imagenet_sample.glob("val/*/*"))[:16]
    images = torch.stack([torch.from_numpy(load_pixels(path.read_bytes(), 64).array) for path in paths]) / 127.5 - 1
    with torch.no_grad():
        error = (vae.decode(vae.encode(images)) - images).div(2).square().flatten(1).mean(1)
    assert float(-10 * torch.log10(error).mean()) > 24


def test_a_posterior_gives_its_mode_so_that_encoding_repeats_bit_for_bit(tmp_path: Path) -> None:
    vae = FrozenVAE.load(str(save_tiny(tiny_kl(), tmp_path / "kl")))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(vae.encode(images), vae.encode(images))
    assert vae.encode(images).shape == (2, 4, 16, 16)
    assert vae.class_name == "AutoencoderKL"


def test_an_autoencoder_tiny_loads_too_and_decodes_into_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    network = diffusers.AutoencoderTiny(**sizes, latent_channels=4)
    vae = FrozenVAE.load(str(save_tiny(network, tmp_path / "tiny")))
    images = vae.decode(100 * torch.randn(1, 4, 8, 8))
    assert images.shape == (1, 3, 16, 16)
    assert float(images.abs().max()) <= 1


def test_the_embedded_vae_loads_by_its_name_and_keeps_a_photograph_recognisable() -> None:
    from skimage import data

    vae = FrozenVAE.load("revq-tiny-f8c8")
    assert vae.latent_shape(128) == (8, 16, 16)
    photograph = torch.from_numpy(data.coffee()[:384, :384].copy()).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(photograph, (128, 128), mode="bilinear", antialias=True) / 127.5 - 1
    with torch.no_grad():
        error = (vae.decode(vae.encode(image)) - image).div(2).square().mean()
    assert float(-10 * torch.log10(error)) > 24


def test_the_same_weights_in_another_folder_and_file_type_have_the_same_fingerprint(tmp_path: Path) -> None:
    first = save_tiny(tiny_kl(), tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "elsewhere" / "second"))
    assert FrozenVAE.load(str(first)).fingerprint == FrozenVAE.load(str(second)).fingerprint


def test_other_weights_have_another_fingerprint_and_are_refused_by_name(tmp_path: Path) -> None:
    first = FrozenVAE.load(str(save_tiny(tiny_kl(), tmp_path / "first")))
    network = tiny_kl()
    with torch.no_grad():
        next(network.parameters()).flatten()[0] += 1e-3
    second = FrozenVAE.load(str(save_tiny(network, tmp_path / "second")))
    with pytest.raises(MismatchError, match=f"{first.fingerprint}.*{second.fingerprint}"):
        second.require(first.identity())


def test_a_pipeline_folder_with_a_vae_inside_is_taken(tmp_path: Path) -> None:
    save_tiny(tiny_kl(), tmp_path / "pipeline" / "vae")
    assert FrozenVAE.load(str(tmp_path / "pipeline")).latent_shape(32) == (4, 16, 16)


def test_gradients_flow_through_the_frozen_decoder_but_not_into_its_weights(taef2: str) -> None:
    vae = FrozenVAE.load(taef2)
    latents = (0.1 * torch.randn(1, 32, 8, 8)).requires_grad_()
    vae.decode(latents).sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_a_vae_that_is_nowhere_says_how_to_pass_a_local_one() -> None:
    with pytest.raises(VAEError, match=r"no-one/nothing.*--vae a local folder"):
        FrozenVAE.load("no-one/nothing")


def test_a_class_that_diffusers_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOfTheFuture"}))
    with pytest.raises(VAEError, match="AutoencoderOfTheFuture"):
        FrozenVAE.load(str(tmp_path))


def test_damaged_weights_are_an_error_and_never_random(tmp_path: Path) -> None:
    folder = save_tiny(tiny_kl(), tmp_path / "kl")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(VAEError, match="cannot be loaded"):
        FrozenVAE.load(str(folder))
    weights.unlink()
    with pytest.raises(VAEError, match=r"has no weights: expected diffusion_pytorch_model\.safetensors"):
        FrozenVAE.load(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [("def load(): return 3", "not int"), ("def load(): raise ValueError('broken inside')", "broken inside"), ("other = 1", "load")],
    ids=["no module", "raises", "no factory"],
)
def test_a_plug_in_that_does_not_work_is_named_with_its_reason(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(VAEError, match=message):
        FrozenVAE.load(f"{tmp_path / 'mine.py'}:load")


def test_a_missing_plug_in_file_is_named() -> None:
    with pytest.raises(VAEError, match=r"nowhere\.py does not exist"):
        FrozenVAE.load("nowhere.py:load")
