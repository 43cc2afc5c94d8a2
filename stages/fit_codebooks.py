"""Stage two, first half: fit one codebook for each token position, from cached latents alone.

    revq fit-codebooks STORE OUT --tokens 512 --codes 16384

In: a latent store. Out: a folder with `codebooks.safetensors` (transform, codebooks, usage) and `config.json`.
Only the `decoder` transform needs the VAE, for its calibration: how much each latent position moves the picture.

Shapes: N latents, B batch, C,H,W latent channels, rows, columns, P = C*H*W, T tokens per image, D = P/T dims, K codes per codebook.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..cache.batches import ResidentLatents, spread_rows
from ..cache.store import LatentSplit, LatentStore
from ..errors import CodebookError, ConfigError
from ..files import claim_output, write_bytes
from ..models.codebooks import CODEBOOKS_KIND, CODEBOOKS_NAME, Codebooks, check_finite, load_codebooks, save_codebooks
from ..models.device import pick_device
from ..models.kmeans import BACKENDS, kmeans, pick_backend
from ..models.nearest import nearest_codes
from ..models.quantizer import code_counts, perplexity, usage
from ..models.transform import KINDS, MAX_DENSE_POSITIONS, Covariance, LatentTransform, fit_rotation, scale_from_sensitivity, standard_deviation
from ..models.vae import FrozenVAE
from . import ranks
from .events import Advance, Begin, Event, Note, Result

_BLOCK_BYTES = 256 << 20
_BATCH = 1024


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
    """k-means by "faiss", "torch", or whichever suits the device ("auto")."""
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

    def identity(self, store: LatentStore) -> dict[str, Any]:
        """What shapes the codebooks: a folder with another identity is another run's."""
        names = ("split", "tokens", "codes", "transform", "iterations", "max_samples", "rectifier_share", "seed")
        calibration = {"calibration_samples": self.calibration_samples} if self.transform == "decoder" else {}
        return {"store_fingerprint": store.fingerprint, **{name: getattr(self, name) for name in names}, **calibration}


def fit_codebooks(config: FitCodebooksConfig) -> Iterator[Event]:
    """Fit transform and codebooks; yields progress, then a `Result`.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, OutputError, ConfigError: see their messages.
    """
    ranks.refuse_many("fit-codebooks")
    started = time.perf_counter()
    device = pick_device(config.device)
    backend = pick_backend(config.backend, device)
    store = LatentStore.open(config.store)
    split = store[config.split]
    rows = _fit_rows(config, split)
    _check_sizes(config, store, len(rows))
    vae = FrozenVAE.load_recorded(store.encoding.vae, spec=config.vae, device=device) if config.transform == "decoder" else None
    out = Path(config.out)
    claim_output(out, kind=CODEBOOKS_KIND, identity=config.identity(store), overwrite=config.overwrite)
    if (out / CODEBOOKS_NAME).exists():
        yield Note(text=f"{out} is complete already")
        yield Result(value=_result(config, load_codebooks(out), mse=None, latents=len(rows), seconds=0.0))
        return
    if len(rows) < 39 * config.codes:
        few = f"{len(rows)} latents for {config.codes} codes are {len(rows) / config.codes:.1f} per code"
        yield Note(text=f"{few}, FAISS advises 39; more images or --views help")
    latents = ResidentLatents(split, rows, device=device)
    transform, sensitivity = yield from _fit_transform(config, split, latents, vae)
    codebooks, counts, mse = yield from _fit_groups(config, latents, transform.to(device), backend, out / "partial")
    check_finite(codebooks)
    made = Codebooks(transform=transform, codebooks=codebooks, counts=counts, sensitivity=sensitivity, identity=config.identity(store))
    save_codebooks(out, made)
    shutil.rmtree(out / "partial", ignore_errors=True)
    yield Result(value=_result(config, made, mse=mse, latents=len(rows), seconds=time.perf_counter() - started))


def _fit_rows(config: FitCodebooksConfig, split: LatentSplit) -> Any:
    """Sorted rows of the split to fit on: readable, of the images not kept for the rectifier, at most `max_samples`."""
    rows = spread_rows(split, config.rectifier_share, "first")
    if config.max_samples is None or config.max_samples >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))[: config.max_samples]
    return rows[chosen.sort().values.numpy()]


def _check_sizes(config: FitCodebooksConfig, store: LatentStore, latents: int) -> None:
    positions = math.prod(store.encoding.latent_shape)
    if positions > MAX_DENSE_POSITIONS and config.transform != "standardize":
        limit = f"the {config.transform} transform takes at most {MAX_DENSE_POSITIONS} latent positions"
        raise CodebookError(f"{limit}, the store has {positions}; use --transform standardize")
    if latents < config.codes:
        raise CodebookError(f"{latents} latents cannot fill {config.codes} codes; use --codes {latents} or fewer, or encode more images or views")
    LatentTransform(mean=torch.zeros(store.encoding.latent_shape), std=torch.ones(store.encoding.latent_shape), tokens=config.tokens)


