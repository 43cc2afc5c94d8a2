"""Stage one: every image once through the frozen VAE's encoder, into one split of a latent store.

    revq encode-latents IMAGES STORE --vae ID|DIR|FILE.py:FACTORY --split train --image-size 256

In: images (see `cache.sources` and `cache.images`). Out: a split of STORE (see `cache.store`). Threads decode and resize a few batches
ahead, the main thread runs the encoder, one thread writes finished shards. Memory: two shards of latents and a few batches of pixels,
whatever the number of images. A batch never reaches into the next shard, so that a resumed run forms the same batches. Under torchrun
each rank encodes whole shards of its own; the bytes are those of a single process.

Shapes: N images; B rows in a batch; C,H,W latent channels, rows, columns; S image side.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.classes import Numbering, classes_in, number_in_store
from ..cache.images import Pixels, UnreadableImage, View, load_views, read_ahead
from ..cache.manifest import FAILED, OK, ManifestRow, failures
from ..cache.precision import ENOUGH_ROWS, RoundingTally
from ..cache.sources import ImageSource, open_source, order_sha256
from ..cache.store import Encoding, LatentStore, manifest_key
from ..cache.store_folder import StoreFolder, open_folder
from ..cache.writer import Shard, SplitPlan, SplitWriter, check_split_name, check_target, remove_progress, shard_layout, target_state
from ..errors import ConfigError, ImageError, StoreError
from ..models.device import pick_device
from ..models.vae import FrozenVAE
from . import ranks
from .events import Advance, Begin, Event, Note, Result

_WARNINGS_IN_FULL = 5
_ALWAYS_ALLOWED = 10  # failed images, where max_failed is not 0: in a small folder every single one is more than a percent


@dataclass(frozen=True, kw_only=True)
class EncodeLatentsConfig:
    """What to encode, with what, to where."""

    images: str
    """Folder, .tar, WebDataset shards or Parquet (see `cache.sources.open_source`), or "photographs:train" / "photographs:held-out"."""
    store: str
    """The latent store: a new path or fsspec URL (s3://bucket/latents.zarr), or a store that gets one more split."""
    vae: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    """Hub id, local folder in diffusers' format, FILE.py:FACTORY, or "revq-tiny-f8c8"."""
    split: str = "train"
    """Name of the split to write."""
    image_size: int = 256
    """Side of the square that the encoder sees, in pixels."""
    batch_size: int = 64
    """Rows in one pass of the encoder. Another size can change the last bits of a latent, but is no other run."""
    workers: int = 8
    """Threads that decode and resize images; the result does not depend on it."""
    dtype: str = "float16"
    """"float16" or "float32": how latents are kept."""
    views: int = 1
    """Rows for each image: the central crop, then views - 1 random crops and flips drawn from (seed, image, view)."""
    seed: int = 0
    """Of the random views."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1" or "mps"."""
    limit: int | None = None
    """Take the first so many images; None means all."""
    new_classes: str = "append"
    """Where the store has other splits, classes that are in none of them: "append" numbers them and says so, "refuse" is an error. A new number
    changes none that is there, and held-out sets with classes of their own are common; so they are appended unless asked otherwise."""
    max_failed: float = 0.01
    """Share of images that may be unreadable; beyond it, and beyond ten images unless it is 0, the run ends without completing the split."""
    strict: bool = False
    """Stop at the first image that cannot be read, instead of recording it and going on."""
    overwrite: bool = False
    """Encode this split anew if it is there; other splits are left alone."""
    dry_run: bool = False
    """Say what would be written, and write nothing."""
    shard_rows: int | None = None
    """Rows in one file of a new split; None means about 32 MiB, or an eighth of the split where that is less."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "workers", "views", "limit", "shard_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.dtype not in {"float16", "float32"}:
            raise ConfigError(f"dtype must be float16 or float32, not {self.dtype!r}")
        if self.new_classes not in {"append", "refuse"}:
            raise ConfigError(f"new_classes must be append or refuse, not {self.new_classes!r}")
        if not 0 <= self.max_failed <= 1:
            raise ConfigError(f"max_failed must be a share from 0 to 1, not {self.max_failed}")
        check_split_name(self.split)


@dataclass(frozen=True)
class _Job:
    """What the whole run shares."""

    config: EncodeLatentsConfig
    folder: StoreFolder
    source: ImageSource
    vae: FrozenVAE
    encoding: Encoding
    plan: SplitPlan
    rounding: RoundingTally
    """Of the first rows that this process encodes."""
    numbering: Numbering = field(default_factory=Numbering)

    @property
    def most_failed(self) -> int:
        """How many images may be unreadable."""
        share = self.config.max_failed
        return max(_ALWAYS_ALLOWED, math.floor(share * self.plan.images + 1e-9)) if share else 0


@dataclass(frozen=True)
class _Loaded:
    """All views of one image, or why there are none."""

    index: int
    sha256: str = ""
    pixels: Sequence[Pixels] = ()
    reason: str = ""


@dataclass
class _Progress:
    """What the run has done so far, for its events and its result."""

    images: int
    """Loaded, those of earlier runs included."""
    failed: int
    """Of these."""
    images_this_run: int = 0
    failed_this_run: int = 0
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    """From the start to the last event."""

    def advance(self) -> Advance:
        """Tell how far the run has come. The bar's rate at the end and the result's are of the same time."""
        self.seconds = time.perf_counter() - self.started
        return Advance(done=self.images)

    @property
    def images_per_s(self) -> float:
        return self.images_this_run / max(self.seconds, 1e-9)


def encode_latents(config: EncodeLatentsConfig) -> Iterator[Event]:
    """Encode one split; the same call again resumes it.

    Raises:
        ImageError: the source holds no image, or is gone (see `cache.place_errors`); more images than `max_failed`, or (strict) one, cannot be read.
        VAEError: the VAE cannot be found, or does not encode and decode images of this size.
        StoreError: every image failed, or a latent does not fit the dtype, or its rounding takes more than a percent of what a channel varies.
        MismatchError: the store or the split belongs to another encoding or run; or it has classes that `new_classes` refuses.
        OutputError: the store's path holds something else, cannot be written, or is being written by another process.
    """
    pick_device(config.device)  # a wrong name is told before a million images are listed
    folder = open_folder(config.store)
    check_target(folder)
    source = open_source(config.images)
    yield from (Note(text=text) for text in source.notes)
    job = _prepare(config, folder, source)
    state = target_state(folder, job.encoding, job.plan, overwrite=config.overwrite)
    if config.dry_run:
        yield from _tell_classes(_with_classes(job).numbering)
        shape, megabytes = "x".join(map(str, job.encoding.latent_shape)), _latent_bytes(job) / 1e6
        yield Note(text=f"dry run, nothing is written: {job.plan.rows} rows of {shape} {config.dtype} would take {megabytes:.1f} MB uncompressed")
        yield Result(value=_result(job, failed=0, images_per_s=None, already_complete=state == "complete"))
        return
    if state == "complete":
        yield from _tell_complete(job)
        return
    with ranks.held(lambda: folder.locked(f"encode-latents --split {config.split}")) as warning:
        if warning:
            yield Note(text=warning, warning=True)
        value = yield from _encode_split(job)
    yield Result(value=value)


def _encode_split(job: _Job) -> Generator[Event, None, dict[str, Any]]:
    """What is missing of the split; returns the result's value. Each rank encodes the shards that are its own, rank 0 creates and finishes."""
    job = _with_classes(job)
    yield from _tell_classes(job.numbering)
    config, rank = job.config, ranks.rank()
    if rank > 0:
        ranks.barrier()  # rank 0 creates it
    writer = SplitWriter(job.folder, job.encoding, job.plan, overwrite=config.overwrite, rank=rank, ranks=ranks.world_size())
    if rank == 0:
        ranks.barrier()
    failed_before = yield from _resume(job, writer)
    done = writer.rows_done // config.views
    yield Begin(task=ranks.task_of_share(f"encode {config.split}"), total=writer.rows_own // config.views, unit="images", done=done)
    progress = _Progress(images=done, failed=failed_before)
    yield from _encode_shards(job, writer, progress)
    # Also the point where all ranks have written their shards.
    counts = ranks.gather((progress.failed_this_run, progress.images_per_s, progress.failed))
    failed_this_run, images_per_s, failed = (sum(values) for values in zip(*counts, strict=True))
    if failed_this_run > _WARNINGS_IN_FULL:
        yield Note(text=f"{failed_this_run} images could not be read; the manifest names each with its reason", warning=True)
    _refuse_so_many(job, failed)
    attributes = ranks.broadcast(writer.finish() if rank == 0 else None)
    return _result(job, failed=attributes["failed"], images_per_s=images_per_s, already_complete=False)


def _with_classes(job: _Job) -> _Job:
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


def _tell_classes(numbering: Numbering) -> Iterator[Event]:
    yield from (Note(text=text) for text in numbering.notes)
    yield from (Note(text=text, warning=True) for text in numbering.warnings)


def _prepare(config: EncodeLatentsConfig, folder: StoreFolder, source: ImageSource) -> _Job:
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
    return _Job(config, folder, source, vae, encoding, plan, RoundingTally(encoding.latent_shape))


def _encode_shards(job: _Job, writer: SplitWriter, progress: _Progress) -> Iterator[Event]:
    """All shards that are still to do: load ahead, encode here, write behind."""
    config = job.config
    indices = (index for shard in writer.todo for index in _images_of(shard, config.views))
    ahead = 2 * math.ceil(config.batch_size / config.views) + config.workers
    writing: Future[None] | None = None
    with (
        ThreadPoolExecutor(1, thread_name_prefix="revq-write") as write_pool,
        closing(read_ahead(lambda index: _load(job, index), indices, workers=config.workers, ahead=ahead)) as loaded,
    ):
        for shard in writer.todo:
            latents, rows = yield from _encode_shard(job, shard, loaded, progress)
            job.rounding.check(config.dtype)
            if writing is not None:
                writing.result()  # at most one shard waits behind the one in hand: that bounds memory
            writing = write_pool.submit(writer.write_shard, shard, latents, rows)
        if writing is not None:
            writing.result()


def _encode_shard(
    job: _Job, shard: Shard, loaded: Iterator[_Loaded], progress: _Progress
) -> Generator[Event, None, tuple[NDArray[Any], list[ManifestRow]]]:
    """The latents (rows of the shard,C,H,W) and the manifest rows of one shard; an event after each batch."""
    config = job.config
    latents = np.zeros((len(shard), *job.encoding.latent_shape), config.dtype)
    rows: list[ManifestRow] = []
    waiting: list[tuple[int, Pixels]] = []  # (row in the shard, pixels) not encoded yet
    running: list[tuple[list[int], Tensor]] = []  # batches given to the device, not fetched yet
    images = _images_of(shard, config.views)
    for image in itertools.islice(loaded, len(images)):
        first_row, last = len(rows), image.index == images[-1]
        rows += _manifest_rows(job, image)
        waiting += [(first_row + view, pixels) for view, pixels in enumerate(image.pixels)]
        progress.images += 1
        progress.images_this_run += 1
        if image.reason:
            yield from _report_failure(job, image, progress)
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


def _load(job: _Job, index: int) -> _Loaded:
    """Read and decode one image with all its views; runs in a worker thread."""
    config, item = job.config, job.source.items[index]
    try:
        data = job.source.read(index)
    except OSError as error:
        return _Loaded(index, reason=f"cannot be read: {error.strerror or error}")
    sha256 = hashlib.sha256(data).hexdigest()
    views = [View(config.seed, index, number) for number in range(config.views)]
    try:
        return _Loaded(index, sha256, load_views(data, config.image_size, views, box=item.box))
    except UnreadableImage as error:
        return _Loaded(index, sha256, reason=error.reason)


def _launch(job: _Job, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """pixels B x (3,S,S) -> latents (B,C,H,W) float32 on the VAE's device, which on a GPU are still being computed."""
    images = torch.from_numpy(np.stack(pixels))
    if job.vae.device.type == "cuda":
        images = images.pin_memory()  # a copy from pageable memory would wait for the batch before
    return job.vae.encode(images.to(job.vae.device, non_blocking=True).float().div_(127.5).sub_(1))


def _fetch(job: _Job, positions: list[int], batch_latents: Tensor, latents: NDArray[Any], rows: Sequence[ManifestRow]) -> None:
    """Bring a batch's latents (B,C,H,W) to `latents[positions]` in the store's dtype.

    Raises:
        StoreError: a value is not finite, in itself or in that dtype, or that dtype rounds off more than a percent of what a channel varies.
    """
    computed = batch_latents.cpu()
    values = computed.to(getattr(torch, job.config.dtype))
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        key = rows[positions[int((~finite).nonzero()[0, 0])]].key
        mend = "encode with --dtype float32 (and --overwrite)" if job.config.dtype == "float16" else "use another VAE or leave the image out"
        raise StoreError(f"the latent of image {key} of {job.source.name} is not finite in {job.config.dtype}; {mend}")
    latents[positions] = values.numpy()
    if job.rounding.rows < ENOUGH_ROWS:
        job.rounding.add(computed.numpy(), values.numpy())
        if job.rounding.rows >= ENOUGH_ROWS:
            job.rounding.check(job.config.dtype)


def _manifest_rows(job: _Job, image: _Loaded) -> list[ManifestRow]:
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


def _report_failure(job: _Job, image: _Loaded, progress: _Progress) -> Iterator[Event]:
    key = job.source.items[image.index].key
    if job.config.strict:
        raise ImageError(f"image {key} of {job.source.name} cannot be read ({image.reason}); mend or remove it, or leave out --strict")
    progress.failed += 1
    progress.failed_this_run += 1
    if progress.failed_this_run <= _WARNINGS_IN_FULL:
        yield Note(text=f"image {key} cannot be read and is left out: {image.reason}", warning=True)
    _refuse_so_many(job, progress.failed, f"; the last is {key} ({image.reason})")


def _refuse_so_many(job: _Job, failed: int, last: str = "") -> None:
    """Raises ImageError where more images failed than `max_failed` allows. What is finished stays, and `_resume` tries the failed ones anew."""
    if failed > job.most_failed:
        raise ImageError(
            f"{failed} images of {job.source.name} cannot be read{last}, more than the {job.most_failed} of {job.plan.images} that --max-failed "
            f"{job.config.max_failed:g} allows; mend what is wrong and give the same command again, or one with a larger --max-failed"
        )


def _resume(job: _Job, writer: SplitWriter) -> Generator[Event, None, int]:
    """Tell what an earlier run left: shards that hold, shards that do not. Returns how many of its images failed then as they do now."""
    failing, mended = _try_again(job, writer)
    found = ranks.gather((writer.rows_done, [shard.index for shard in writer.damaged], mended))
    rows_done, damaged = sum(rows for rows, _, _ in found), sorted(index for _, indices, _ in found for index in indices)
    mended = sum(images for _, _, images in found)
    if damaged:
        names = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        yield Note(text=f"{len(damaged)} shards do not match their checksum (number {names}) and are encoded again", warning=True)
    if mended:
        yield Note(text=f"{mended} images that could not be read have changed; their shards are encoded again")
    if rows_done:
        yield Note(text=f"resuming: {rows_done} of {writer.plan.rows} rows are there")
    if failing and job.config.strict:
        _refuse_failure(failing[0], "mend it and give the same command again")
    return len(failing)


def _try_again(job: _Job, writer: SplitWriter) -> tuple[list[dict[str, Any]], int]:
    """Read the images anew that failed in an earlier run, and have the shards written again in which one gives another answer.

    So the split becomes what it would be had the cause been mended before. Returns the failures that stay, and how many have changed.
    """
    found, views, workers = list(writer.failures()), job.config.views, job.config.workers
    indices = (failure["row"] // views for _, failure in found)
    with closing(read_ahead(lambda index: _load(job, index), indices, workers=workers, ahead=2 * workers)) as loaded:
        changed = [shard for (shard, was), now in zip(found, loaded, strict=True) if (now.sha256, now.reason) != (was["sha256"], was["reason"])]
    writer.redo(set(changed))
    return [failure for shard, failure in found if shard not in changed], len(changed)


def _tell_complete(job: _Job) -> Iterator[Event]:
    config = job.config
    if ranks.rank() == 0:
        remove_progress(job.folder, config.split)
    split = LatentStore(job.folder, job.encoding)[config.split]
    if config.strict and split.failed:
        _refuse_failure(failures(split.read_file(manifest_key(config.split)))[0], "mend it and add --overwrite")
    failed = f" but for {split.failed} images that could not be read" if split.failed else ""
    yield Note(text=f'split "{config.split}" of {job.folder.name} is complete already{failed}; --overwrite encodes it again')
    yield Result(value=_result(job, failed=split.failed, images_per_s=None, already_complete=True))


def _refuse_failure(failure: Mapping[str, Any], mend: str) -> NoReturn:
    """Raises ImageError: an earlier run recorded a failure, which `strict` does not allow."""
    raise ImageError(f"image {failure['key']} could not be read by an earlier run ({failure['reason']}); {mend}, or leave out --strict")


def _result(job: _Job, *, failed: int, images_per_s: float | None, already_complete: bool) -> dict[str, Any]:
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
        "bytes": _latent_bytes(job) if job.config.dry_run else sum(sizes.values()),
        "fingerprint": job.encoding.fingerprint,
        "images_per_s": images_per_s,
        "already_complete": already_complete,
        "dry_run": job.config.dry_run,
    }


def _latent_bytes(job: _Job) -> int:
    return job.plan.rows * math.prod(job.encoding.latent_shape) * np.dtype(job.config.dtype).itemsize


def _images_of(shard: Shard, views: int) -> range:
    """Positions in the source of a shard's images; a shard holds whole images."""
    return range(shard.start // views, shard.stop // views)
