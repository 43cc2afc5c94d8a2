"""One shard of latents: images read and decoded ahead, encoded in batches, with the rows of its manifest.

Shapes: B rows in a batch; C,H,W latent channels, rows, columns; S image side.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.images import Pixels
from ...cache.manifest import FAILED, OK, ManifestRow
from ...cache.precision import ENOUGH_ROWS
from ...cache.writer import Shard
from ...errors import StoreError
from ..events import Event
from .failures import report_failure
from .job import EncodingJob
from .loading import EncodingProgress, LoadedImage


def encode_shard(
    job: EncodingJob, shard: Shard, loaded: Iterator[LoadedImage], progress: EncodingProgress
) -> Generator[Event, None, tuple[NDArray[Any], list[ManifestRow]]]:
    """The latents (rows of the shard,C,H,W) and the manifest rows of one shard; an event after each batch."""
    config = job.config
    latents = np.zeros((len(shard), *job.encoding.latent_shape), config.dtype)
    rows: list[ManifestRow] = []
    waiting: list[tuple[int, Pixels]] = []  # (row in the shard, pixels) not encoded yet
    running: list[tuple[list[int], Tensor]] = []  # batches given to the device, not fetched yet
    images = images_of(shard, config.views)
    for image in itertools.islice(loaded, len(images)):
        first_row, last = len(rows), image.index == images[-1]
        rows += _manifest_rows(job, image)
        waiting += [(first_row + view, pixels) for view, pixels in enumerate(image.pixels)]
        progress.images += 1
        progress.images_this_run += 1
        if image.reason:
            yield from report_failure(job, image, progress)
        while len(waiting) >= config.batch_size or (waiting and last):
            batch, waiting = waiting[: config.batch_size], waiting[config.batch_size :]
            running.append(([row for row, _ in batch], _launch(job, [pixels.array for _, pixels in batch])))
            if len(running) > 1:  # fetch a batch only when the next one is under way, so that a GPU never waits for the host
                _fetch(job, *running.pop(0), latents, rows)
            if not last:
                yield progress.advance()
    for positions, batch_latents in running:
        _fetch(job, positions, batch_latents, latents, rows)
    yield progress.advance()  # also where the last images cannot be read, and no batch ends with them
    return latents, rows


def _launch(job: EncodingJob, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """pixels B x (3,S,S) -> latents (B,C,H,W) float32 on the VAE's device, which on a GPU are still being computed."""
    images = torch.from_numpy(np.stack(pixels))
    if job.vae.device.type == "cuda":
        images = images.pin_memory()  # a copy from pageable memory would wait for the batch before
    return job.vae.encode(images.to(job.vae.device, non_blocking=True).float().div_(127.5).sub_(1))


def _fetch(job: EncodingJob, positions: list[int], batch_latents: Tensor, latents: NDArray[Any], rows: Sequence[ManifestRow]) -> None:
    """Bring a batch's latents (B,C,H,W) to `latents[positions]` in the store's dtype.

    Raises:
        StoreError: a value is not finite, in itself or in that dtype, or that dtype rounds off more than a percent of what a channel varies.
    """
    computed = batch_latents.cpu()
    values = computed.to(getattr(torch, job.config.dtype))
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        key = rows[positions[int((~finite).nonzero()[0, 0])]].key
        too_large = bool(torch.isfinite(computed).all())
        mend = "encode with --dtype float32 (and --overwrite)" if too_large else "use another VAE or leave the image out"
        raise StoreError(f"the latent of image {key} of {job.source.name} is not finite{too_large * f' in {job.config.dtype}'}; {mend}")
    latents[positions] = values.numpy()
    if job.rounding.rows < ENOUGH_ROWS:
        job.rounding.add(computed.numpy(), values.numpy())
        if job.rounding.rows >= ENOUGH_ROWS:
            job.rounding.check(job.config.dtype)


def _manifest_rows(job: EncodingJob, image: LoadedImage) -> list[ManifestRow]:
    """One row for each view, failed or not, so that no failure shifts another image's rows."""
    item, views = job.source.items[image.index], job.config.views
    common: dict[str, Any] = {"source": job.source.name, "key": item.key, "sha256": image.sha256}
    common |= {"label": job.numbering.label(item), "class_name": item.class_name}
    if image.reason:
        return [ManifestRow(row=image.index * views + view, view=view, status=FAILED, reason=image.reason, **common) for view in range(views)]
    rows = []
    for view, pixels in enumerate(image.pixels):
        left, top, right, bottom = pixels.box
        box: dict[str, Any] = {"left": left, "top": top, "right": right, "bottom": bottom, "flipped": pixels.flipped}
        size: dict[str, Any] = {"width": pixels.width, "height": pixels.height}
        rows.append(ManifestRow(row=image.index * views + view, view=view, status=OK, **common, **box, **size))
    return rows


def images_of(shard: Shard, views: int) -> range:
    """Positions in the source of a shard's images; a shard holds whole images."""
    return range(shard.start // views, shard.stop // views)