def _fit_transform(
    config: FitCodebooksConfig, split: LatentSplit, latents: ResidentLatents, vae: FrozenVAE | None
) -> Generator[Event, None, tuple[LatentTransform, Tensor | None]]:
    mean = torch.from_numpy(split.mean).float()
    std = standard_deviation(torch.from_numpy(split.variance)).float()
    sensitivity = None
    scale = None
    if vae is not None:
        sensitivity = yield from _calibrate(config, latents, std, vae)
        scale = scale_from_sensitivity(sensitivity)
    transform = LatentTransform(mean=mean, std=std, tokens=config.tokens, scale=scale).to(latents.device)
    if config.transform == "standardize":
        return transform, None
    covariance = Covariance((mean.shape[0], mean.shape[1], mean.shape[2]), latents.device)
    yield Begin(task="covariance", total=len(latents), unit="latents")
    for batch in torch.arange(len(latents)).split(_BATCH):
        covariance.add(transform.standardize(latents.batch(batch)) * transform.scale)
        yield Advance(done=int(batch[-1]) + 1)
    rotation = fit_rotation(covariance.shrunk(), config.tokens)
    return LatentTransform(mean=mean, std=std, tokens=config.tokens, scale=scale, rotation=rotation.cpu()), sensitivity


def _calibrate(config: FitCodebooksConfig, latents: ResidentLatents, std: Tensor, vae: FrozenVAE) -> Generator[Event, None, Tensor]:
    """h = E[(J^T v)^2] for standardised latents: v are random signs on the decoded values, one per cached latent drawn."""
    generator = torch.Generator().manual_seed(config.seed)
    std = std.to(latents.device)
    total = torch.zeros_like(std)
    draws = torch.randint(len(latents), (config.calibration_samples,), generator=generator)
    yield Begin(task="decoder sensitivity", total=len(draws), unit="products")
    for done, part in enumerate(draws.split(16)):
        standardised = (latents.batch(part) / std).requires_grad_()
        pixels = vae.decode(standardised * std)
        signs = torch.randint(0, 2, pixels.shape, generator=generator).to(pixels) * 2 - 1
        (gradient,) = torch.autograd.grad((pixels * signs).sum(), standardised)
        total += gradient.square().sum(0)
        yield Advance(done=done * 16 + len(part))
    return (total / len(draws)).cpu()


def _fit_groups(
    config: FitCodebooksConfig, latents: ResidentLatents, transform: LatentTransform, backend: str, partial: Path
) -> Generator[Event, None, tuple[Tensor, Tensor, float]]:
    """k-means token by token, a block of tokens at a time; each finished block is kept in `partial`, so that a rerun goes on there."""
    dims = transform.mean.numel() // config.tokens
    width = max(1, min(config.tokens, 32, _BLOCK_BYTES // (len(latents) * dims * 4)))
    blocks = []
    spans = [(first, min(first + width, config.tokens)) for first in range(0, config.tokens, width)]
    paths = {span: partial / f"tokens-{span[0]:05d}-{span[1]:05d}.safetensors" for span in spans}
    done = sum(last - first for (first, last), path in paths.items() if path.exists())
    yield Begin(task=f"k-means ({backend})", total=config.tokens, unit="codebooks", done=done)
    for (first, last), path in paths.items():
        if not path.exists():
            points = _coordinates(latents, transform, first, last)
            codebooks = kmeans(
                points, config.codes, iterations=config.iterations, seeds=[config.seed * 1_000_003 + t for t in range(first, last)], backend=backend
            )
            write_bytes(path, save(_assess(points, codebooks)))
        blocks.append(load_file(path))
        if last > done:
            yield Advance(done=last, values={"mse": float(torch.cat([block["errors"] for block in blocks]).mean())})
    joined = {name: torch.cat([block[name] for block in blocks]) for name in ("codebooks", "counts", "errors")}
    return joined["codebooks"], joined["counts"], float(joined["errors"].mean())


def _coordinates(latents: ResidentLatents, transform: LatentTransform, first: int, last: int) -> Tensor:
    """(last-first,N,D) coordinates of those tokens for all latents."""
    batches = torch.arange(len(latents)).split(_BATCH)
    parts = [transform.to_coordinates(transform.standardize(latents.batch(batch)), first, last) for batch in batches]
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
        "usage": spread(usage(made.counts)),
        "perplexity": spread(perplexity(made.counts)),
        "seconds": round(seconds, 3),
    }
    if made.sensitivity is not None:
        result["sensitivity_per_channel"] = [float(f"{value:.4g}") for value in made.sensitivity.mean((1, 2))]
    return result


def spread(values: Tensor) -> dict[str, float]:
    """Smallest, median and largest of (T,) values."""
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}
