"""Which rows of a split go where, and in what order: parts for ranks, for validation and for the rectifier; the order of an epoch.

Shapes: N rows, n of them.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import StoreError
from .store import LatentSplit


def rank_rows(rows: NDArray[np.integer], rank: int, world_size: int) -> NDArray[np.int64]:
    """Those of `rows` that are rank's: runs of the same length within one, so that ranks have the same number of batches, or one of them one more.

    A run is whole shards but for its two ends, where its neighbours read the other chunks.
    """
    return np.array_split(np.asarray(rows, np.int64), world_size)[rank]


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
    return permutation(n, f"revq epoch {seed} {epoch}")


def permutation(n: int, key: str) -> Tensor:
    """(n,) int64: an order that is a pure function of n and `key`."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(n, generator=generator)
