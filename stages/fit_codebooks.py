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
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..cache.batches import ResidentLatents, StreamingLatents, open_latents
from ..cache.rows import spread_rows
from ..cache.store import LatentSplit, LatentStore
from ..errors import CodebookError, ConfigError
from ..files import write_bytes
from ..models.codebooks import CODEBOOKS_KIND, CODEBOOKS_NAME, Codebooks, check_finite, load_codebooks, save_codebooks
from ..models.device import pick_device
from ..models.kmeans import BACKENDS, faiss_uses, kmeans, pick_backend
from ..models.nearest import nearest_codes, search_note
from ..models.quantizer import code_counts, dead_codes
from ..models.transform import (
    KINDS,
    Covariance,
    LatentTransform,
    cut_into_blocks,
    fit_axes,
    scale_from_sensitivity,
    spatial_block,
    standard_deviation,
)
from ..models.vae import FrozenVAE
from . import ranks
from .code_usage import count_codes, summarize_usage, write_usage
from .events import Advance, Begin, Event, Note, Result
from .output_folder import OutputFolder, output_folder

Latents = ResidentLatents | StreamingLatents  # whichever memory allows: they are only read through, once for each block of tokens
_BLOCK_BYTES = 256 << 20
_BATCH = 1024
_DECODED_AT_ONCE = 4  # for its gradients DC-AE f32c32 keeps 1.3 GiB for each 256 px picture in float32
_TRANSFORM_NAME = "transform.safetensors"
SENSITIVITY_NAME = "sensitivity.md"
POINTS_PER_CODE = 39


