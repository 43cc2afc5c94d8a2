"""Several processes under torchrun: the first speaks, whole shards are shared out, and the bytes are those of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from test_store import contents

Run = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = ("--image-size", 64, "--limit", 40, "--shard-rows", 4, "--batch-size", 3, "--workers", 2, "--device", "cpu")


def test_of_several_ranks_only_the_first_speaks(torchrun: Run, small_store: Path) -> None:
    done = torchrun(2, "info", small_store)
    assert done.stdout.count("revq-latents") == 1


def test_two_ranks_write_the_bytes_of_one_process(torchrun: Run, revq_cli: Run, imagenet_sample: Path, taef2: str, tmp_path: Path) -> None:
    images = imagenet_sample / "val"
    revq_cli("encode-latents", images, tmp_path / "one", "--vae", taef2, *SETTINGS)
    done = torchrun(2, "encode-latents", images, tmp_path / "two", "--vae", taef2, *SETTINGS)
    assert "encode train (rank 0 of 2): 20 images" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def children(pid: int) -> list[int]:
    """Process ids of its children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_when_a_rank_dies_another_number_of_ranks_finishes_the_job(
    torchrun: Run, revq_cli: Run, python: str, imagenet_sample: Path, taef2: str, tmp_path: Path
) -> None:
    images, store = imagenet_sample / "val", tmp_path / "s"
    work = ["encode-latents", str(images), str(store), "--vae", taef2, *map(str, SETTINGS)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command = [sys.executable, *launcher, "--local-addr", "127.0.0.1", "-m", "revq", *work]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHON_EXEC": python}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list((store / "progress" / "train").glob("*.json"))) < 2:
            assert process.poll() is None, "it ended before a rank could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    finished = len(list((store / "progress" / "train").glob("*.json")))
    assert 2 <= finished < 10
    done = torchrun(3, *work)
    assert f"resuming: {4 * finished} of 40 rows are there" in done.stdout
    revq_cli("encode-latents", images, tmp_path / "one", "--vae", taef2, *SETTINGS)
    assert contents(tmp_path / "one") == contents(store)


def test_a_stages_error_on_several_ranks_ends_all_of_them(torchrun: Run, tmp_path: Path, taef2: str) -> None:
    done = torchrun(2, "encode-latents", tmp_path / "nowhere", tmp_path / "s", "--vae", taef2, check=1, timeout=120)
    assert "revq: error on rank 0: " in done.stderr
    assert "nowhere does not exist" in done.stderr
    assert not (tmp_path / "s").exists()


LOUD_RANK = """
import os
import torch

class LoudRank(torch.nn.Module):
    def encode(self, images):
        return torch.nn.functional.avg_pool2d(images, 8) * (1e9 if os.environ.get("RANK") == "1" else 1)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=8)

def load():
    return LoudRank()
"""


def test_an_error_of_one_rank_is_told_once_and_the_others_say_that_they_had_to_stop(torchrun: Run, imagenet_sample: Path, tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(LOUD_RANK)
    done = torchrun(2, "encode-latents", imagenet_sample / "val", tmp_path / "s", "--vae", f"{tmp_path / 'loud.py'}:load", *SETTINGS, check=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("revq: error")]
    assert errors[0].startswith("revq: error on rank 1: the latent of image ")
    assert all(line.startswith("revq: error on rank 0: another rank stopped") for line in errors[1:])
    assert "in gather" not in done.stderr  # no traceback of ours
