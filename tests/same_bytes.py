"""A process of its own: every stage several times over, each time in a new folder, and the SHA-256 of what it wrote, as JSON on standard output.

    python same_bytes.py IMAGES INCEPTION FOLDER

How many threads it has is in its environment, which a process reads once. IMAGES holds train/ and val/. Under torchrun the ranks share each stage.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from training_runs import stop_at

from revq.pipeline.distributed import process_group
from revq.stages import ranks
from revq.stages.configs import EncodeLatentsConfig, EvaluateConfig, FitCodebooksConfig, TrainRectifierConfig
from revq.stages.encode_latents import encode_latents
from revq.stages.evaluate import evaluate
from revq.stages.events import Event, run_quietly
from revq.stages.fit_codebooks import fit_codebooks
from revq.stages.train_rectifier import train_rectifier

REPEATS = 2
FIT = {
    "decoder": {"transform": "decoder", "calibration_samples": 3},
    "pca": {"transform": "pca"},
    "standardize": {"transform": "standardize"},
    "standardize by FAISS": {"transform": "standardize", "backend": "faiss"},
}
TRAIN = {
    "latent phase": {"steps": 8},
    "codebooks alone": {"steps": 15, "width": 0},
    "frozen codebooks": {"steps": 3, "codebook_lr": 0.0},
    "decoder phase": {"steps": 6, "decoder_steps": 2},
    "efficientvit": {"steps": 2, "block": "efficientvit", "precision": "fp32"},
    "streamed": {"steps": 3, "latents": "stream"},
}
EVALUATE = {"with refined tokens": {"refine": 1}}
OF_THE_CLOCK = {"throughput", "training", "protocol", "out", "report", "sources"}  # and of folders


def main() -> None:
    images, inception, folder = map(Path, sys.argv[1:])
    found: dict[str, list[str]] = {}

    def repeat(stage: str, make: Callable[..., str], kinds: dict[str, Any], *inputs: object) -> None:
        for kind, settings in kinds.items():
            name = f"{stage} {kind}"
            found[name] = [make(*inputs, folder / f"{name} {number}", settings) for number in range(REPEATS)]

    repeat("encode-latents", encode, {"views": {}}, images)
    store = folder / "encode-latents views 0"
    repeat("fit-codebooks", fit, FIT, store)
    codebooks = folder / "fit-codebooks pca 0"
    alone = ranks.world_size() == 1
    repeat("train-rectifier", train, TRAIN if alone else {"decoder phase": TRAIN["decoder phase"]}, store, codebooks)
    found["train-rectifier decoder phase"].append(  # stopped in either phase
        train(store, codebooks, folder / "stopped", TRAIN["decoder phase"], stops=(4, 7))
    )
    if alone:  # several ranks add its float64 sums up in another order
        repeat("evaluate", measure, EVALUATE, folder / "train-rectifier decoder phase 0", images / "val", inception)
    if ranks.rank() == 0:
        print(json.dumps({"threads": torch.get_num_threads(), "sha256": found}))


def encode(images: Path, out: Path, settings: dict[str, Any]) -> str:
    for split, limit, views in (("train", 10, 12), ("val", 2, 1)):
        shape = {"image_size": 64, "limit": limit, "views": views, "batch_size": 12, "shard_rows": 48, "workers": 3}
        source = {"images": str(images / split), "store": str(out), "split": split, "vae": "revq-tiny-f8c8"}
        run_quietly(encode_latents(EncodeLatentsConfig(**source, **shape, **settings)))
    return sha256_of(out, "**/*")


def fit(store: Path, out: Path, settings: dict[str, Any]) -> str:
    run_quietly(fit_codebooks(FitCodebooksConfig(store=str(store), out=str(out), tokens=128, codes=8, iterations=4, **settings)))
    return sha256_of(out, "**/*")


def train(store: Path, codebooks: Path, out: Path, settings: dict[str, Any], stops: tuple[int, ...] = ()) -> str:
    small = {"batch_size": 120, "decoder_batch_size": 2, "width": 32, "depth": 2, "evaluations": 2}

    def run() -> Iterator[Event]:
        return train_rectifier(TrainRectifierConfig(store=str(store), codebooks=str(codebooks), out=str(out), **{**small, **settings}))

    for step in stops:
        stop_at(step, run())
    run_quietly(run())
    ranks.barrier()  # as below
    curve = pq.read_table(out / "metrics.parquet").to_pydict()
    errors = {name: column for name, column in curve.items() if name.startswith("val_") or name == "step"}
    return sha256_of(out, "tokenizer/*", "usage.parquet", also=errors)


def measure(tokenizer: Path, images: Path, inception: Path, out: Path, settings: dict[str, Any]) -> str:
    rest = {"inception_weights": str(inception), "limit": 2, "batch_size": 2, "tolerance_images": 1, "cache": "off", "download": False, **settings}
    metrics = run_quietly(evaluate(EvaluateConfig(tokenizer=str(tokenizer), images=str(images), out=str(out), **rest)))
    figures = {name: value for name, value in metrics.items() if name not in OF_THE_CLOCK}
    return sha256_of(out, "images.parquet", "*.png", also=figures)


def sha256_of(folder: Path, *patterns: str, also: object = None) -> str:
    """Over names and bytes of the files there, and over a JSON value."""
    ranks.barrier()  # rank 0 gives the folder free, and removes its lock, after the others have left the stage
    digest = hashlib.sha256(json.dumps(also).encode())
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(folder).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


if __name__ == "__main__":
    with process_group():
        main()
