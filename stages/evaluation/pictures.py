"""Which images of an evaluation to show, and the sheets that show them.

Shapes: M pictures shown, S image side in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SPREAD, EXTREME = 8, 4
_SMALLEST_TILE_PX = 128


def spread_positions(count: int) -> list[int]:
    """Up to `SPREAD` positions from 0 to count - 1, evenly spaced: images that nobody chose."""
    return sorted({round(i * (count - 1) / max(SPREAD - 1, 1)) for i in range(SPREAD)})


def extreme_positions(psnr_db: NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """(worst, best): up to `EXTREME` positions each of the lowest PSNR, rising, and of the highest, falling; no position in both."""
    order = np.argsort(psnr_db, kind="stable")
    each = min(EXTREME, len(order) // 2)
    return [int(i) for i in order[:each]], [int(i) for i in order[::-1][:each]]


def draw_grid(pictures: Sequence[Sequence[Tensor]], headings: Sequence[str]) -> tuple[bytes, dict[str, Any]]:
    """A PNG of M rows of pictures (3,S,S) uint8 under their headings, and where each tile lies in it.

    Small pictures are enlarged by a whole factor, so that every pixel stays what it was.

    Returns:
        The file's bytes; and {"columns", "scale", "tile_px", "left" of each column, "top" of each row}, in pixels.
    """
    side = pictures[0][0].shape[-1]
    scale = -(-_SMALLEST_TILE_PX // side)
    tile = side * scale
    margin, gap = 16, 8
    text_px = max(13, tile // 11)
    font = ImageFont.load_default(text_px)
    top = margin + round(text_px * 1.7)
    lefts = [margin + column * (tile + gap) for column in range(len(headings))]
    tops = [top + row * (tile + gap) for row in range(len(pictures))]
    sheet = Image.new("RGB", (lefts[-1] + tile + margin, tops[-1] + tile + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left + tile / 2, margin + text_px), heading, font=font, fill=(40, 40, 46), anchor="ms")
    for y, row in zip(tops, pictures, strict=True):
        for x, picture in zip(lefts, row, strict=True):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            sheet.paste(image.resize((tile, tile), Image.Resampling.NEAREST), (x, y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), {"columns": list(headings), "scale": scale, "tile_px": tile, "left": lefts, "top": tops}
