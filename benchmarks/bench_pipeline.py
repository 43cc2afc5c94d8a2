"""One table: what encode-latents costs over the bare arithmetic, and how much memory each stage takes. Ratios come from this one run.

    python benchmarks/bench_pipeline.py

On the embedded VAE and photographs, so it runs anywhere. Each ratio is the median of several alternating repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from revq import FrozenVAE
from revq.models.device import pick_device
from revq.stages.configs import EncodeLatentsConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.events import run_quietly

IMAGE_SIZE, BATCH, VAE = 128, 32, "revq-tiny-f8c8"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, with the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bare_encode_rate(vae: FrozenVAE, batches: int) -> float:
    """Images per second of the encoder alone on tensors that lie ready."""
    images = torch.rand(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, device=vae.device) * 2 - 1
    vae.encode(images)
    return batches * BATCH / seconds_of(lambda: [vae.encode(images) for _ in range(batches)], vae.device)


def stage_encode_rate(folder: Path, workers: int, device: torch.device) -> float:
    """Images per second of encode-latents on photographs, from its first image to its last."""
    config = EncodeLatentsConfig(
        images="photographs:train",
        store=str(folder),
        vae=VAE,
        image_size=IMAGE_SIZE,
        batch_size=BATCH,
        workers=workers,
        limit=512,
        device=str(device),
    )
    return float(run_quietly(encode_latents(config))["images_per_s"])


def peak_memory_mib(*arguments: object) -> float:
    """Largest resident size of `revq ARGUMENTS` in its own process."""
    process = subprocess.Popen([sys.executable, "-m", "revq", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"revq {arguments[0]} failed")
    return usage.ru_maxrss / 1024


def memory_rows(folder: Path) -> list[tuple[str, str]]:
    """Peak memory of the interpreter with torch, and of each stage, on the CPU."""
    store, codebooks, run = folder / "memory.zarr", folder / "memory-codebooks", folder / "memory-run"
    encode = ["encode-latents", "photographs:train", store, "--vae", VAE, "--image-size", IMAGE_SIZE, "--batch-size", BATCH, "--device", "cpu"]
    bare = subprocess.Popen([sys.executable, "-c", "import torch, diffusers, revq.models.tokenizer, revq.stages.train_rectifier"])
    _, _, usage = os.wait4(bare.pid, 0)
    bare.returncode = 0
    fit = ["fit-codebooks", store, codebooks, "--tokens", 256, "--codes", 64, "--device", "cpu"]
    train = ["train-rectifier", store, codebooks, run, "--steps", 20, "--batch-size", 32, "--width", 128, "--depth", 3, "--device", "cpu"]
    evaluate = ["evaluate", run, "photographs:held-out", folder / "evaluation", "--no-download", "--batch-size", BATCH, "--device", "cpu"]
    commands = {
        "encode-latents, 256 images": [*encode, "--split", "few", "--limit", 256],
        "encode-latents, 1062 images": encode,
        "fit-codebooks": fit,
        "train-rectifier": train,
        "evaluate, 195 images": evaluate,
    }
    measured = {"imports alone": usage.ru_maxrss / 1024} | {name: peak_memory_mib(*command) for name, command in commands.items()}
    return [(f"peak memory: {name}", f"{mib:.0f} MiB") for name, mib in measured.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    device = pick_device(args.device)
    vae = FrozenVAE.load(VAE, device=device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encode = [(bare_encode_rate(vae, 16), stage_encode_rate(folder / f"store-{n}", args.workers, device)) for n in range(args.repeats)]
        rows = [
            ("bare encoder, 128 px", f"{statistics.median(bare for bare, _ in encode):.1f} images/s"),
            ("encode-latents, decoding and writing included", f"{statistics.median(stage for _, stage in encode):.1f} images/s"),
            ("  ratio (aim: at least 0.9)", f"{statistics.median(stage / bare for bare, stage in encode):.2f}"),
            *memory_rows(folder),
        ]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()}-core CPU ({platform.machine()})"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value:>14}" for label, value in rows))


if __name__ == "__main__":
    main()