@dataclass(frozen=True, kw_only=True)
class FitCodebooksConfig:
    """Settings of fit-codebooks."""

    store: str
    """The latent store."""
    out: str
    """Output folder: new, empty, or this very run's, to be resumed."""
    split: str = "train"
    """Split of the store to fit on."""
    tokens: int = 512
    """T, tokens per image; divides P."""
    codes: int = 16384
    """K, codes in each codebook."""
    transform: str = "decoder"
    """Coordinates to quantize in: "decoder", "pca" or "standardize" (the paper's)."""
    iterations: int = 20
    """Rounds of k-means."""
    max_samples: int | None = None
    """Fit on at most so many latents, drawn by the seed; None means all."""
    rectifier_share: float = 0.0
    """Share of the images kept out of the fit for the rectifier to train on. With few latents per code, quantization errors on
    fitted latents are smaller than on unseen ones, and a rectifier that trains on them learns the wrong errors."""
    calibration_samples: int = 2048
    """Vector-Jacobian products through the frozen decoder, for the "decoder" transform."""
    backend: str = "auto"
    """k-means by "faiss", "torch", or "auto": FAISS on a GPU with faiss-gpu and on a CPU without Numba, else torch."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N, mps."""
    vae: str | None = None
    """Where to find the VAE for the "decoder" transform; None means where the store says."""
    overwrite: bool = False
    """Replace codebooks of other settings in `out`."""

    def __post_init__(self) -> None:
        """Check ranges; raises ConfigError."""
        if self.transform not in KINDS:
            raise ConfigError(f"transform must be one of {', '.join(KINDS)}, not {self.transform!r}")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {self.backend!r}")
        for name, lowest in (("tokens", 1), ("codes", 2), ("iterations", 1), ("calibration_samples", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {lowest}, not {getattr(self, name)}")
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(f"max-samples must be at least 1, not {self.max_samples}")
        if not 0 <= self.rectifier_share < 1:
            raise ConfigError(f"rectifier-share must be in [0,1), not {self.rectifier_share}")

    def identity(self, split: LatentSplit, backend: str) -> dict[str, Any]:
        """What shapes the codebooks: a folder with another identity is another run's. `backend` is the one that fits, not "auto"."""
        names = ("split", "tokens", "codes", "transform", "iterations", "max_samples", "rectifier_share", "seed")
        calibration = {"calibration_samples": self.calibration_samples} if self.transform == "decoder" else {}
        data = {"store_fingerprint": split.encoding.fingerprint, "data_digest": split.data_digest}
        return {**data, **{name: getattr(self, name) for name in names}, "backend": backend, **calibration}


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
    out, identity = folder.path, config.identity(split, backend)
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
    yield from _make_transform(config, split, latents, vae, out / "partial")
    transform, sensitivity = _load_transform(config, out / "partial")
    yield from _fit_groups(config, latents, transform.to(device), backend, out / "partial")
    ranks.barrier()
    codebooks, fitted_counts, fitted_errors = _join_groups(config, latents, out / "partial")
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


def _make_transform(config: FitCodebooksConfig, split: LatentSplit, latents: Latents, vae: FrozenVAE | None, partial: Path) -> Iterator[Event]:
    """Write transform and sensitivity to `partial`, where the other ranks, and a rerun, find them."""
    if ranks.broadcast((partial / _TRANSFORM_NAME).exists()):
        return
    mean = torch.from_numpy(split.mean).float()
    std = standard_deviation(torch.from_numpy(split.variance)).float()
    gradients = None if vae is None else (yield from _calibrate(config, split, latents, std, vae))
    if ranks.rank() == 0:
        plain = LatentTransform(mean=mean, std=std, tokens=config.tokens)
        tensors: dict[str, Tensor] = {}
        if gradients is not None:
            tensors["sensitivity"] = gradients.square().mean(0)
            plain.scale = scale_from_sensitivity(tensors["sensitivity"])
            gradients /= plain.scale * tensors["sensitivity"].mean().sqrt()  # so the metric has mean diagonal 1, however bright the pictures are
        if config.transform != "standardize":
            tensors |= yield from _fit_axes(config, latents, plain.to(latents.device), gradients)
        write_bytes(partial / _TRANSFORM_NAME, save({**plain.cpu().state_dict(), **tensors}))
    ranks.barrier()


def _load_transform(config: FitCodebooksConfig, partial: Path) -> tuple[LatentTransform, Tensor | None]:
    tensors = load_file(partial / _TRANSFORM_NAME)
    parts = {name: tensors.get(name) for name in ("mean", "std", "scale", "axes", "inverse_axes")}
    return LatentTransform(**parts, tokens=config.tokens), tensors.get("sensitivity")  # type: ignore[arg-type]


def _fit_axes(
    config: FitCodebooksConfig, latents: Latents, plain: LatentTransform, gradients: Tensor | None
) -> Generator[Event, None, dict[str, Tensor]]:
    """`axes` (P,P), or (G,Q,Q) with spatial blocks, and `inverse_axes` where they are not orthogonal: one block after the other, so that memory holds
    the covariance of one. `gradients` (n,C,H,W) of the decoder, in the coordinates that the axes start from, make the metric."""
    shape = tuple(plain.mean.shape)
    rows, columns = block = spatial_block(shape, config.tokens)  # type: ignore[arg-type]
    block_shape = (shape[0], rows, columns)
    blocks = plain.mean.numel() // math.prod(block_shape)
    tokens = config.tokens // blocks
    made: dict[str, list[Tensor]] = {"axes": [], "inverse_axes": []}
    yield Begin(task="covariance", total=blocks * len(latents), unit="latents")
    for number in range(blocks):
        covariance, metric = Covariance(block_shape, latents.device), Covariance(block_shape, latents.device)
        for positions, batch in latents.sequential(_BATCH):
            scaled = plain.standardize(batch) * plain.scale
            covariance.add(cut_into_blocks(scaled, block)[:, number].unflatten(1, block_shape))
            yield Advance(done=number * len(latents) + int(positions[-1]) + 1)
        for part in () if gradients is None else gradients.split(_BATCH):
            metric.add(cut_into_blocks(part.to(latents.device), block)[:, number].unflatten(1, block_shape))
        bits = tokens * math.log2(config.codes)
        fitted = fit_axes(covariance.shrunk(), tokens, bits, None if gradients is None else metric.shrunk())
        for name, matrix in zip(made, fitted, strict=True):
            made[name] += [] if matrix is None else [matrix.cpu()]
    return {name: torch.stack(matrices) if blocks > 1 else matrices[0] for name, matrices in made.items() if matrices}


def _calibrate(config: FitCodebooksConfig, split: LatentSplit, latents: Latents, std: Tensor, vae: FrozenVAE) -> Generator[Event, None, Tensor]:
    """(n,C,H,W) gradients J^T v of standardised latents: v are random signs on the decoded values, one per cached latent drawn.

    Their mean outer product is E[J^T J], the metric in which an error of the latent is the squared change of the picture.
    Each rank takes every world_size-th batch. Memory on the CPU: all of them in float32.
    """
    std = std.to(latents.device)
    chosen, draws = torch.randint(len(latents), (config.calibration_samples,), generator=torch.Generator().manual_seed(config.seed)).unique(
        return_inverse=True
    )
    drawn, batches = ResidentLatents(split, latents.rows[chosen.numpy()], device=latents.device), draws.split(16)
    yield Begin(task="decoder sensitivity", total=config.calibration_samples, unit="products")
    mine, done = {}, 0
    for number in range(ranks.rank(), len(batches), ranks.world_size()):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        gradients = []
        for some in drawn.batch(batches[number]).split(_DECODED_AT_ONCE):
            standardised = (some / std).requires_grad_()
            pixels = vae.decode(standardised * std)
            signs = torch.randint(0, 2, pixels.shape, generator=generator).to(pixels) * 2 - 1
            (gradient,) = torch.autograd.grad((pixels * signs).sum(), standardised)
            gradients.append(gradient.cpu())
        mine[number] = torch.cat(gradients)
        done += len(batches[number]) * ranks.world_size()
        yield Advance(done=min(done, config.calibration_samples))
    gathered = {number: value for part in ranks.gather(mine) for number, value in part.items()}
    return torch.cat([gathered[number] for number in range(len(batches))])


def sensitivity_table(sensitivity: Tensor, transform: LatentTransform) -> str:
    """Markdown: one row for each latent channel."""
    level = float(sensitivity.mean())
    rows = [
        f"| {channel} | {float(transform.std[channel].square().mean().sqrt()):.4g} | {float(values.mean()) / level:.4g} "
        f"| {100 * float(values.sum() / sensitivity.sum()):.1f} % | {float(transform.scale[channel].mean()):.3g} |"
        for channel, values in enumerate(sensitivity)
    ]
    head = ["| channel | deviation of the latent | sensitivity (mean 1) | share | scale |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _spans(config: FitCodebooksConfig, latents: Latents, partial: Path) -> dict[tuple[int, int], Path]:
    """Blocks of tokens that are fitted at once, and the file of each; as many as there are ranks, where there are tokens enough, or more."""
    dims = math.prod(latents.latent_shape) // config.tokens
    widest = max(1, min(32, _BLOCK_BYTES // (len(latents) * dims * 4)))
    count = min(config.tokens, max(math.ceil(config.tokens / widest), ranks.world_size()))
    cuts = [config.tokens * block // count for block in range(count + 1)]
    return {(first, last): partial / f"tokens-{first:05d}-{last:05d}.safetensors" for first, last in pairwise(cuts)}


def _fit_groups(config: FitCodebooksConfig, latents: Latents, transform: LatentTransform, backend: str, partial: Path) -> Iterator[Event]:
    """k-means for this rank's share of the blocks of tokens; each finished one is kept in `partial`, so that a rerun goes on there."""
    mine = dict(list(_spans(config, latents, partial).items())[ranks.rank() :: ranks.world_size()])
    errors = [load_file(path)["errors"] for path in mine.values() if path.exists()]
    done = sum(map(len, errors))
    shared = f", rank {ranks.rank()} of {ranks.world_size()}" if ranks.world_size() > 1 else ""
    yield Begin(task=f"k-means ({backend}{shared})", total=sum(last - first for first, last in mine), unit="codebooks", done=done)
    for (first, last), path in mine.items():
        if path.exists():
            continue
        points = _coordinates(latents, transform, first, last)
        seeds = [config.seed * 1_000_003 + token for token in range(first, last)]
        block = _assess(points, kmeans(points, config.codes, iterations=config.iterations, seeds=seeds, backend=backend))
        write_bytes(path, save(block))
        errors.append(block["errors"])
        done += last - first
        yield Advance(done=done, values={"coordinate_mse": float(torch.cat(errors).mean())})


def _join_groups(config: FitCodebooksConfig, latents: Latents, partial: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Codebooks (T,K,D), and over the fitted rows the counts (T,K) of their codes and the mean squared errors (T,)."""
    blocks = [load_file(path) for path in _spans(config, latents, partial).values()]
    joined = {name: torch.cat([block[name] for block in blocks]) for name in ("codebooks", "counts", "errors")}
    return joined["codebooks"], joined["counts"], joined["errors"]


def _coordinates(latents: Latents, transform: LatentTransform, first: int, last: int) -> Tensor:
    """(last-first,N,D) coordinates of those tokens for all latents."""
    parts = [transform.to_coordinates(transform.standardize(batch), first, last) for _, batch in latents.sequential(_BATCH)]
    return torch.cat(parts).transpose(0, 1).contiguous()


def _assess(points: Tensor, codebooks: Tensor) -> dict[str, Tensor]:
    """Codebooks with how often each code is used over `points` (G,N,D), and the mean squared error of each group."""
    indices = nearest_codes(points, codebooks)
    chosen = codebooks.gather(1, indices.unsqueeze(2).expand(-1, -1, codebooks.shape[2]))
    errors = (points - chosen).square().mean((1, 2))
    counts = code_counts(indices.T, codebooks.shape[1])
    return {"codebooks": codebooks.cpu().contiguous(), "counts": counts.cpu(), "errors": errors.cpu()}


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
        **{name: value for name, value in summarize_usage(Path(config.out)).items() if name != "worst_tokens"},
        "seconds": round(seconds, 3),
    }
    if made.sensitivity is not None:
        result["sensitivity_per_channel"] = [float(f"{value:.4g}") for value in made.sensitivity.mean((1, 2))]
    return result
