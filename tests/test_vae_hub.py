"""What naming a repository fetches: real files, a hub on loopback, the hub's own client, and the cache it leaves for offline use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hub_server import Hub, serve

from revq import FrozenVAE

WEIGHTS = "diffusion_pytorch_model"
# The listing of a real pipeline, but for its VAE: every precision and format of everything, and other VAEs beside it.
PIPELINE = {
    "": "model_index.json README.md sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors",
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json vocab.json",
    "text_encoder": "config.json model.safetensors model.fp16.safetensors model.onnx openvino_model.xml openvino_model.bin",
    "unet": "config.json diffusion_pytorch_model.safetensors diffusion_pytorch_model.fp16.safetensors diffusion_pytorch_model.non_ema.safetensors"
    " diffusion_pytorch_model-00001-of-00002.safetensors diffusion_pytorch_model.safetensors.index.json diffusion_flax_model.msgpack",
    "vae": "diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.bin diffusion_pytorch_model.non_ema.safetensors diffusion_flax_model.msgpack",
    "vae_1_0": "config.json diffusion_pytorch_model.safetensors diffusion_pytorch_model.fp16.safetensors",
    "vae_decoder": "config.json model.onnx openvino_model.xml",
    "vae_encoder": "config.json model.onnx",
    "vae/onnx": "config.json diffusion_pytorch_model.safetensors",
}


def tiny(seed: int = 0) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32, **blocks)


def save_all(folder: Path, *, seed: int = 0) -> None:
    """Full precision and fp16, in one file each, and pickled."""
    network = tiny(seed)
    network.save_pretrained(folder)
    tiny(seed).half().save_pretrained(folder, variant="fp16")


def make_repositories(root: Path) -> None:
    root.mkdir()
    pipeline = root / "stable" / "xl@main"
    for folder, names in PIPELINE.items():
        (pipeline / folder).mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (pipeline / folder / name).write_text("not to be fetched")
    save_all(pipeline / "vae")
    save_all(root / "plain" / "vae@main")
    save_all(root / "plain" / "vae@v2", seed=1)
    tiny().save_pretrained(root / "plain" / "shards@main", max_shard_size="15KB")
    tiny().half().save_pretrained(root / "plain" / "shards@main", variant="fp16", max_shard_size="10KB")
    tiny().half().save_pretrained(root / "plain" / "half@main" / "vae", variant="fp16")
    tiny().save_pretrained(root / "plain" / "pickled@main", safe_serialization=False)
    both = root / "plain" / "both@main"
    tiny().save_pretrained(both)
    tiny(1).save_pretrained(both / "vae")
    language = root / "plain" / "language@main"
    tiny().save_pretrained(language / "vae")
    (language / "config.json").write_text(json.dumps({"model_type": "llama"}))
    unet = root / "plain" / "unet@main"
    unet.mkdir()
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (unet / f"{WEIGHTS}.safetensors").write_text("gigabytes")
    shutil.copytree(root / "plain" / "shards@main", root / "plain" / "cut@main")
    next((root / "plain" / "cut@main").glob(f"{WEIGHTS}-00002*")).unlink()


LOAD = """
import json, sys
from revq import FrozenVAE
from revq.errors import VAEError

answers = {}
for spec in sys.argv[1:]:
    name, _, revision = spec.partition("@")
    try:
        answers[spec] = FrozenVAE.load(name, revision=revision or None).identity()
    except VAEError as error:
        answers[spec] = {"error": str(error)}
print(json.dumps(answers))
"""
SPECS = ["stable/xl", "plain/vae", "plain/vae@v2", "plain/shards", "plain/half", "plain/pickled", "plain/both", "plain/language", "plain/unet",
         "plain/cut", "plain/nothing", "plain/vae@v3"]  # fmt: skip


def load_all(home: Path, *, url: str, offline: bool) -> dict[str, Any]:
    """identity() by spec, or its error, in a process whose hub is at `url`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, *SPECS], capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@dataclass(frozen=True)
