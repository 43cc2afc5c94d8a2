"""The pictures of a report: cut out of an evaluation's sheets, compared, and as data inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Tiles = Sequence[Sequence[Image.Image]]
"""One sequence for each image: its picture in every row of the evaluation."""
HEAT_FULL = 64
"""Mean difference over the colours, in levels of 255, at which the error map is brightest."""
_HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))


def read_tiles(path: Path, layout: Mapping[str, Any]) -> list[list[Image.Image]]:
    """The pictures of a sheet at their own size: one list for each image, in the order of the columns."""
    tile, side = layout["tile_px"], layout["tile_px"] // layout["scale"]
    with Image.open(path) as grid:
        return [
            [grid.crop((left, top, left + tile, top + tile)).resize((side, side), Image.Resampling.NEAREST) for left in layout["left"]]
            for top in layout["top"]
        ]


def error_map(original: Image.Image, other: Image.Image) -> Image.Image:
    """Mean absolute difference over the colours of each pixel, as a palette picture from black to white."""
    ours, theirs = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (original, other))
    level = np.abs(ours - theirs).mean(axis=2) / HEAT_FULL
    image = Image.fromarray((level.clip(0, 1) * 63).round().astype(np.uint8), "P")
    places = np.linspace(0, len(_HEAT) - 1, 64)
    palette = np.stack([np.interp(places, range(len(_HEAT)), [colour[channel] for colour in _HEAT]) for channel in range(3)], axis=1)
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


def data_url(image: Image.Image) -> str:
    """A picture as the address of itself, for the `src` of a page that needs no other file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
