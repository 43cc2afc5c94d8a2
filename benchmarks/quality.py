"""Tables of docs/results.md: what each choice costs or wins, by every judge, on photographs that nothing was fitted on.

    revq weights                                                        # the networks that judge
    python benchmarks/quality.py --part taef2 --work runs/quality       # or another part; REVQ_SHARED (../shared) holds the photographs

Every stage is the real one, at the settings printed; what the folder `--work` holds already is not done again, so a stopped run goes on.

- taef2: the ImageNet sample at 64 px through TAEF2, 512 tokens of 512 codes, each transform; 700 training photographs in 12 views to fit, the
  100 of the validation set to test. `--on bsds` tests on the 300 of BSDS500 instead, a domain that nothing was fitted on.
- taef2-128: the same at 128 px, latents (32,16,16), 4 views.
- embedded: the same photographs at 128 px through the VAE that revq brings, 512 tokens of 256 codes, 4 views.
- refine: tokens searched for with the decoder in the loop (`evaluate --refine N`), on the tokenizers of decoder of both.
- paper: the paper's recipe (random data points as codebooks, codebooks by gradient, plain coordinates, plain latent loss, EfficientViT blocks,
  exponential decay) against revq's, in the same wall time, codebooks' fit included. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from revq.cache.batches import ResidentLatents
from revq.cache.store import LatentStore
from revq.models.codebooks import load_codebooks, save_codebooks
from revq.pipeline.reporting.tables import metric_text
from revq.stages.configs import EncodeLatentsConfig, EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.evaluate import evaluate
from revq.stages.events import run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier

TRANSFORMS = ("standardize", "pca", "decoder")
SETS = {"taef2": (64, 12, 512), "taef2-128": (128, 4, 512), "embedded": (128, 4, 256)}  # pixels, views, codes
JUDGED_BY = {
    "rfid": "rFID@n",
    "kid": "KID×1000",
    "lpips_alex": "LPIPS-Alex",
    "lpips_vgg": "LPIPS-VGG",
    "agreement_efficientnet_lite0": "same class",
    "psnr_db": "PSNR",
    "ssim": "SSIM",
}
NETWORK: dict[str, Any] = {"width": 64, "depth": 2, "batch_size": 32, "lr": 2e-3, "ema": 0.98, "evaluations": 4}


def encode(name: str, work: Path) -> tuple[str, Path]:
    """A store with the splits train and val; returns where its VAE is, and the store."""
    size, views, _ = SETS[name]
    vae = f"{Path(__file__).parent.parent / 'tests' / 'taef2_plugin.py'}:load" if name.startswith("taef2") else "revq-tiny-f8c8"
    common: dict[str, Any] = {"store": str(work / f"{name}.zarr"), "vae": vae, "image_size": size}
    run_quietly(encode_latents(EncodeLatentsConfig(images=str(photographs("train")), views=views, **common)))
    run_quietly(encode_latents(EncodeLatentsConfig(images=str(photographs("val")), split="val", **common)))
    return vae, work / f"{name}.zarr"


def photographs(part: str) -> Path:
    data = Path(os.environ.get("REVQ_SHARED", "../shared")) / "data"
    return data / "bsds500" / "photographs" if part == "bsds" else data / "imagenet-sample" / part


def train_and_evaluate(vae: str, store: Path, codebooks: Path, run: Path, **settings: Any) -> dict[str, Any]:
    """The evaluation's metrics.json, with the seconds of training under "seconds" (0 where it was done before)."""
    started = time.perf_counter()
    run_quietly(train_rectifier(TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=str(run), vae=vae, **NETWORK | settings)))
    seconds = time.perf_counter() - started
    return {**evaluated(vae, run), "seconds": seconds}


def evaluated(vae: str, run: Path, refine: int = 0, on: str = "val") -> dict[str, Any]:
    """metrics.json of the photographs that nothing was fitted on."""
    out = run.with_name(f"{run.name}-evaluation-{refine}-{on}")
    common: dict[str, Any] = {"tolerance": False, "download": False, "features": "efficientnet-lite0"}
    run_quietly(evaluate(EvaluateConfig(tokenizer=str(run), images=str(photographs(on)), out=str(out), vae=vae, refine=refine, **common)))
    return json.loads((out / "metrics.json").read_text())  # type: ignore[no-any-return]


def fit(vae: str, store: Path, out: Path, **settings: Any) -> float:
    """Fit codebooks; the seconds it took."""
    started = time.perf_counter()
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(store), out=str(out), vae=vae, **settings)))
    return time.perf_counter() - started


def transforms_part(name: str, work: Path, on: str) -> None:
    vae, store = encode(name, work)
    table: list[tuple[str, ...]] = [("", *JUDGED_BY.values())]
    lost = {}
    for transform in TRANSFORMS:
        metrics = tokenizer_of(name, transform, vae, store, work)
        rows = (metrics if on == "val" else evaluated(vae, work / f"{name}-{transform}-run", on=on))["rows"]
        if transform == TRANSFORMS[0]:
            table.append(row("vae", rows["vae"]))
        table += [row(f"{transform}, {kind}", rows[kind]) for kind in ("quantized", "rectified")]
        lost[transform] = rows["vae"]["psnr_db"] - rows["quantized"]["psnr_db"]
        show(f"{name}: {SETS[name][0]} px, 512 tokens of {SETS[name][2]} codes, photographs of {on}", table)
    print(f"  decoder leaves {lost['decoder'] / lost['standardize']:.2f} of what standardize loses (aim on taef2: at most 0.40)")


