"""Stage two, first half: fit one codebook for each token position, from cached latents alone.

    revq fit-codebooks STORE OUT --tokens 512 --codes 16384

In: a latent store. Out: a folder with `codebooks.safetensors` (transform, codebooks, counts over the fitted rows), `config.json`, and
`usage.parquet` (how much of each codebook the whole split uses).
Only the `decoder` transform needs the VAE, for its calibration: how much each latent position moves the picture.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, P = C*H*W, T tokens per image, D = P/T dims, K codes per codebook.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..cache.batches import open_latents
from ..cache.rows import spread_rows
from ..cache.store import LatentSplit, LatentStore
from ..errors import CodebookError
from ..files import local_path, write_bytes
from ..models.codebooks import CODEBOOKS_KIND, CODEBOOKS_NAME, Codebooks, check_finite, load_codebooks, save_codebooks
from ..models.device import pick_device
from ..models.kmeans import faiss_uses, pick_backend
from ..models.nearest import search_note
from ..models.quantizer import dead_codes
from ..models.transform import (
    LatentTransform,
    spatial_block,
)
from ..models.vae import FrozenVAE
from . import ranks
from .code_usage import count_codes, summarize_usage, write_usage
from .configs import FitCodebooksConfig
from .events import Event, Note, Result
from .fitting.codebook_blocks import fit_blocks, join_blocks
from .fitting.transform import load_transform, make_transform, sensitivity_table
from .output_folder import OutputFolder, output_folder

SENSITIVITY_NAME = "sensitivity.md"
POINTS_PER_CODE = 39


def settings_of_codebooks(config: FitCodebooksConfig, split: LatentSplit, backend: str) -> dict[str, Any]:
    """What shapes the codebooks: a folder with another identity is another run's. `backend` is the one that fits, not "auto"."""
    names = ("split", "tokens", "codes", "transform", "iterations", "max_samples", "rectifier_share", "seed")
    calibration = {"calibration_samples": config.calibration_samples} if config.transform == "decoder" else {}
    data = {"store_fingerprint": split.encoding.fingerprint, "data_digest": split.data_digest}
    return {**data, **{name: getattr(config, name) for name in names}, "backend": backend, **calibration}


def fit_codebooks(config: FitCodebooksConfig) -> Iterator[Event]:
    """Fit transform and codebooks; yields progress, then a `Result`. The ranks of one torchrun share calibration and groups, and must see the same
    `out`; the result is the same, bit for bit, however many they are.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, OutputError, ConfigError: see their messages.
    """
    with output_folder(config.out, kind=CODEBOOKS_KIND, command="fit-codebooks") as folder:
        yield from _fit(config, folder)


