"""README.md does what it says: its commands and its Python are run here, with other paths and sizes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from revq.cache.sources import open_source

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What stands there, and what a test can afford: other images, the embedded VAE, fewer and smaller of everything, no network.
SMALLER = {
    "imagenet/train": "photographs:train",
    "imagenet/val": "photographs:held-out",
    "--vae mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers": "--vae revq-tiny-f8c8 --image-size 64 --limit 24",
    "--tokens 512 --codes 16384": "--tokens 64 --codes 16 --calibration-samples 8",
    "--epochs 100 --decoder-steps 2000": "--epochs 2 --batch-size 8 --decoder-steps 2 --decoder-batch-size 4 --width 32 --depth 1 --codebook-lr 0",
    "run imagenet/val evaluation": "run imagenet/val evaluation --limit 4 --tolerance-images 1 --no-download",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, revq_cli: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """The folder in which the README's commands were run, in their order."""
    folder = tmp_path_factory.mktemp("readme")
    commands = [line for line in "".join(blocks("")).splitlines() if line.startswith("revq ")]
    assert [line.split()[1] for line in commands] == ["encode-latents", "fit-codebooks", "train-rectifier", "evaluate"]
    for line in commands:
        for there, here in reversed(SMALLER.items()):
            line = line.replace(there, here)
        assert "imagenet" not in line
        revq_cli(*shlex.split(line)[1:], cwd=folder, fresh=True)
    return folder


def test_the_four_commands_make_a_tokenizer_and_a_report(made: Path):
    assert (made / "run" / "tokenizer" / "model.safetensors").is_file()
    assert "rectified" in (made / "evaluation" / "report.html").read_text()


def test_the_python_turns_a_photograph_into_tokens_and_back(made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(made)
    photograph = open_source("photographs:held-out").read(0)
    Path("photo.jpg").write_bytes(photograph)
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code.replace('device="cuda"', 'device="cpu"'), "README.md", "exec"), names)
    assert names["indices"].shape == (1, 64)  # type: ignore[attr-defined]
    decoded = np.asarray(Image.open("decoded.png"))
    assert decoded.shape == (64, 64, 3)
    assert np.abs(decoded.transpose(2, 0, 1) - names["pixels"].astype(float)).mean() < 40  # type: ignore[attr-defined]


def test_every_target_of_make_that_is_named_is_there():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md", "docs/quickstart.md"):
        named = set(re.findall(r"\bmake (\w+)", "\n".join(re.findall(r"`[^`]+`|^(?:    )?make .*", (ROOT / name).read_text(), re.MULTILINE))))
        assert named, name
        assert named <= targets, name
