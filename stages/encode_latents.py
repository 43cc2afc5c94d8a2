"""Stage one: every image once through the frozen VAE's encoder, into one split of a latent store.

    revq encode-latents IMAGES STORE --vae ID|DIR|FILE.py:FACTORY --split train --image-size 256

In: images (see `cache.sources` and `cache.images`). Out: a split of STORE (see `cache.store`). Threads decode and resize a few batches
ahead, the main thread runs the encoder, one thread writes finished shards. Memory: two shards of latents and a few batches of pixels,
whatever the number of images. A batch never reaches into the next shard, so that a resumed run forms the same batches. Under torchrun
each rank encodes whole shards of its own; the bytes are those of a single process.

Shapes: N images; B rows in a batch; C,H,W latent channels, rows, columns; S image side.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from ..cache.images import read_ahead
from ..cache.manifest import failures
from ..cache.sources import open_source
from ..cache.store import LatentStore, manifest_key
from ..cache.store_folder import open_folder
from ..cache.writer import SplitWriter, check_split_name, holds_store, remove_progress, target_state
from ..models.device import pick_device
from . import ranks
from .configs import EncodeLatentsConfig
from .encoding.failures import WARNINGS_IN_FULL, refuse_failure, refuse_so_many, resume
from .encoding.job import EncodingJob, latent_bytes, open_job, result, tell_classes, with_classes
from .encoding.loading import EncodingProgress, load_image
from .encoding.shards import encode_shard, images_of
from .events import Begin, Event, Note, Result


def encode_latents(config: EncodeLatentsConfig) -> Iterator[Event]:
    """Encode one split; the same call again resumes it.

    Raises:
        ImageError: the source holds no image, or is gone (see `cache.place_errors`); more images than `max_failed`, or (strict) one, cannot be read.
        VAEError: the VAE cannot be found, or does not encode and decode images of this size.
        StoreError: every image failed, or a latent does not fit the dtype, or its rounding takes more than a percent of what a channel varies.
        MismatchError: the store or the split belongs to another encoding or run; or it has classes that `new_classes` refuses.
        OutputError: the store's path holds something else, cannot be written, or is being written by another process.
    """
    check_split_name(config.split)
    pick_device(config.device)  # a wrong name is told before a million images are listed
    folder = open_folder(config.store)
    holds_store(folder)  # and so is a folder that is none
    source = open_source(config.images)
    yield from (Note(text=text) for text in source.notes)
    job = open_job(config, folder, source)
    state = target_state(folder, job.encoding, job.plan, overwrite=config.overwrite)
    if config.dry_run:
        yield from tell_classes(with_classes(job).numbering)
        shape, megabytes = "x".join(map(str, job.encoding.latent_shape)), latent_bytes(job) / 1e6
        yield Note(text=f"dry run, nothing is written: {job.plan.rows} rows of {shape} {config.dtype} would take {megabytes:.1f} MB uncompressed")
        yield Result(value=result(job, failed=0, images_per_s=None, already_complete=state == "complete"))
        return
    if state == "complete":
        yield from _tell_complete(job)
        return
    with ranks.held(lambda: folder.locked(f"encode-latents --split {config.split}")) as warning:
        if warning:
            yield Note(text=warning, warning=True)
        value = yield from _encode_split(job)
    yield Result(value=value)


def _encode_split(job: EncodingJob) -> Generator[Event, None, dict[str, Any]]:
    """What is missing of the split; returns the result's value. Each rank encodes the shards that are its own, rank 0 creates and finishes."""
    job = with_classes(job)
    yield from tell_classes(job.numbering)
    config, rank = job.config, ranks.rank()
    if rank > 0:
        ranks.barrier()  # rank 0 creates it
    writer = SplitWriter(job.folder, job.encoding, job.plan, overwrite=config.overwrite, rank=rank, ranks=ranks.world_size())
    if rank == 0:
        ranks.barrier()
    failed_before = yield from resume(job, writer)
    done = writer.rows_done // config.views
    yield Begin(task=ranks.task_of_share(f"encode {config.split}"), total=writer.rows_own // config.views, unit="images", done=done)
    progress = EncodingProgress(images=done, failed=failed_before)
    yield from _encode_shards(job, writer, progress)
    # Also the point where all ranks have written their shards.
    counts = ranks.gather((progress.failed_this_run, progress.images_per_s, progress.failed))
    failed_this_run, images_per_s, failed = (sum(values) for values in zip(*counts, strict=True))
    if failed_this_run > WARNINGS_IN_FULL:
        yield Note(text=f"{failed_this_run} images could not be read; the manifest names each with its reason", warning=True)
    refuse_so_many(job, failed)
    attributes = ranks.broadcast(writer.finish() if rank == 0 else None)
    return result(job, failed=attributes["failed"], images_per_s=images_per_s, already_complete=False)


def _encode_shards(job: EncodingJob, writer: SplitWriter, progress: EncodingProgress) -> Iterator[Event]:
    """All shards that are still to do: load ahead, encode here, write behind."""
    config = job.config
    indices = (index for shard in writer.todo for index in images_of(shard, config.views))
    ahead = 2 * math.ceil(config.batch_size / config.views) + config.workers
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, thread_name_prefix="revq-write") as write_pool,
        closing(read_ahead(lambda index: load_image(job, index), indices, workers=config.workers, ahead=ahead)) as loaded,
    ):
        for shard in writer.todo:
            latents, rows = yield from encode_shard(job, shard, loaded, progress)
            job.rounding.check(config.dtype)
            if writing is not None:
                writing.result()  # at most one shard waits behind the one in hand: that bounds memory
            writing = write_pool.submit(writer.write_shard, shard, latents, rows)
        if writing is not None:
            writing.result()


def _tell_complete(job: EncodingJob) -> Iterator[Event]:
    config = job.config
    if ranks.rank() == 0:
        remove_progress(job.folder, config.split)
    split = LatentStore(job.folder, job.encoding)[config.split]
    if config.strict and split.failed:
        refuse_failure(failures(split.read_file(manifest_key(config.split)))[0], "mend it and add --overwrite")
    failed = f" but for {split.failed} images that could not be read" if split.failed else ""
    yield Note(text=f'split "{config.split}" of {job.folder.name} is complete already{failed}; --overwrite encodes it again')
    yield Result(value=result(job, failed=split.failed, images_per_s=None, already_complete=True))
