"""Crops of an image source in fixed batches, loaded ahead by threads, each rank its own batches.

Batch b holds the images b*B .. (b+1)*B - 1 of the source, whichever of them can be read, and belongs to rank b modulo the number of ranks. So
a batch is the same pictures in every run, and its numbers are the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.crops import load_square
from ...cache.images import UnreadableImage, read_ahead
from ...cache.sources import ImageSource


@dataclass(frozen=True)
class Crop:
    """One image; `pixels` (3,S,S) uint8 is None where it cannot be read, for `reason`."""

    index: int
    pixels: NDArray[np.uint8] | None
    digest: bytes = b""
    """SHA-256 of the pixels."""
    enlarged: bool = False
    """The image is smaller than the crop."""
    reason: str = ""


@dataclass(frozen=True)
class Batch:
    """The readable crops of one batch, and the others."""

    number: int
    crops: list[Crop]
    failed: list[Crop]

    def pixels(self) -> Tensor:
        """(B,3,S,S) uint8."""
        return torch.from_numpy(np.stack([crop.pixels for crop in self.crops if crop.pixels is not None]))


@dataclass(frozen=True, kw_only=True)
class Loader:
    """How crops are made, and how many at once."""

    source: ImageSource
    image_size: int
    crop: str
    """One of `cache.crops.CROPS`."""
    batch_size: int
    workers: int

    def load(self, index: int) -> Crop:
        """Image `index` of the source."""
        item = self.source.items[index]
        try:
            square = load_square(self.source.read(index), self.image_size, crop=self.crop, box=item.box)
        except UnreadableImage as error:
            return Crop(index, None, reason=error.reason)
        except OSError as error:
            return Crop(index, None, reason=error.strerror or type(error).__name__)
        return Crop(index, square.pixels, hashlib.sha256(square.pixels.data).digest(), square.shorter_side < self.image_size)

    def share(self, images: int, *, rank: int, ranks: int) -> int:
        """How many of so many images are in this rank's batches."""
        return sum(min(self.batch_size, images - start) for start in range(0, images, self.batch_size)[rank::ranks])

    def batches(self, indices: Sequence[int], *, rank: int, ranks: int, skip: int = 0) -> Iterator[Batch]:
        """This rank's batches of the images `indices`, but for the first `skip`."""
        parts = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        numbers = range(rank, len(parts), ranks)[skip:]
        crops = read_ahead(self.load, (i for number in numbers for i in parts[number]), workers=self.workers, ahead=2 * self.batch_size)
        for number in numbers:
            found = [next(crops) for _ in parts[number]]
            yield Batch(number, [crop for crop in found if crop.pixels is not None], [crop for crop in found if crop.pixels is None])
