"""The perceptual term of the decoder phase: what it adds, that it is minimised, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from revq.errors import ConfigError, OutputError
from revq.models.tokenizer import ReVQTokenizer
from revq.stages.configs import TrainRectifierConfig
from revq.stages.evaluation.metrics import to_signed
from revq.stages.evaluation.networks import Lpips
from revq.stages.events import run_quietly
from revq.stages.train_rectifier import train_rectifier
from revq.stages.training.losses import PixelLoss
from revq.stages.training.perceptual import open_perceptual

CPU = torch.device("cpu")
COARSE = """
import torch.nn.functional as F

class Coarse:
    def features(self, images):
        return F.avg_pool2d(images, 16).flatten(1)

def make():
    return Coarse()
"""


@pytest.fixture
def coarse(tmp_path: Path) -> str:
    """A network whose features are the picture in 16 times fewer pixels."""
    (tmp_path / "coarse.py").write_text(COARSE)
    return f"{tmp_path / 'coarse.py'}:make"


def config_for(store: Path, codebooks: Path, out: Path, **settings: object) -> TrainRectifierConfig:
    common = {"steps": 2, "decoder_steps": 6, "batch_size": 8, "decoder_batch_size": 8, "width": 32, "depth": 1, "evaluations": 2, "codebook_lr": 0.0}
    return TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=str(out), **{**common, "lr": 2e-3, **settings})  # type: ignore[arg-type]


def test_the_loss_is_squared_error_and_the_weighted_distance_of_the_networks_features(tokenizer: ReVQTokenizer, images: Tensor, coarse: str) -> None:
    latents = tokenizer.vae.encode(images)
    rectified = tokenizer.transform.standardize(latents) + 0.1
    common = {"vae": tokenizer.vae, "transform": tokenizer.transform, "micro_batch": 4}
    plain = PixelLoss(**common)(rectified, latents)  # type: ignore[arg-type]
    both = PixelLoss(**common, perceptual=open_perceptual(coarse, CPU), perceptual_weight=0.5)(rectified, latents)  # type: ignore[arg-type]
    decoded, target = (tokenizer.vae.decode(each) for each in (tokenizer.transform.unstandardize(rectified), latents))
    ours, theirs = (F.normalize(F.avg_pool2d((each + 1) * 127.5, 16).flatten(1), dim=1) for each in (decoded, target))
    assert plain.item() == pytest.approx(F.mse_loss(decoded, target).item() / 4, rel=1e-5)
    assert both.item() == pytest.approx(plain.item() + 0.5 * (ours - theirs).square().sum(1).mean().item(), rel=1e-4)
    assert both > plain


def test_lpips_as_a_term_is_lpips_as_it_is_measured_and_has_a_gradient(
    judging_networks: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(judging_networks.parent.parent))
    term = open_perceptual("lpips-vgg", CPU)
    pixels = ((images[:2] + 1) * 127.5).round().to(torch.uint8)
    (measured,) = Lpips("vgg", judging_networks / "revq-lpips-vgg16.safetensors", CPU).distances([pixels.flip(3)], pixels)
    decoded = to_signed(pixels.flip(3)).requires_grad_()
    distance = term(decoded, to_signed(pixels))
    distance.backward()
    assert distance.item() == pytest.approx(measured.mean().item(), rel=1e-5)
    assert decoded.grad is not None
    assert decoded.grad.abs().sum() > 0
    with pytest.raises(ConfigError, match="needs pictures of at least 32 px, and these have 16"):
        term(to_signed(pixels[..., :16, :16]), to_signed(pixels[..., :16, :16]))


def test_the_decoder_phase_minimises_the_term_too_and_is_another_run(
    small_store: Path, small_codebooks: Path, coarse: str, images: Tensor, tmp_path: Path
) -> None:
    run_quietly(train_rectifier(config_for(small_store, small_codebooks, tmp_path / "plain")))
    assert "perceptual" not in json.loads((tmp_path / "plain" / "config.json").read_text())["identity"]
    with pytest.raises(OutputError, match="perceptual"):
        run_quietly(train_rectifier(config_for(small_store, small_codebooks, tmp_path / "plain", perceptual=coarse)))
    settings = {"perceptual": coarse, "perceptual_weight": 1000.0, "decoder_steps": 30}
    run_quietly(train_rectifier(config_for(small_store, small_codebooks, tmp_path / "heavy", **settings)))
    run_quietly(train_rectifier(config_for(small_store, small_codebooks, tmp_path / "squares", decoder_steps=30)))
    assert distance(tmp_path / "heavy", coarse, images) < 0.98 * distance(tmp_path / "squares", coarse, images)


def distance(run: Path, coarse: str, images: Tensor) -> float:
    """The term itself, of what the run's tokenizer makes of the pictures, from the VAE's own."""
    tokenizer = ReVQTokenizer.from_pretrained(run / "tokenizer")
    with torch.no_grad():
        return float(open_perceptual(coarse, CPU)(tokenizer.reconstruct(images), tokenizer.vae.decode(tokenizer.vae.encode(images))))


@dataclass(frozen=True)
class BadNetwork:
    """The body of a factory's class, and what the error must say."""

    id: str
    body: str
    message: str


BAD_NETWORKS = [
    BadNetwork("no method", "pass", r"made a Judge, which has no method features\(images\)"),
    BadNetwork("no gradient", "def features(self, images): return images.detach().flatten(1)", "features gives no gradients"),
    BadNetwork("one number", "def features(self, images): return images.mean()", r"features must give a tensor \(8,F\) for 8 images, and gave \(\)"),
]


@pytest.mark.parametrize("case", BAD_NETWORKS, ids=lambda case: case.id)
def test_a_network_that_cannot_train_is_one_line_before_the_first_step(
    case: BadNetwork, small_store: Path, small_codebooks: Path, tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text(f"class Judge:\n    {case.body}\n\ndef make():\n    return Judge()\n")
    settings = {"perceptual": f"{tmp_path / 'judge.py'}:make"}
    with pytest.raises(ConfigError, match=case.message) as caught:
        run_quietly(train_rectifier(config_for(small_store, small_codebooks, tmp_path / "run", **settings)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lpips-vgg", "--perceptual lpips-vgg: the weights of the VGG16 trunk of LPIPS are not in .* mend it with: revq weights"),
        ("efficientnet-lite2", "fetch them with: revq weights efficientnet-lite2"),
        ("resnet50", "--perceptual takes FILE.py:FACTORY"),
    ],
)
def test_a_network_whose_weights_are_not_here_says_how_to_get_them(spec: str, message: str, empty_torch_home: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_perceptual(spec, CPU)
