"""What train-rectifier reads: the latents of this rank, and the order in which they come.

A global batch is composed in the same way whatever the number of ranks. The train rows, in the store's order, are cut into as many runs
(strata) as a batch has latents; a batch takes one latent of each stratum, in an order of that stratum's own. So with R ranks a rank needs
one R-th of the strata, which is one contiguous part of the store, and reads nothing else.

Shapes: N rows of all ranks, B latents in a global batch, R ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..cache.batches import ResidentLatents, epoch_permutation, split_rows, spread_rows
from ..cache.store import LatentSplit, LatentStore
from ..errors import CodebookError, ConfigError, MismatchError, TrainingError
from ..models.codebooks import Codebooks
from ..models.device import pick_device
from ..models.quantizer import MultiGroupQuantizer
from ..models.transform import LatentTransform
from ..models.vae import FrozenVAE
from . import ranks
from .objectives import open_lpips

if TYPE_CHECKING:
    from .train_rectifier import TrainRectifierConfig

_HELD_OUT_SHARE = 0.02
_QUANTIZE_BATCH = 256
_QUANTIZED_TABLE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What training reads and never changes."""

    store: LatentStore
    transform: LatentTransform
    train: ResidentLatents
    """This rank's part of the train rows."""
    rows: int
    """N, train rows of all ranks."""
    val: ResidentLatents
    """This rank's part of the validation rows."""
    val_rows: int
    """Validation rows of all ranks."""
    val_name: str
    device: torch.device
    vae: FrozenVAE | None
    """None where neither the last phase nor previews need it."""
    lpips: nn.Module | None
    """None where `finish_lpips` is 0."""

    def batch_size(self, wanted: int) -> int:
        """`wanted`, or as many latents as there are; a multiple of the ranks."""
        size = ranks.world_size()
        return min(wanted, self.rows - self.rows % size)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the train latents."""
        return self.rows // self.batch_size(batch_size)

    def positions(self, batch_size: int, seed: int, step: int) -> Tensor:
        """(B/R,) positions in `train` of this rank's part of batch number `step`, on the device: a pure function of seed and step."""
        strata = self.batch_size(batch_size)
        epoch, within = divmod(step, self.rows // strata)
        return _epoch_order(self.rows, strata, ranks.rank(), ranks.world_size(), seed, epoch, self.device)[within]


# Shuffling a million rows takes as long as a step; an epoch's order is the same at each of its steps.
@functools.lru_cache(maxsize=1)
def _epoch_order(rows: int, strata: int, rank: int, world_size: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """(rows // strata, strata / world_size) positions in this rank's part: batch by batch, one latent of each of the rank's strata."""
    first, batches = rank * rows // world_size, rows // strata
    columns = []
    for stratum in range(rank * strata // world_size, (rank + 1) * strata // world_size):
        start, stop = stratum * rows // strata, (stratum + 1) * rows // strata
        order = epoch_permutation(stop - start, seed * 1_000_003 + stratum, epoch)
        columns.append(start - first + order[:batches])
    return torch.stack(columns, 1).to(device)


@dataclass(frozen=True, kw_only=True)
class FrozenTable:
    """Latents that were quantized once, because the codebooks do not change; a batch is a look-up."""

    tokens: Tensor
    """(N,T) int32 indices."""
    quantized: Tensor | None
    """(N,C,H,W) float32 quantized standardised latents: where they fit, even the way back from coordinates is spared. None where they do not."""

    def batch(self, index: Tensor, transform: LatentTransform, quantizer: MultiGroupQuantizer) -> Tensor:
        """(B,) positions -> (B,C,H,W) quantized standardised latents."""
        index = index.to(self.tokens.device)
        if self.quantized is not None:
            return self.quantized.index_select(0, index)
        return transform.from_coordinates(quantizer.decode(self.tokens.index_select(0, index).long()))


@torch.no_grad()
def quantize_once(latents: ResidentLatents, transform: LatentTransform, quantizer: MultiGroupQuantizer) -> FrozenTable:
    """The table of all of `latents`."""
    tokens, quantized = [], []
    keep = latents.latents.numel() * 4 <= _QUANTIZED_TABLE_BYTES
    for index in torch.arange(len(latents)).split(_QUANTIZE_BATCH):
        indices = quantizer.encode(transform(latents.batch(index)))
        tokens.append(indices.int())
        if keep:
            quantized.append(transform.from_coordinates(quantizer.decode(indices)))
    return FrozenTable(tokens=torch.cat(tokens), quantized=torch.cat(quantized) if keep else None)


def open_inputs(config: TrainRectifierConfig, store: LatentStore, fitted: Codebooks) -> Inputs:
    """Open everything before anything slow, and choose the rows: rectifier and codebooks may see different images.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, TrainingError, ConfigError: see their messages.
    """
    _check_store(store, fitted)
    _check_ranks(config)
    device = pick_device(config.device)
    split, rows, val_split, val_rows, val_name = _choose_rows(config, store, fitted.identity["rectifier_share"])
    vae = lpips = None
    if config.width and (config.finish_steps or config.previews):
        vae = FrozenVAE.load_recorded(store.encoding.vae, spec=config.vae, device=device)
    if config.width and config.finish_steps and config.finish_lpips:
        lpips = open_lpips(store.encoding.image_size, device)
    return Inputs(
        store=store,
        transform=fitted.transform.to(device),
        train=ResidentLatents(split, _part(rows), device=device),
        rows=len(rows),
        val=ResidentLatents(val_split, _part(val_rows), device=device),
        val_rows=len(val_rows),
        val_name=val_name,
        device=device,
        vae=vae,
        lpips=lpips,
    )


def _choose_rows(
    config: TrainRectifierConfig, store: LatentStore, share: float
) -> tuple[LatentSplit, NDArray[np.int64], LatentSplit, NDArray[np.int64], str]:
    """Split and rows to train on, split and rows to validate on, and what the latter are called."""
    split = store[config.split]
    rows = spread_rows(split, share, "second" if share else "first")
    if config.val_split in store.splits:
        val_split, val_name = store[config.val_split], config.val_split
        val_rows = np.flatnonzero(val_split.ok)
    else:
        val_split, val_name = split, f"last 2 % of {config.split}"
        val_rows = split_rows(split, _HELD_OUT_SHARE, "holdout")
        rows = np.setdiff1d(rows, val_rows)
    for name, found in ((f"train on in split {config.split!r}", rows), (f"validate on in {val_name}", val_rows)):
        if len(found) < ranks.world_size():
            left = f"{len(found)} latents are left" if len(found) else "no latents are left"
            raise TrainingError(f"{left} to {name} of {store.path}; encode more images")
    return split, rows, val_split, val_rows, val_name


def _part(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """This rank's contiguous part of the rows."""
    rank, size = ranks.rank(), ranks.world_size()
    return rows[rank * len(rows) // size : (rank + 1) * len(rows) // size]


def _check_ranks(config: TrainRectifierConfig) -> None:
    size = ranks.world_size()
    for name in ("batch_size", "finish_batch_size") if config.finish_steps else ("batch_size",):
        value = getattr(config, name)
        if value % size:
            nearest = max(size, value - value % size)
            raise ConfigError(f"{name.replace('_', '-')} is that of all processes together and must be a multiple of their number {size}, "
                              f"not {value}; {nearest} is")  # fmt: skip


def _check_store(store: LatentStore, fitted: Codebooks) -> None:
    if fitted.identity["store_fingerprint"] != store.fingerprint:
        raise MismatchError(
            f"the codebooks were fitted on latents of fingerprint {fitted.identity['store_fingerprint']}, but {store.path} has {store.fingerprint} "
            "(another VAE, image size or crop); fit codebooks on this store"
        )
    if fitted.transform.mean.shape != torch.Size(store.encoding.latent_shape):
        raise CodebookError(
            f"the codebooks are for latents of shape {tuple(fitted.transform.mean.shape)}, the store has {store.encoding.latent_shape}"
        )