def _fit(config: FitCodebooksConfig, folder: OutputFolder) -> Iterator[Event]:
    started = time.perf_counter()
    device = pick_device(config.device)
    backend = pick_backend(config.backend, device)
    store = LatentStore.open(config.store)
    split = store[config.split]
    rows = _fit_rows(config, split)
    _check_sizes(config, store, len(rows))
    vae = FrozenVAE.load_recorded(store.encoding.vae, spec=config.vae, device=device) if config.transform == "decoder" else None
    out, identity = folder.path, settings_of_codebooks(config, split, backend)
    folder.claim(identity, overwrite=config.overwrite)
    if ranks.broadcast((out / CODEBOOKS_NAME).exists()):
        yield Note(text=f"{out} is complete already")
        yield Result(value=_result(config, load_codebooks(out), mse=None, latents=len(rows), seconds=0.0))
        return
    yield from _notes_on_data(config, split, len(rows))
    if note := search_note(device, math.prod(store.encoding.latent_shape) // config.tokens):
        yield Note(text=note)
    if backend == "faiss" and not faiss_uses(device):
        yield Note(text=f"this FAISS fits on the CPU, not on {device}: install revq[gpu] (faiss-gpu), or pass --backend torch", warning=True)
    latents = open_latents(split, rows, device)
    yield from make_transform(config, split, latents, vae, out / "partial")
    transform, sensitivity = load_transform(config, out / "partial")
    yield from fit_blocks(config, latents, transform.to(device), backend, out / "partial")
    ranks.barrier()
    codebooks, fitted_counts, fitted_errors = join_blocks(config, latents, out / "partial")
    check_finite(codebooks, "the latents hold extreme values: check the store with revq info --verify")
    del latents
    counts, errors = fitted_counts, fitted_errors
    if len(rows) < int(split.ok.sum()):
        counts, errors = yield from count_codes(split, transform, codebooks)
    ranks.barrier()  # rank 0 removes the blocks that all have read now
    if ranks.rank() == 0:
        if sensitivity is not None:
            write_bytes(out / SENSITIVITY_NAME, sensitivity_table(sensitivity, transform).encode())
        write_usage(out, counts, errors)
        made = Codebooks(transform=transform, codebooks=codebooks, counts=fitted_counts, sensitivity=sensitivity, identity=identity)
        save_codebooks(out, made)
        shutil.rmtree(out / "partial", ignore_errors=True)
        yield from _note_on_dead_codes(counts)
    ranks.barrier()
    mse = float(fitted_errors.mean())
    yield Result(value=_result(config, load_codebooks(out), mse=mse, latents=len(rows), seconds=time.perf_counter() - started))


def _notes_on_data(config: FitCodebooksConfig, split: LatentSplit, latents: int) -> Iterator[Event]:
    if latents < POINTS_PER_CODE * config.codes:
        enough = 2 ** int(math.log2(max(2, latents / POINTS_PER_CODE)))
        few = f"{latents} latents for {config.codes} codes are {latents / config.codes:.1f} per code, FAISS advises {POINTS_PER_CODE}"
        mend = f"codes will suit unseen images less well: {_more_latents(config, latents)}, or take --codes {enough} or fewer"
        yield Note(text=f"{few}; {mend}")
    constant = int((split.variance <= 0).sum())
    if constant:
        yield Note(text=f"{constant} of {split.variance.size} latent positions never vary; they cost no bits", warning=True)


def _more_latents(config: FitCodebooksConfig, latents: int) -> str:
    """How to fit on more latents: what leaves some out comes first."""
    ways = ["raise --max-samples"] if config.max_samples == latents else []
    ways += ["lower --rectifier-share"] if config.rectifier_share else []
    return ", or ".join([*ways, "encode more images or --views"])


def _note_on_dead_codes(counts: Tensor) -> Iterator[Event]:
    dead = int(dead_codes(counts).sum())
    if dead:
        owners = int((dead_codes(counts) > 0).sum())
        why = "where a token takes fewer distinct values than there are codes; --codes can be lower"
        yield Note(text=f"{dead} codes in {owners} of {len(counts)} codebooks are used by no latent: that happens {why}", warning=True)


def _fit_rows(config: FitCodebooksConfig, split: LatentSplit) -> Any:
    """Sorted rows of the split to fit on: readable, of the images not kept for the rectifier, at most `max_samples`."""
    rows = spread_rows(split, config.rectifier_share, "first")
    if config.max_samples is None or config.max_samples >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[: config.max_samples]
    return rows[chosen.sort().values.numpy()]


def _check_sizes(config: FitCodebooksConfig, store: LatentStore, latents: int) -> None:
    if latents < config.codes:
        mend = f"use --codes {latents} or fewer, or {_more_latents(config, latents)}"
        raise CodebookError(f"{latents} latents cannot fill {config.codes} codes; {mend}")
    check_tokens(config, store.encoding.latent_shape)


def check_tokens(config: FitCodebooksConfig, shape: tuple[int, int, int]) -> None:
    """Raise CodebookError where latents of `shape` (C,H,W) cannot be cut into so many tokens."""
    LatentTransform(mean=torch.zeros(shape), std=torch.ones(shape), tokens=config.tokens)
    if config.transform != "standardize":
        spatial_block(shape, config.tokens)


def _result(config: FitCodebooksConfig, made: Codebooks, *, mse: float | None, latents: int, seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    tokens, codes, dims = made.codebooks.shape
    result: dict[str, Any] = {
        "store": config.store,
        "out": config.out,
        "transform": config.transform,
        "tokens": tokens,
        "codes": codes,
        "dims": dims,
        "bits_per_image": tokens * math.log2(codes),
        "latents": latents,
        "coordinate_mse": mse,
        **{name: value for name, value in summarize_usage(local_path(config.out)).items() if name != "worst_tokens"},
        "seconds": round(seconds, 3),
    }
    if made.sensitivity is not None:
        result["sensitivity_per_channel"] = [float(f"{value:.4g}") for value in made.sensitivity.mean((1, 2))]
    return result
