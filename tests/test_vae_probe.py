"""What would fail at the end fails at the start: a VAE whose pictures do not come back is told what is wrong with it, and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from test_vae import save_tiny

from revq import FrozenVAE
from revq.errors import MismatchError, VAEError
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly

SIZE_ADVICE = "--image-size"


def kl(levels: int = 2, **changes: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    settings = {"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 4, **blocks, **changes}
    return diffusers.AutoencoderKL(**settings)


def tiny(levels: int = 4) -> diffusers.AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * levels, "decoder_block_out_channels": (8,) * levels}
    return diffusers.AutoencoderTiny(**widths, num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels, latent_channels=4)


def temporal() -> diffusers.AutoencoderKLTemporalDecoder:
    return diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), latent_channels=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
    )


def video() -> diffusers.AutoencoderKLWan:
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    return diffusers.AutoencoderKLWan(**sizes, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def refused(network: torch.nn.Module, image_size: int) -> str:
    vae = FrozenVAE(network, vae_id="mine", revision=None, config_sha256="")
    with pytest.raises(VAEError) as caught:
        vae.latent_shape(image_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("make", [lambda: kl(4), tiny], ids=["AutoencoderKL", "AutoencoderTiny"])
def test_a_size_whose_pictures_come_back_larger_or_smaller_names_the_sizes_that_do(make: Any) -> None:
    assert "choose --image-size 56 or 64" in refused(make(), 60)
    assert "choose --image-size 8" in refused(make(), 3)
    for good in (56, 64):
        assert FrozenVAE(make(), vae_id="mine", revision=None, config_sha256="").latent_shape(good) == (4, good // 8, good // 8)


class NeedsMultiplesOf(torch.nn.Module):
    """Folds `side` pixels into channels, and refuses what does not divide."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_unshuffle(images, self.side)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pixel_shuffle(latents, self.side)


def test_an_encoder_that_refuses_a_size_names_the_nearest_that_it_takes() -> None:
    assert "choose --image-size 224 or 256" in refused(NeedsMultiplesOf(32), 250)
    assert "choose --image-size 238 or 252" in refused(NeedsMultiplesOf(14), 250)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kl(out_channels=6), r"an image of shape (1, 3, 64, 64) comes back as (1, 6, 64, 64)"),
        (lambda: kl(in_channels=1, out_channels=1), "takes images of 1 channel; revq needs one of RGB images"),
        (lambda: kl(in_channels=4, out_channels=4), "takes images of 4 channels; revq needs one of RGB images"),
        (temporal, "missing 1 required positional argument: 'num_frames'"),
        (video, "takes videos, tensors with a time axis (B,3,T,S,S)"),
    ],
    ids=["six channels out", "one channel", "four channels", "a decoder of frames", "a time axis"],
)
def test_what_is_no_trouble_of_the_size_is_not_answered_with_advice_on_it(make: Any, message: str) -> None:
    said = refused(make(), 64)
    assert message in said
    assert SIZE_ADVICE not in said


def test_weights_that_overflow_are_told_at_the_probe(tmp_path: Path) -> None:
    network = kl()
    with torch.no_grad():
        network.decoder.conv_out.bias[0] = float("inf")
    said = refused(network, 64)
    assert "it decodes a grey image to values that are not finite" in said
    assert SIZE_ADVICE not in said


def test_a_folder_of_a_unet_is_told_to_have_no_encode_and_decode(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, **blocks).save_pretrained(tmp_path)
    with pytest.raises(VAEError, match="UNet2DModel, which has no encode and decode"):
        FrozenVAE.load(str(tmp_path))


PLUGIN = """
from collections import namedtuple
from dataclasses import dataclass

import torch


class Posterior:  # as CompVis' autoencoders return it
    def __init__(self, mean):
        self.mean = mean

    def sample(self):
        return self.mean + torch.randn_like(self.mean)

    def mode(self):
        return self.mean


class SampleOnly:
    def sample(self):
        return torch.zeros(1, 4, 8, 8)


@dataclass
class Latents:
    latents: torch.Tensor


Named = namedtuple("Named", "latents loss")


class Mine(torch.nn.Module):
    def encode(self, images):
        z = torch.nn.functional.pixel_unshuffle(images, 8)
        return {encoded}

    def decode(self, z):
        pictures = torch.nn.functional.pixel_shuffle(z, 8)
        return {decoded}


def load():
    return Mine()
"""


def plugin(folder: Path, encoded: str = "z", decoded: str = "pictures") -> str:
    (folder / "mine.py").write_text(PLUGIN.replace("{encoded}", encoded).replace("{decoded}", decoded))
    return f"{folder / 'mine.py'}:load"


@pytest.mark.parametrize(
    ("encoded", "decoded"),
    [
        ("Posterior(z)", "pictures"),
        ("(Posterior(z),)", "(pictures,)"),
        ("(z,)", "[pictures]"),
        ("{'latents': z}", "{'sample': pictures}"),
        ("{'latent_dist': Posterior(z), 'loss': 0}", "pictures"),
        ("Latents(z)", "pictures"),
        ("Named(z, 0.0)", "pictures"),
    ],
)
def test_what_can_be_read_in_one_way_is_read(tmp_path: Path, encoded: str, decoded: str) -> None:
    vae = FrozenVAE.load(plugin(tmp_path, encoded, decoded))
    assert vae.latent_shape(64) == (192, 8, 8)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(vae.decode(vae.encode(images)), images)


