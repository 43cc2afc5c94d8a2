"""k-means of fit-codebooks, over blocks of tokens: each rank fits its own, and each finished block is a file, so that a rerun goes on there.

Shapes: N latents, B batch, T tokens per image, D dims per token, K codes per codebook, G tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...cache.batches import ResidentLatents, StreamingLatents
from ...files import write_bytes
from ...models.kmeans import kmeans
from ...models.nearest import nearest_codes
from ...models.quantizer import code_counts
from ...models.transform import LatentTransform
from .. import ranks
from ..configs import FitCodebooksConfig
from ..events import Advance, Begin, Event

Latents = ResidentLatents | StreamingLatents  # whichever memory allows: they are only read through, once for each block of tokens
_BLOCK_BYTES = 256 << 20
_BATCH = 1024


def _spans(config: FitCodebooksConfig, latents: Latents, partial: Path) -> dict[tuple[int, int], Path]:
    """Blocks of tokens that are fitted at once, and the file of each; as many as there are ranks, where there are tokens enough, or more."""
    dims = math.prod(latents.latent_shape) // config.tokens
    widest = max(1, min(32, _BLOCK_BYTES // (len(latents) * dims * 4)))
    count = min(config.tokens, max(math.ceil(config.tokens / widest), ranks.world_size()))
    cuts = [config.tokens * block // count for block in range(count + 1)]
    return {(first, last): partial / f"tokens-{first:05d}-{last:05d}.safetensors" for first, last in pairwise(cuts)}


def fit_blocks(config: FitCodebooksConfig, latents: Latents, transform: LatentTransform, backend: str, partial: Path) -> Iterator[Event]:
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


def join_blocks(config: FitCodebooksConfig, latents: Latents, partial: Path) -> tuple[Tensor, Tensor, Tensor]:
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
