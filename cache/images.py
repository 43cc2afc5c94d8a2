"""From an image file's bytes to square RGB pixels: the one protocol of every stage.

Protocol: decode the first frame; do not apply EXIF orientation or colour profiles (neither do ImageNet's evaluations); convert to RGB;
resize with Pillow's antialiased bilinear filter so that the shorter side is S; cut the central S x S. It gives the very pixels of
`torchvision.transforms.Resize(S)` and `CenterCrop(S)` on a Pillow image.

Formats: BMP, GIF, JPEG (with MPO), PNG, PPM, TIFF, WebP, told by their content and not by the file's name. The decoder's own downscaling
of JPEG is not used: it changes pixels (docs/notes/images.md).

To RGB: grey is repeated; palettes are looked up; CMYK, YCCK and YCbCr are converted by Pillow, Adobe's inverted ones too; transparency is
laid over white; of 16 bits the upper 8 are kept (a single transparent colour of 16 bits is not looked for).

Read in spite of: broken EXIF, colour profiles and other metadata; bytes after the picture's end; a missing end mark after whole pixel data.
Unreadable: files that are empty, truncated, of another format (HEIC, AVIF, SVG) or no image; PNG with a wrong checksum; 32-bit integer and
float pixels, which have no known range; LAB and HSV; more than `MAX_IMAGE_PIXELS` pixels (a decompression bomb), found before any is decoded.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import one_line
from .damage import ends_in_filler, png_damage

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own limit for its warning: 256 MiB of RGB
_MAX_ASPECT = 8
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no EPS: Pillow would start Ghostscript on it
_NO_RGB = {"LAB", "HSV"}
Box = tuple[int, int, int, int]
T = TypeVar("T")
R = TypeVar("R")


class UnreadableImage(Exception):  # noqa: N818  a state of the input that callers record, not an error of revq
    """These bytes give no picture; `reason` says why, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class View:
    """Which view of an image to take: number 0 is the central crop, any other a random one."""

    seed: int
    image: int
    """Position of the image in its source."""
    number: int


@dataclass(frozen=True)
class Pixels:
    """One view of an image, ready for the network."""

    array: NDArray[np.uint8]
    """(3,S,S) RGB."""
    width: int
    """Of the original image (of its region, where it has one), in pixels."""
    height: int
    box: Box
    """(left, top, right, bottom) of what is seen, in pixels of the original file, rounded to whole ones."""
    flipped: bool = False
    """Mirrored left to right."""


def load_pixels(data: bytes, size: int, *, box: Box | None = None, view: View | None = None) -> Pixels:
    """Decode an image file and bring one view of it to `size` x `size`.

    Args:
        data: the encoded file.
        size: side of the result, in pixels.
        box: (left, top, right, bottom) region of the file that stands as the image; None means the whole.
        view: None means view 0, the central crop.

    Raises:
        UnreadableImage: the bytes cannot be decoded as documented above.
    """
    return load_views(data, size, [view or View(0, 0, 0)], box=box)[0]


def load_views(data: bytes, size: int, views: Iterable[View], *, box: Box | None = None) -> list[Pixels]:
    """As `load_pixels`, for several views of an image that is decoded once."""
    try:
        image = decode_rgb(data) if box is None else _decode_shared(data).crop(box)
        return [_one_view(image, size, view, box or (0, 0, *image.size)) for view in views]
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error, zlib.error and more on bad files
        raise UnreadableImage(f"{type(error).__name__}: {one_line(error)}") from error


def decode_rgb(data: bytes) -> Image.Image:
    """The first frame as an RGB image of 8 bits, by the rules at the top of this file. Raises UnreadableImage, and whatever Pillow raises."""
    if not data:
        raise UnreadableImage("the file is empty")
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"not a {', '.join(_FORMATS)} file; it begins with {data[:12]!r}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than the {MAX_IMAGE_PIXELS} pixels that are read") from error
    with image:
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise UnreadableImage(f"{image.width} x {image.height} pixels are more than the {MAX_IMAGE_PIXELS} that are read")
        damage = png_damage(data)
        if damage:
            raise UnreadableImage(damage)
        image.load()
        if image.format in {"JPEG", "MPO"} and ends_in_filler(data, image):
            raise UnreadableImage("the compressed data end before the picture does")
        return _to_rgb(image)


