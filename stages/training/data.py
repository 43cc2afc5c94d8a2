"""What train-rectifier reads: the latents of this rank, and the order in which they come.

A global batch is composed in the same way whatever the number of ranks. The train rows, in the store's order, are cut into as many runs
(strata) as a batch has latents; a batch takes one latent of each stratum, in an order of that stratum's own. So with R ranks a rank needs
one R-th of the strata, which is one contiguous part of the store, and reads nothing else. (Latents that do not fit in memory are streamed
instead: the order is then that of the rank's shards, and with another number of ranks the batches are others.)

Shapes: N rows of all ranks, B latents in a global batch, R ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.batches import Batch, ResidentLatents, StreamingLatents, open_reader, reader_that_fits
from ...cache.rows import epoch_permutation, split_rows, spread_rows
from ...cache.store import LatentSplit, LatentStore
from ...errors import CodebookError, ConfigError, MismatchError, StoreError, TrainingError
from ...models.codebooks import Codebooks
from ...models.device import pick_device
from ...models.transform import LatentTransform
from ...models.vae import FrozenVAE
from .. import ranks
from ..configs import TrainRectifierConfig
from .frozen_tokens import table_bytes

_HELD_OUT_SHARE = 0.02
_MAY_BE_ABSENT = ("val", "none")  # the default, and what asks for latents held out though there is a split


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What training reads and never changes."""

    store: LatentStore
    transform: LatentTransform
    train: ResidentLatents | StreamingLatents
    """This rank's part of the train rows."""
    stream: Stream | None
    """The batches of a streaming `train`; None where it is resident."""
    rows: int
    """N, train rows of all ranks."""
    val: ResidentLatents
    """This rank's part of the validation rows."""
    val_rows: int
    """Validation rows of all ranks."""
    val_name: str
    device: torch.device
    vae: FrozenVAE | None
    """None where neither the decoder phase nor previews need it."""

    def batch_size(self, wanted: int) -> int:
        """`wanted`, or as many latents as there are; a multiple of the ranks."""
        size = ranks.world_size()
        return min(wanted, self.rows - self.rows % size)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass over the train latents."""
        return self.rows // self.batch_size(batch_size)

    def take(self, batch_size: int, seed: int, step: int) -> Batch:
        """This rank's part of batch number `step`: (B/R,) positions in `train` and the latents (B/R,C,H,W). A pure function of seed and step."""
        size = self.batch_size(batch_size)
        epoch, within = divmod(step, self.rows // size)
        if self.stream is not None:
            return self.stream.take(size // ranks.world_size(), seed, epoch, within)
        positions = self.positions(size, seed, epoch)[within]
        assert isinstance(self.train, ResidentLatents)
        return positions, self.train.batch(positions)

    def positions(self, size: int, seed: int, epoch: int) -> Tensor:
        """(batches, B/R) positions in a resident `train`: an epoch's order, where the latents lie."""
        assert isinstance(self.train, ResidentLatents)
        return _epoch_order(self.rows, size, ranks.rank(), ranks.world_size(), seed, epoch, self.train.latents.device)


class Stream:
    """Consecutive batches of streamed latents, read ahead; anywhere else it starts anew, as after a resume."""

    def __init__(self, latents: StreamingLatents) -> None:
        self._latents = latents
        self._batches: Iterator[Batch] = iter(())
        self._next: tuple[int, int, int, int] | None = None

    def take(self, size: int, seed: int, epoch: int, number: int) -> Batch:
        """Batch `number` of an epoch; raises StoreError where a chunk is damaged."""
        if self._next != (size, seed, epoch, number):
            self._batches = iter(self._latents.epoch(batch_size=size, seed=seed, epoch=epoch, first_batch=number))
        self._next = (size, seed, epoch, number + 1)
        return next(self._batches)


# Shuffling a million rows takes as long as a step; an epoch's order is the same at each of its steps. Copying it waits for a GPU, once an epoch.
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


def _open_train(split: LatentSplit, rows: NDArray[np.int64], device: torch.device, how: str, beside_bytes: int) -> ResidentLatents | StreamingLatents:
    """`how` is "auto", "resident" or "stream". All ranks stream where one must: resident and streamed latents come in different orders."""
    if how != "stream":
        fitting = ranks.gather(reader_that_fits(split, rows, device, beside_bytes=beside_bytes))
        if how == "auto" and "stream" in fitting:
            how = "stream"
        elif device.type == "cuda" and fitting[ranks.rank()] != "resident":
            how = "pinned"
    return open_reader(how, split, rows, device)


def open_inputs(config: TrainRectifierConfig, store: LatentStore, fitted: Codebooks, began: str | None = None) -> Inputs:
    """Open everything before anything slow, and choose the rows: rectifier and codebooks may see different images.

    Args:
        began: "resident" or "stream", what the run to be resumed began with, which `latents` = "auto" keeps to; None where it is new.

    Raises:
        StoreError, CodebookError, MismatchError, VAEError, TrainingError, ConfigError: see their messages.
    """
    _check_store(store, fitted)
    check_ranks(config)
    device = pick_device(config.device)
    split, rows, val_split, val_rows, val_name = _choose_rows(config, store, fitted.identity["rectifier_share"])
    vae = None
    if config.width and (config.decoder_steps or config.previews):
        vae = FrozenVAE.load_recorded(store.encoding.vae, spec=config.vae, device=device)
    own = _part(rows)
    tokens, codes, _ = fitted.codebooks.shape
    beside = table_bytes(len(own), store.encoding.latent_shape, tokens, codes) if config.codebook_lr == 0 else 0
    train = _open_train(split, own, device, began or "auto" if config.latents == "auto" else config.latents, beside)
    return Inputs(
        store=store,
        transform=fitted.transform.to(device),
        train=train,
        stream=Stream(train) if isinstance(train, StreamingLatents) else None,
        rows=len(rows),
        val=ResidentLatents(val_split, _part(val_rows), device=device),
        val_rows=len(val_rows),
        val_name=val_name,
        device=device,
        vae=vae,
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
    elif config.val_split not in _MAY_BE_ABSENT:  # a mistyped name must not hold out other latents without a word
        raise StoreError(f'{store.path} has no split "{config.val_split}" to validate on, only {", ".join(store.splits)}')
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


def check_ranks(config: TrainRectifierConfig) -> None:
    """Raise ConfigError where the processes cannot share a batch evenly."""
    size = ranks.world_size()
    for name in ("batch_size", "decoder_batch_size") if config.decoder_steps else ("batch_size",):
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