def tokenizer_of(name: str, transform: str, vae: str, store: Path, work: Path) -> dict[str, Any]:
    """Codebooks and rectifier in `work`, and the evaluation of the tokenizer."""
    codebooks = work / f"{name}-{transform}"
    fit(vae, store, codebooks, codes=SETS[name][2], transform=transform)
    settings = {"steps": 500, "decoder_steps": 200, "decoder_batch_size": 16, "codebook_lr": 0.0}
    return train_and_evaluate(vae, store, codebooks, work / f"{name}-{transform}-run", **settings)


def refine_part(work: Path) -> None:
    for name in ("taef2", "embedded"):
        vae, store = encode(name, work)
        rows = tokenizer_of(name, "decoder", vae, store, work)["rows"]
        table: list[tuple[str, ...]] = [("", *JUDGED_BY.values(), "encoding"), (*row("vae", rows["vae"]), "")]
        for steps in (0, 2, 4, 8, 16, 32):
            metrics = evaluated(vae, work / f"{name}-decoder-run", steps)
            speed = f"{metrics['throughput']['encode_images_per_s']:.1f} images/s"
            table.append((*row(f"rectified, {steps} steps", metrics["rows"]["rectified"]), speed))
        show(f"{name}: tokens of decoder refined, the same bits, unseen photographs", table)


def paper_part(work: Path) -> None:
    """Ours first; then the paper's recipe for as many steps as fill the same time, by the pace of a short run."""
    vae, store = encode("taef2", work)
    for path in work.glob("paper-*"):
        shutil.rmtree(path)  # times of an earlier run would not compare
    ours = work / "paper-ours"
    fitting = fit(vae, store, ours, codes=512)
    best = train_and_evaluate(vae, store, ours, work / "paper-ours-run", steps=500, decoder_steps=200, decoder_batch_size=16, codebook_lr=0.0)
    budget = fitting + best["seconds"]
    random = random_points(store, work / "paper-random")
    recipe = {"block": "efficientvit", "codebook_lr": 0.01, "schedule": "exponential"}
    pace = train_and_evaluate(vae, store, random, work / "paper-pace-run", steps=200, **recipe)["seconds"] / 200
    steps = int(budget / pace)
    plain = train_and_evaluate(vae, store, random, work / "paper-run", steps=steps, **recipe)
    table = [("", "seconds", "quantized", "rectified")]
    for name, seconds, metrics in ((f"the paper's recipe, {steps} steps", plain["seconds"], plain), ("revq", budget, best)):
        table.append((name, f"{seconds:.0f}", *(f"{metrics['rows'][kind]['psnr_db']:.2f} dB" for kind in ("quantized", "rectified"))))
    show("the paper's recipe against revq's in equal wall time, taef2 at 64 px", table)
    gain = best["rows"]["rectified"]["psnr_db"] - plain["rows"]["rectified"]["psnr_db"]
    print(f"  {gain:+.2f} dB (aim: at least 1); revq's time is {fitting:.0f} s of fit-codebooks and {best['seconds']:.0f} s of train-rectifier")


def random_points(store: Path, out: Path) -> Path:
    """Codebooks of 512 random data points in plain coordinates, as the paper's code starts."""
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(store), out=str(out), codes=512, transform="standardize", iterations=1)))
    made, split = load_codebooks(out), LatentStore.open(store)["train"]
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:512].sort().values
    points = made.transform(ResidentLatents(split, rows.numpy(), device=torch.device("cpu")).batch(torch.arange(512))).transpose(0, 1)
    save_codebooks(out, replace(made, codebooks=points.contiguous()))
    return out


def row(name: str, metrics: dict[str, Any]) -> tuple[str, ...]:
    """One line, in the order of `JUDGED_BY`."""
    return (name, *(metric_text(metrics, column) for column in JUDGED_BY))


def show(title: str, rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(f"\n{title}")
    for name, *cells in rows:
        print("  " + "  ".join([f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*SETS, "refine", "paper"), action="append", help="may be given more than once; default taef2")
    parser.add_argument("--on", choices=("val", "bsds"), default="val", help="the photographs that judge the transforms; default val")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder for stores, codebooks, runs and evaluations")
    arguments = parser.parse_args()
    if not photographs("val").is_dir():
        print(f"\nquality.py is left out: no photographs in {photographs('val')}; set REVQ_SHARED")
        return
    print(f"{os.cpu_count()}-core CPU ({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in arguments.part or ["taef2"]:
        if part in SETS:
            transforms_part(part, arguments.work, arguments.on)
        else:
            {"refine": refine_part, "paper": paper_part}[part](arguments.work)


if __name__ == "__main__":
    main()
