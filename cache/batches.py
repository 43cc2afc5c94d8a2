"""From a split on disk to batches on the device: rows are read once and stay there, so that an epoch costs no reading at all.

Shapes: N rows; B batch; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import StoreError
from .store import LatentSplit

_MAX_READERS = 8


class ResidentLatents:
    """The ok rows of a split, or some of them, in one tensor on the device.

    Memory: N*C*H*W values of `dtype` on the device, and a few shards on the host while reading.
    """

    rows: NDArray[np.int64]
    """(N,) row in the split of each latent held here."""
    latents: Tensor
    """(N,C,H,W) in `dtype`, raw."""

    def __init__(
        self, split: LatentSplit, rows: NDArray[np.integer] | None = None, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        """Read the latents.

        Args:
            rows: which rows of the split, in any order; those of failed images are left out. None means all.
            device: where the tensor lies.
            dtype: in which it is held; None means as on disk.

        Raises:
            StoreError: no row is ok, a chunk is damaged, or a value is not finite.
        """
        wanted = np.arange(len(split)) if rows is None else np.asarray(rows, np.int64)
        self.rows = wanted[split.ok[wanted]]
        if len(self.rows) == 0:
            raise StoreError(f'split "{split.name}" has no readable row among the {len(wanted)} asked for; encode more images')
        dtype = dtype or getattr(torch, str(split.latents.dtype))
        self.latents = torch.empty(len(self.rows), *split.latents.shape[1:], dtype=dtype, device=device)
        self._read(split)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def device(self) -> torch.device:
        return self.latents.device

    def batch(self, index: Tensor) -> Tensor:
        """index (B,) positions in `latents` -> (B,C,H,W) float32 on the device."""
        return self.latents.index_select(0, index.to(self.latents.device)).float()

    def _read(self, split: LatentSplit) -> None:
        """Whole shards in parallel: each is read once, whatever the order of the rows."""
        order = np.argsort(self.rows, kind="stable")
        shard_of = self.rows[order] // split.shard_rows
        cuts = np.flatnonzero(np.diff(shard_of)) + 1
        groups = np.split(order, cuts)
        readers = min(_MAX_READERS, os.cpu_count() or 1, len(groups))
        with ThreadPoolExecutor(readers, thread_name_prefix="revq-latents") as pool:
            for future in [pool.submit(self._read_shard, split, group) for group in groups]:
                future.result()

    def _read_shard(self, split: LatentSplit, positions: NDArray[np.int64]) -> None:
        """Fill `latents[positions]`, whose rows lie in one shard."""
        rows = self.rows[positions]
        start, stop = int(rows.min()), int(rows.max()) + 1
        try:
            block = np.asarray(split.latents[start:stop])
        except Exception as error:  # zarr raises ValueError, RuntimeError and its codecs' own for a chunk whose checksum does not fit
            raise StoreError(
                f'rows {start} to {stop - 1} of split "{split.name}" cannot be read ({error}); encode it again with --overwrite'
            ) from error
        values = torch.from_numpy(block[rows - start]).to(self.latents.dtype)
        finite = torch.isfinite(values).flatten(1).all(1)
        if not bool(finite.all()):
            row = int(rows[int((~finite).nonzero()[0, 0])])
            raise StoreError(
                f'row {row} of split "{split.name}" is not finite in {self.latents.dtype}; encode it again with --dtype float32 --overwrite'
            )
        if len(positions) == int(positions[-1]) - int(positions[0]) + 1 and bool((np.diff(positions) == 1).all()):
            self.latents[int(positions[0]) : int(positions[-1]) + 1] = values.to(self.latents.device)
        else:
            self.latents[torch.from_numpy(positions).to(self.latents.device)] = values.to(self.latents.device)


def split_rows(split: LatentSplit, holdout_fraction: float, part: Literal["train", "holdout"]) -> NDArray[np.int64]:
    """The ok rows of one part of a split when the last `holdout_fraction` of its images is held out, whole images with all their views.

    At least one image is held out where the fraction is above 0, and at least one is not.

    Raises:
        StoreError: the split has too few images to be parted.
    """
    held_out = round(holdout_fraction * split.images)
    if holdout_fraction > 0:
        if split.images < 2:
            raise StoreError(f'split "{split.name}" has a single image, so none can be held out; encode more images, or a split of their own')
        held_out = min(max(held_out, 1), split.images - 1)
    first = (split.images - held_out) * split.views
    rows = np.arange(first) if part == "train" else np.arange(first, len(split))
    return rows[split.ok[rows]].astype(np.int64)


def spread_rows(split: LatentSplit, share: float, part: Literal["first", "second"]) -> NDArray[np.int64]:
    """The ok rows of one part of a split when `share` of its images go to the second part, whole images with all their views."""
    second = spread_images(split.images, share)
    rows = np.flatnonzero(np.repeat(second if part == "second" else ~second, split.views))
    return rows[split.ok[rows]].astype(np.int64)


def spread_images(images: int, share: float) -> NDArray[np.bool_]:
    """(images,) True for `share` of them, spread evenly, since a split's order is often by class; none where the share is 0."""
    marks = np.floor(np.arange(images + 1) * share + 1e-9)
    return np.diff(marks) > 0


def epoch_permutation(n: int, seed: int, epoch: int) -> Tensor:
    """(n,) int64: the order of one epoch, a pure function of its arguments, so that a resumed run needs no generator's history."""
    digest = hashlib.sha256(f"revq epoch {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(n, generator=generator)
