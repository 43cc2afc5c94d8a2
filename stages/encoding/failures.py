"""Images that cannot be read: told, counted against `max_failed`, and tried again when the run is resumed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NoReturn

from ...cache.images import read_ahead
from ...cache.writer import SplitWriter
from ...errors import ImageError
from .. import ranks
from ..events import Event, Note
from .job import EncodingJob
from .loading import EncodingProgress, LoadedImage, load_image

WARNINGS_IN_FULL = 5


def report_failure(job: EncodingJob, image: LoadedImage, progress: EncodingProgress) -> Iterator[Event]:
    key = job.source.items[image.index].key
    if job.config.strict:
        raise ImageError(f"image {key} of {job.source.name} cannot be read ({image.reason}); mend or remove it, or leave out --strict")
    progress.failed += 1
    progress.failed_this_run += 1
    if progress.failed_this_run <= WARNINGS_IN_FULL:
        yield Note(text=f"image {key} cannot be read and is left out: {image.reason}", warning=True)
    refuse_so_many(job, progress.failed, f"; the last is {key} ({image.reason})")


def refuse_so_many(job: EncodingJob, failed: int, last: str = "") -> None:
    """Raises ImageError where more images failed than `max_failed` allows. What is finished stays, and `resume` tries the failed ones anew."""
    if failed > job.most_failed:
        raise ImageError(
            f"{failed} images of {job.source.name} cannot be read{last}, more than the {job.most_failed} of {job.plan.images} that --max-failed "
            f"{job.config.max_failed:g} allows; mend what is wrong and give the same command again, or one with a larger --max-failed"
        )


def resume(job: EncodingJob, writer: SplitWriter) -> Generator[Event, None, int]:
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
        refuse_failure(failing[0], "mend it and give the same command again")
    return len(failing)


def _try_again(job: EncodingJob, writer: SplitWriter) -> tuple[list[dict[str, Any]], int]:
    """Read the images anew that failed in an earlier run, and have the shards written again in which one gives another answer.

    So the split becomes what it would be had the cause been mended before. Returns the failures that stay, and how many have changed.
    """
    found, views, workers = list(writer.failures()), job.config.views, job.config.workers
    indices = (failure["row"] // views for _, failure in found)
    with closing(read_ahead(lambda index: load_image(job, index), indices, workers=workers, ahead=2 * workers)) as loaded:
        changed = [shard for (shard, was), now in zip(found, loaded, strict=True) if (now.sha256, now.reason) != (was["sha256"], was["reason"])]
    writer.redo(set(changed))
    return [failure for shard, failure in found if shard not in changed], len(changed)


def refuse_failure(failure: Mapping[str, Any], mend: str) -> NoReturn:
    """Raises ImageError: an earlier run recorded a failure, which `strict` does not allow."""
    raise ImageError(f"image {failure['key']} could not be read by an earlier run ({failure['reason']}); {mend}, or leave out --strict")