def centre_crop(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where the protocol's crop lies: (resized width, resized height, left, top) with left and top in the resized image.

    The shorter side becomes `size`, the longer one is rounded down, and odd margins are rounded half to even, as torchvision does.
    """
    short, long = min(width, height), max(width, height)
    new_long = size * long // short
    new_width, new_height = (size, new_long) if width <= height else (new_long, size)
    return new_width, new_height, round((new_width - size) / 2), round((new_height - size) / 2)


def random_crop(width: int, height: int, view: View) -> tuple[Box, bool]:
    """The square region and the flip of a view other than 0: a pure function of (seed, image, number), the same in every version.

    Its area is uniform between a half and all of the largest square, its position uniform, and every second one is flipped.
    """
    digest = hashlib.sha256(f"revq view {view.seed} {view.image} {view.number}".encode()).digest()
    area, x, y, flip = (int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in (0, 8, 16, 24))
    side = max(1, round(min(width, height) * (0.5 + 0.5 * area) ** 0.5))
    left, top = int(x * (width - side + 1)), int(y * (height - side + 1))
    return (left, top, left + side, top + side), flip < 0.5


def read_ahead(work: Callable[[T], R], items: Iterable[T], *, workers: int, ahead: int) -> Generator[R, None, None]:
    """`map(work, items)` in `workers` threads: results in order, at most `ahead` of them begun before they are asked for."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="revq-images")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_view(image: Image.Image, size: int, view: View, box: Box) -> Pixels:
    """`box` is the region that `image` is of its file."""
    width, height = image.size
    if view.number == 0:
        square, seen = _resize_and_crop(image, size)
        flipped = False
    else:
        seen, flipped = random_crop(width, height, view)
        square = image.crop(seen).resize((size, size), Image.Resampling.BILINEAR)
        if flipped:
            square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    array = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
    left, top = box[0], box[1]
    return Pixels(array, width, height, (left + seen[0], top + seen[1], left + seen[2], top + seen[3]), flipped)


def _resize_and_crop(image: Image.Image, size: int) -> tuple[Image.Image, Box]:
    """The protocol's central square, and where it lies in `image`."""
    width, height = image.size
    new_width, new_height, left, top = centre_crop(width, height, size)
    x, y = width / new_width, height / new_height
    exact = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    first_x, first_y = round(exact[0]), round(exact[1])
    seen = (first_x, first_y, max(round(exact[2]), first_x + 1), max(round(exact[3]), first_y + 1))
    if max(width, height) > _MAX_ASPECT * min(width, height):
        # The whole of a 1 x 20000 image at 256 px would be 4 GB: let the filter compute the central part alone (same up to rounding).
        return image.resize((size, size), Image.Resampling.BILINEAR, box=exact), seen
    resized = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size)), seen


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        upper_byte = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(upper_byte).convert("RGB")
    if mode in _NO_RGB:
        raise UnreadableImage(f"pixels of mode {mode} have no agreed conversion to RGB; convert the file to RGB")
    if mode in {"I", "F"}:
        raise UnreadableImage(f"pixels of mode {mode} (32 bits) have no known range; convert the file to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=4)
def _decode_shared(data: bytes) -> Image.Image:
    """For files that hold many images: the bytes object's own cached hash and identity find the picture again at no cost."""
    return decode_rgb(data)


def _silence_pillow() -> None:
    """Pillow warns of odd metadata and sizes, which the rules above deal with, and under -W error the same file would be unreadable.

    `warnings.catch_warnings` is not safe with threads, so that the filter is put in front of all others, and put back where it was removed.
    """
    if not warnings.filters or warnings.filters[0] != _PILLOW_FILTER:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


_PILLOW_MODULES = r"PIL\."
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)
