"""What an evaluation holds in memory: a whole batch of crops, and the activations of a few of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from random_weights import save_random_inception, save_random_vgg16

# Each program prints how much memory it held, in MB, before its work, and the most during it. What libraries alone take differs by half a gigabyte
# among builds, and loading a network takes more than it does, so the bounds are of the difference.
HEAD = """
import sys
from pathlib import Path

import torch

def held_mb(kind):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind)) / 1000

def begin_mb():
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    return held_mb("VmRSS")
"""
EVALUATION = """
from revq.models.tokenizer import TOKENIZER_KIND, ReVQTokenizer
from revq.models.vae import FrozenVAE
from revq.stages.configs import EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.events import Begin

vae, images, folder = sys.argv[1:]
config = {"kind": TOKENIZER_KIND, "format_version": 1, "tokens": 512, "codes": 8, "transform": "standardize", "latent_shape": [32, 16, 16]}
rectifier = {"channels": 32, "width": 32, "depth": 1, "block": "conv"}
tokenizer = ReVQTokenizer({**config, "image_size": 128, "rectifier": rectifier, "vae": FrozenVAE.load(vae).identity()})
torch.nn.init.normal_(tokenizer.quantizer.codebooks)
tokenizer.save_pretrained(f"{folder}/tokenizer")
settings = {"limit": 64, "batch_size": 64, "workers": 2, "download": False, "device": "cpu", "cache": "off", "tolerance": False}
for event in evaluate(EvaluateConfig(tokenizer=f"{folder}/tokenizer", images=images, out=f"{folder}/out", **settings)):
    if isinstance(event, Begin) and event.task == "evaluate":
        before = begin_mb()
print(before, held_mb("VmHWM"))
"""
INCEPTION = """
from revq.stages.evaluation.inception import Inception

network = Inception(Path(sys.argv[1]), torch.device("cpu"))
network.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
before = begin_mb()
network.features(torch.zeros(24, 3, 64, 64, dtype=torch.uint8))
print(before, held_mb("VmHWM"))
"""
LPIPS = """
from revq.stages.evaluation.metrics import score_images
from revq.stages.evaluation.networks import Lpips

network = Lpips("vgg", Path(sys.argv[1]), torch.device("cpu"))
images = torch.zeros(24, 3, 256, 256, dtype=torch.uint8)
score_images({"a": images[:1]}, images[:1], {"lpips_vgg": network})
before = begin_mb()
score_images({"a": images}, images, {})
network.distances([images[:8]], images[:8])
print(before, held_mb("VmHWM"))
"""


def rise_mb(program: str, *arguments: object) -> float:
    """How much more memory the work takes than was held before it."""
    done = subprocess.run([sys.executable, "-c", HEAD + program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert 100 < before < after
    print(f"from {before:.0f} to {after:.0f} MB")
    return after - before


@pytest.mark.usefixtures("empty_torch_home")
def test_a_batch_of_64_pictures_goes_through_the_decoder_in_parts(taef2: str, imagenet_sample: Path, tmp_path: Path) -> None:
    assert rise_mb(EVALUATION, taef2, imagenet_sample / "val", tmp_path) < 650


def test_inception_takes_a_few_pictures_at_once(tmp_path: Path) -> None:
    assert rise_mb(INCEPTION, save_random_inception(tmp_path / "inception.pth")) < 200


def test_lpips_and_ssim_take_a_few_pictures_at_once(empty_torch_home: Path) -> None:
    save_random_vgg16(empty_torch_home)
    assert rise_mb(LPIPS, next(empty_torch_home.rglob("vgg16*.pth"))) < 400
