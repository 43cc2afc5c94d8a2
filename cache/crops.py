"""The square crops that evaluations know by name: revq's own, of `images`, and that of ADM.

`adm` is the crop of Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (arXiv 2105.05233), by which many published ImageNet
figures were measured: halve both sides with a box filter while the shorter one is at least twice S; scale the shorter side to S with an
antialiased bicubic filter, both sides rounded to whole pixels; cut the central S x S, odd margins rounded down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import one_line
from .images import Box, UnreadableImage, decode_rgb, load_pixels

CROPS = ("revq", "adm")
_MAX_ASPECT = 8


@dataclass(frozen=True)
class Square:
    """One image, cropped."""

    pixels: NDArray[np.uint8]
    """(3,S,S) RGB."""
    shorter_side: int
    """Of the image before, in pixels: below S it was enlarged."""


def load_square(data: bytes, size: int, *, crop: str, box: Box | None = None) -> Square:
    """Decode an image file and bring it to `size` x `size` by the named crop.

    Args:
        data: the encoded file.
        size: side of the result, in pixels.
        crop: one of `CROPS`.
        box: (left, top, right, bottom) region of the file that stands as the image; None means the whole.

    Raises:
        UnreadableImage: the bytes cannot be decoded as `images` documents.
    """
    if crop == "revq":
        loaded = load_pixels(data, size, box=box)
        return Square(loaded.array, min(loaded.width, loaded.height))
    assert crop == "adm", crop
    try:
        image = decode_rgb(data)
        image = image if box is None else image.crop(box)
        square = adm_square(image, size)
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as in `images.load_views`: Pillow's decoders raise many kinds
        raise UnreadableImage(f"{type(error).__name__}: {one_line(error)}") from error
    return Square(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), min(image.size))


def adm_square(image: Image.Image, size: int) -> Image.Image:
    """ADM's central square of an RGB image."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) > _MAX_ASPECT * size:
        # The whole of a 1 x 20000 image would be gigabytes: let the filter compute the central part alone (the same up to rounding).
        x, y = image.width / width, image.height / height
        seen = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
        return image.resize((size, size), Image.Resampling.BICUBIC, box=seen)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