class Fetched:
    root: Path
    hub: Hub
    online: dict[str, Any]
    offline: dict[str, Any]
    gone: dict[str, Any]


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """Every repository loaded from the hub, again offline, and again from a hub that does not answer."""
    folder = tmp_path_factory.mktemp("hub")
    make_repositories(folder / "repositories")
    with serve(folder / "repositories") as hub:
        online = load_all(folder / "home", url=hub.url, offline=False)
    offline = load_all(folder / "home", url=hub.url, offline=True)
    gone = load_all(folder / "home", url=hub.url, offline=False)
    return Fetched(folder / "repositories", hub, online, offline, gone)


@pytest.mark.parametrize(
    ("repo", "files"),
    [
        ("stable/xl", {"vae/config.json", f"vae/{WEIGHTS}.safetensors"}),
        ("plain/vae", {"config.json", f"{WEIGHTS}.safetensors"}),
        ("plain/half", {"vae/config.json", f"vae/{WEIGHTS}.fp16.safetensors"}),
        ("plain/both", {"config.json", f"{WEIGHTS}.safetensors"}),
        ("plain/language", {"config.json", "vae/config.json", f"vae/{WEIGHTS}.safetensors"}),
        ("plain/pickled", {"config.json"}),
        ("plain/unet", {"config.json"}),
    ],
)
def test_a_name_fetches_the_config_and_one_set_of_weights_and_nothing_else(fetched: Fetched, repo: str, files: set[str]) -> None:
    assert fetched.hub.taken_of(repo) == files


def test_shards_are_fetched_with_their_index_in_one_precision(fetched: Fetched) -> None:
    folder = fetched.root / "plain" / "shards@main"
    shards = {path.name for path in folder.glob(f"{WEIGHTS}-*.safetensors")}
    assert len(shards) > 2
    assert fetched.hub.taken_of("plain/shards") == {"config.json", f"{WEIGHTS}.safetensors.index.json", *shards}
    assert fetched.online["plain/shards"]["fingerprint"] == fetched.online["plain/vae"]["fingerprint"]


@pytest.mark.parametrize("spec", ["stable/xl", "plain/vae", "plain/vae@v2", "plain/shards", "plain/half", "plain/both", "plain/language"])
def test_what_comes_from_the_hub_is_the_vae_of_the_folder_at_its_commit_online_and_offline(fetched: Fetched, spec: str) -> None:
    repo, _, revision = spec.partition("@")
    local = FrozenVAE.load(str(fetched.root / f"{repo}@{revision or 'main'}"))
    expected = {**local.identity(), "id": repo, "revision": fetched.hub.commit(repo, revision or "main")}
    assert fetched.online[spec] == expected
    assert fetched.offline[spec] == expected
    assert fetched.gone[spec] == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("plain/pickled", f"has its weights only as {WEIGHTS}.bin: revq never unpickles weights"),
        ("plain/pickled", "diffusers.AutoencoderKL.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW), and pass --vae NEW"),
        ("plain/unet", "names the class UNet2DModel, which has no encode and decode"),
        ("plain/cut", f"lacks {WEIGHTS}-00002-of-"),
        ("plain/nothing", "is no local folder and cannot be had from the model hub"),
        ("plain/vae@v3", "is no local folder and cannot be had from the model hub"),
    ],
)
def test_a_repository_that_has_no_such_vae_is_answered_in_one_line(fetched: Fetched, spec: str, message: str) -> None:
    error = fetched.online[spec]["error"]
    assert message in error
    assert "\n" not in error


def test_what_is_not_in_the_cache_cannot_be_had_offline_and_the_message_says_what_can(fetched: Fetched) -> None:
    for answers in (fetched.offline, fetched.gone):
        assert "pass --vae a local folder in diffusers' format, FILE.py:FACTORY, or the embedded revq-tiny-f8c8" in answers["plain/nothing"]["error"]
