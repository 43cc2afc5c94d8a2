"""Reading one image with all its views, and what a run has read so far."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...cache.images import Pixels, UnreadableImage, View, load_views
from ..events import Advance
from .job import EncodingJob


@dataclass(frozen=True)
class LoadedImage:
    """All views of one image, or why there are none."""

    index: int
    sha256: str = ""
    pixels: Sequence[Pixels] = ()
    reason: str = ""


@dataclass
class EncodingProgress:
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


def load_image(job: EncodingJob, index: int) -> LoadedImage:
    """Read and decode one image with all its views; runs in a worker thread."""
    config, item = job.config, job.source.items[index]
    try:
        data = job.source.read(index)
    except OSError as error:
        return LoadedImage(index, reason=f"cannot be read: {error.strerror or error}")
    sha256 = hashlib.sha256(data).hexdigest()
    views = [View(config.seed, index, number) for number in range(config.views)]
    try:
        return LoadedImage(index, sha256, load_views(data, config.image_size, views, box=item.box))
    except UnreadableImage as error:
        return LoadedImage(index, sha256, reason=error.reason)