@pytest.mark.parametrize(
    ("encoded", "decoded", "message"),
    [
        ("(z, 0.0, None)", "pictures", "encode returns a tuple of 3 (Tensor, float, NoneType); revq reads a tensor"),
        ("{'z': z}", "pictures", "encode returns a dict with z"),
        ("{'latents': z, 'latent': 2 * z}", "pictures", "encode returns a dict with latents, latent"),
        ("SampleOnly()", "pictures", "encode returns a SampleOnly; revq reads a tensor, a posterior with mode()"),
        ("None", "pictures", "encode returns a NoneType"),
        ("z", "(pictures, z)", "decode returns a tuple of 2 (Tensor, Tensor); revq reads a tensor"),
        ("z", "{'image': pictures}", "decode returns a dict with image"),
        ("z.unsqueeze(2)", "pictures", "latents of shape (1, 192, 1, 8, 8), with a time axis"),
        ("z.flatten(2)", "pictures", "latents of shape (1, 192, 64); revq needs (B,C,H,W)"),
        ("z", "pictures[:, :1]", "comes back as (1, 1, 64, 64)"),
        ("z", "1 / 0", "its decode fails on a tensor of shape (1, 192, 8, 8) (ZeroDivisionError: division by zero)"),
        ("images.nothing", "pictures", "its encode fails on a tensor of shape (1, 3, 64, 64) (AttributeError:"),
    ],
)
def test_what_cannot_is_refused_by_the_first_stage_before_it_makes_a_store(
    tmp_path: Path, imagenet_sample: Path, encoded: str, decoded: str, message: str
) -> None:
    store = tmp_path / "latents.zarr"
    config = EncodeLatentsConfig(
        images=str(imagenet_sample / "val"), store=str(store), vae=plugin(tmp_path, encoded, decoded), image_size=64, limit=4, device="cpu"
    )
    with pytest.raises(VAEError) as caught:
        run_quietly(encode_latents(config))
    assert message in str(caught.value)
    assert SIZE_ADVICE not in str(caught.value)
    assert not store.exists()


def test_a_decoder_without_gradients_is_named_where_they_are_needed(tmp_path: Path) -> None:
    vae = FrozenVAE.load(plugin(tmp_path, decoded="pictures.detach()"))
    assert vae.latent_shape(64) == (192, 8, 8)
    with pytest.raises(VAEError, match=r"gives no gradients .*--transform pca or standardize"):
        vae.decode(torch.zeros(1, 192, 8, 8, requires_grad=True))


def test_a_factory_that_makes_weights_up_is_refused_at_the_first_load(tmp_path: Path) -> None:
    spec = plugin(tmp_path)
    made_up = "network = Mine()\n    network.bias = torch.nn.Parameter(torch.rand(3))\n    return network"
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("return Mine()", made_up))
    with pytest.raises(VAEError, match="gives other weights at each call"):
        FrozenVAE.load(spec)


def test_a_mismatch_in_the_weights_alone_says_so(tmp_path: Path) -> None:
    spec = plugin(tmp_path)
    source = Path(tmp_path / "mine.py").read_text()
    bias = f"network = Mine()\n    network.bias = torch.nn.Parameter(torch.load({str(tmp_path / 'b.pt')!r}))\n    return network"
    (tmp_path / "mine.py").write_text(source.replace("return Mine()", bias))
    torch.save(torch.zeros(1), tmp_path / "b.pt")
    identity = FrozenVAE.load(spec).identity()
    torch.save(torch.ones(1), tmp_path / "b.pt")
    with pytest.raises(MismatchError, match=r"the weights alone are others \(does the plug-in load them all\?\)"):
        FrozenVAE.load_recorded(identity)


def test_a_good_vae_in_a_folder_passes_the_first_stage_as_before(tmp_path: Path) -> None:
    assert FrozenVAE.load(str(save_tiny(kl(), tmp_path / "kl"))).latent_shape(64) == (4, 32, 32)


class Moody(NeedsMultiplesOf):
    """Changes what `encode` or `decode` gives by `how`."""

    def __init__(self, where: str, how: Any) -> None:
        super().__init__(4)
        inner = getattr(self, where)
        setattr(self, where, lambda given: how(given, inner(given)))


def one_at_a_time(given: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    assert len(given) == 1, "one at a time"
    return result


MOODS = {
    "gives something else each time": lambda given, result: result + 1e-3 * torch.randn_like(result),
    "gives something else for an image beside another one": lambda given, result: result - result.mean(0, keepdim=True) * (len(given) > 1),
    "fails on a tensor of shape (2,": one_at_a_time,
    "of a batch of two, and": lambda given, result: result[:1],
}


@pytest.mark.parametrize("where", ["encode", "decode"])
@pytest.mark.parametrize("told", MOODS)
def test_a_vae_that_has_no_one_answer_for_an_image_or_takes_one_alone_is_refused(where: str, told: str) -> None:
    message = refused(Moody(where, MOODS[told]), 64)
    assert message.startswith(f"VAE mine cannot be used: its {where} ")
    assert told in message


def test_a_plug_in_that_exits_is_an_error_and_no_success(tmp_path: Path) -> None:
    (tmp_path / "p.py").write_text("import sys\n\n\ndef load():\n    sys.exit(0)\n")
    with pytest.raises(VAEError, match=r"p\.py:load failed with SystemExit: 0"):
        FrozenVAE.load(f"{tmp_path / 'p.py'}:load")
