"""Images in, latents on disk, latents out to the device. Nothing here knows a network; `revq.models` knows nothing of this."""

from .batches import ResidentLatents, StreamingLatents, open_latents
from .images import Pixels, UnreadableImage, View, load_pixels
from .rows import epoch_permutation, rank_rows, split_rows, spread_rows
from .sources import ImageItem, ImageSource, open_source
from .store import Encoding, LatentSplit, LatentStore

__all__ = [
    "Encoding",
    "ImageItem",
    "ImageSource",
    "LatentSplit",
    "LatentStore",
    "Pixels",
    "ResidentLatents",
    "StreamingLatents",
    "UnreadableImage",
    "View",
    "epoch_permutation",
    "load_pixels",
    "open_latents",
    "open_source",
    "rank_rows",
    "split_rows",
    "spread_rows",
]
