"""What a run of encode-latents shares: the source, the VAE, the plan of the split, the numbers of its classes; and its result.

Shapes: C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...cache.classes import Numbering, classes_in, number_in_store
from ...cache.precision import RoundingSums
from ...cache.sources import ImageSource, order_sha256
from ...cache.store import Encoding
from ...cache.store_folder import StoreFolder
from ...cache.writer import SplitPlan, shard_layout
from ...models.device import pick_device
from ...models.vae import FrozenVAE
from .. import ranks
from ..configs import EncodeLatentsConfig
from ..events import Event, Note

_ALWAYS_ALLOWED = 10  # failed images, where max_failed is not 0: in a small folder every single one is more than a percent


@dataclass(frozen=True)
class EncodingJob:
    """What the whole run shares."""

    config: EncodeLatentsConfig
    folder: StoreFolder
    source: ImageSource
    vae: FrozenVAE
    encoding: Encoding
    plan: SplitPlan
    rounding: RoundingSums
    """Of the first rows that this process encodes."""
    numbering: Numbering = field(default_factory=Numbering)

    @property
    def most_failed(self) -> int:
        """How many images may be unreadable."""
        share = self.config.max_failed
        return max(_ALWAYS_ALLOWED, math.floor(share * self.plan.images + 1e-9)) if share else 0


def open_job(config: EncodeLatentsConfig, folder: StoreFolder, source: ImageSource) -> EncodingJob:
    """Load the VAE and settle every number that shapes the split."""
    vae = FrozenVAE.load(config.vae, device=pick_device(config.device))
    encoding = Encoding(vae=vae.identity(), image_size=config.image_size, latent_shape=vae.latent_shape(config.image_size), dtype=config.dtype)
    items = source.items[: config.limit]
    row_bytes = math.prod(encoding.latent_shape) * np.dtype(config.dtype).itemsize
    rows = len(items) * config.views
    chunk_rows, shard_rows = shard_layout(rows, config.views, row_bytes, batch_size=config.batch_size, shard_rows=config.shard_rows)
    plan = SplitPlan(
        name=config.split,
        images=len(items),
        views=config.views,
        seed=config.seed,
        source=source.name,
        order_sha256=order_sha256(items),
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
    )
    return EncodingJob(config, folder, source, vae, encoding, plan, RoundingSums(encoding.latent_shape))


def with_classes(job: EncodingJob) -> EncodingJob:
    """The job with the store's numbers of its classes, which rank 0 finds out while it holds the store."""
    config = job.config
    numbering = ranks.on_first(
        lambda: number_in_store(
            job.folder,
            config.split,
            classes_in(job.source.items[: config.limit]),
            overwrite=config.overwrite,
            refuse=config.new_classes == "refuse",
        )
    )
    return replace(job, numbering=numbering, plan=replace(job.plan, classes=numbering.classes, unnamed_labels=numbering.unnamed))


def tell_classes(numbering: Numbering) -> Iterator[Event]:
    yield from (Note(text=text) for text in numbering.notes)
    yield from (Note(text=text, warning=True) for text in numbering.warnings)


def result(job: EncodingJob, *, failed: int, images_per_s: float | None, already_complete: bool) -> dict[str, Any]:
    """The result's value; bytes are those on disk, or in a dry run those of the uncompressed latents."""
    sizes = {} if job.config.dry_run else job.folder.sizes(job.config.split)
    return {
        "store": job.folder.name,
        "split": job.config.split,
        "rows": job.plan.rows,
        "images": job.plan.images,
        "failed": failed,
        "skipped": job.source.skipped.counts(),
        "latent_shape": list(job.encoding.latent_shape),
        "bytes": latent_bytes(job) if job.config.dry_run else sum(sizes.values()),
        "fingerprint": job.encoding.fingerprint,
        "images_per_s": images_per_s,
        "already_complete": already_complete,
        "dry_run": job.config.dry_run,
    }


def latent_bytes(job: EncodingJob) -> int:
    return job.plan.rows * math.prod(job.encoding.latent_shape) * np.dtype(job.config.dtype).itemsize
