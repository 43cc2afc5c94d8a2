"""What an evaluation costs over the bare arithmetic of its networks, and how long a default one takes. Ratios come from this one run.

    python benchmarks/bench_evaluate.py [--images 32] [--repeats 2]

On the embedded VAE and photographs with a tokenizer of random codes and an Inception of random weights in torch-fidelity's file format, so it
runs anywhere. The bare sum for one batch: one encode, three decodes, the rectifier, and four Inception forwards, on tensors that lie ready. The
evaluation does that and all else: it loads and crops files, searches codes, scores, adds up moments. Bare and whole runs alternate.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from revq.models.device import pick_device
from revq.models.tokenizer import TOKENIZER_KIND, ReVQTokenizer
from revq.models.vae import FrozenVAE
from revq.stages.configs import EvaluateConfig
from revq.stages.evaluate import evaluate
from revq.stages.evaluation.inception import Inception, empty_inception
from revq.stages.evaluation.metrics import _similarities
from revq.stages.events import Advance, Begin

VAE, IMAGE_SIZE, BATCH, TOKENS, CODES = "revq-tiny-f8c8", 128, 32, 256, 256
IMAGES = "photographs:train"


def save_inception(path: Path) -> Path:
    """torch-fidelity's file format around random weights: as slow as the published ones."""
    torch.save(empty_inception(device="cpu").state_dict(), path)
    return path


def save_tokenizer(folder: Path) -> Path:
    """256 tokens of 256 random codes, and a rectifier of the demo's size."""
    vae = FrozenVAE.load(VAE)
    config: dict[str, Any] = {"kind": TOKENIZER_KIND, "format_version": 1, "tokens": TOKENS, "codes": CODES, "transform": "standardize"}
    rectifier = {"channels": 8, "width": 64, "depth": 2, "block": "conv"}
    config |= {"latent_shape": [8, 16, 16], "image_size": IMAGE_SIZE, "rectifier": rectifier, "vae": vae.identity()}
    tokenizer = ReVQTokenizer(config)
    torch.nn.init.normal_(tokenizer.quantizer.codebooks)
    tokenizer.save_pretrained(folder)
    return folder


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def bare_seconds(tokenizer: ReVQTokenizer, inception: Inception | None, batches: int) -> tuple[float, float]:
    """Seconds on the clock, and of the processor, for the networks alone over so many batches."""
    device = tokenizer.device
    images = torch.randint(0, 256, (BATCH, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, device=device)
    signed, latents = images.float() / 127.5 - 1, torch.randn(BATCH, 8, 16, 16, device=device)
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    for _ in range(batches):
        tokenizer.vae.encode(signed)
        assert tokenizer.rectifier is not None
        tokenizer.rectifier(latents)
        for _ in range(3):
            tokenizer.vae.decode(latents)
        if inception:
            for _ in range(4):
                inception.features(images)
    synchronize(device)
    return time.perf_counter() - started, time.process_time() - worked


def whole_seconds(config: EvaluateConfig) -> tuple[float, float, float]:
    """Seconds on the clock, and of the processor, from the first image to the last; and on the clock of the whole evaluation."""
    marks: dict[str, float] = {}
    started = time.perf_counter()
    for event in evaluate(config):
        if isinstance(event, Begin) and event.task == "evaluate":
            marks |= {"begin": time.perf_counter(), "idle": time.process_time()}
        if isinstance(event, Advance):
            marks |= {"end": time.perf_counter(), "worked": time.process_time()}
    return marks["end"] - marks["begin"], marks["worked"] - marks["idle"], time.perf_counter() - started


def tolerance_share(config: EvaluateConfig) -> float:
    """Seconds on the clock of the tolerance curve over those of the rows, both from the first image to the last."""
    seconds: dict[str, float] = {}
    for event in evaluate(config):
        if isinstance(event, Begin):
            task, begun = event.task, time.perf_counter()
        if isinstance(event, Advance):
            seconds[task] = time.perf_counter() - begun
    return seconds["tolerance"] / seconds["evaluate"]


def ssim_ratio(side: int, images: int) -> float:
    """Seconds that torchmetrics takes for the SSIM of four rows of pictures over those of the own one, which gives the same to 1e-12."""
    reference = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {str(row): reference // (row + 2) for row in range(4)}
    ways = {
        "ours": lambda: _similarities(rows, reference),
        "torchmetrics": lambda: {
            row: structural_similarity_index_measure(pictures.double() / 255, reference.double() / 255, data_range=1.0, reduction="none")
            for row, pictures in rows.items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return min(seconds["torchmetrics"]) / min(seconds["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-inception", action="store_true", help="leave rFID out, as where its weights are missing")
    args = parser.parse_args()
    device = pick_device(args.device)
    batches = args.images // BATCH
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCH_HOME"] = str(folder)
        path = None if args.no_inception else save_inception(folder / "inception.pth")
        tokenizer = ReVQTokenizer.from_pretrained(save_tokenizer(folder / "tokenizer"), device=device)
        inception = Inception(path, device) if path else None
        settings: dict[str, Any] = {"tokenizer": str(folder / "tokenizer"), "images": IMAGES, "limit": batches * BATCH, "batch_size": BATCH}
        settings |= {"workers": args.workers, "inception_weights": str(path) if path else None, "tolerance": False, "download": False}
        bare_seconds(tokenizer, inception, 1)
        pairs = []
        for repeat in range(args.repeats):
            config = EvaluateConfig(**settings, out=str(folder / f"out-{repeat}"), cache="off", device=str(device))
            pairs.append((*bare_seconds(tokenizer, inception, batches), *whole_seconds(config)))
        cached = EvaluateConfig(**settings, out=str(folder / "cached-0"), cache=str(folder / "cache"), device=str(device))
        whole_seconds(cached)
        again, _, _ = whole_seconds(EvaluateConfig(**settings, out=str(folder / "cached-1"), cache=str(folder / "cache"), device=str(device)))
        curve = tolerance_share(EvaluateConfig(**settings | {"tolerance": True}, out=str(folder / "curve"), cache="off", device=str(device)))
    count = batches * BATCH
    rows = [
        ("networks alone", f"{statistics.median(count / bare for bare, *_ in pairs):.1f} images/s"),
        ("evaluate, from the first image to the last", f"{statistics.median(count / whole for _, _, whole, *_ in pairs):.1f} images/s"),
        ("  ratio (aim: at least 0.9)", f"{statistics.median(bare / whole for bare, _, whole, *_ in pairs):.2f}"),
        ("  ratio of processor seconds, for a machine with other work", f"{statistics.median(bare / whole for _, bare, _, whole, _ in pairs):.2f}"),
        ("the same with the originals' features from the cache", f"{count / again:.1f} images/s"),
        ("time of the tolerance curve over that of the rows (aim: at most 1)", f"{curve:.2f}"),
        ("SSIM: times faster than torchmetrics, 64 pictures of 64 px", f"{ssim_ratio(64, 64):.0f}"),
        ("SSIM: times faster than torchmetrics, 16 pictures of 256 px", f"{ssim_ratio(256, 16):.0f}"),
        (f"all of an evaluation of {count} images, without tolerance", f"{statistics.median(total for *_, total in pairs):.0f} s"),
    ]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()}-core CPU ({platform.machine()})"
    print(f"{machine}, torch {torch.__version__}, {torch.get_num_threads()} threads, {'no Inception' if args.no_inception else 'with Inception'}\n")
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value:>14}" for label, value in rows))


if __name__ == "__main__":
    main()
