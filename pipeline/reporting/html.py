"""The HTML report of one evaluation, and that of a comparison: each one file that needs no network.

Templates, style and script lie in `pipeline/assets/`; pictures are inside as data. Without JavaScript and on paper the report is plain grids
of pictures; the script only adds the slider that lays a reconstruction over its original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import tables
from .charts import Chart, svg
from .pictures import HEAT_FULL, Tiles, data_url, error_map

# Below this side a browser's smoothing would hide the pixels that the picture is about.
_SMALL_PX = 128
_ROW_MEANINGS = {
    "original": "the crops against themselves: a check",
    "vae": "the VAE alone, nothing quantized: the ceiling, unless tokens are refined",
    "quantized": "the tokens, decoded without the rectifier",
    "rectified": "the tokens, decoded with the rectifier",
}
_TEMPLATES = Environment(
    loader=PackageLoader("revq.pipeline", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def html_report(metrics: Mapping[str, Any], charts: Mapping[str, Sequence[Chart]], tiles: Tiles, extremes: Tiles = ()) -> str:
    """The whole report; `charts` are those of each section, `tiles` and `extremes` the pictures of the two sheets."""
    return _TEMPLATES.get_template("report.html.j2").render(
        tables=tables,
        metrics=metrics,
        notes=[(name, *_command(text)) for name, text in tables.notes(metrics)],
        row_meanings=_ROW_MEANINGS,
        heat_full=HEAT_FULL,
        pictures=_picture_rows(metrics["pictures"], tiles),
        extremes=_extremes(metrics.get("extremes"), extremes),
        ranges=_ranges(metrics["codebook_usage"]),
        charts={name: [(Markup(svg(chart)), chart.spoken()) for chart in drawn] for name, drawn in charts.items()},
    )


def comparison_page(table: Sequence[Sequence[str]], differences: Sequence[str]) -> str:
    """The HTML of `revq compare`."""
    return _TEMPLATES.get_template("comparison.html.j2").render(table=table, differences=differences)


def _command(note: str) -> tuple[str, str, str]:
    """(text before, command, text after) of a note that ends in "mend it with: COMMAND, or ..."; no command in any other."""
    before, mend, after = note.partition("mend it with: ")
    command, comma, rest = after.partition(", or ")
    return before + mend.rstrip(": "), command, comma.lstrip(", ") + rest


def _picture_rows(layout: Mapping[str, Any], tiles: Tiles) -> list[dict[str, Any]]:
    """One row of pictures for each image, the error map last."""
    rows = []
    for key, psnr_db, images in zip(layout["keys"], layout["psnr_db"], tiles, strict=True):
        shown = zip([*layout["columns"], "error"], [*images, error_map(images[0], images[-1])], strict=True)
        cells = [
            {"name": name, "url": data_url(image), "width": image.width, "height": image.height, "psnr_db": psnr_db.get(name)}
            for name, image in shown
        ]
        rows.append({"key": key, "small": images[0].width < _SMALL_PX, "cells": cells})
    return rows


def _extremes(layout: Mapping[str, Any] | None, tiles: Tiles) -> dict[str, list[dict[str, Any]]]:
    """The rows of the worst and the best images, under their headings."""
    if not layout or not tiles:
        return {}
    rows = _picture_rows(layout, tiles)
    headings = {"worst": "Lowest PSNR", "best": "Highest PSNR"}
    return {text: [row for row, found in zip(rows, layout["kinds"], strict=True) if found == kind] for kind, text in headings.items()}


def _ranges(usage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A bar for each figure of the codebooks: from the least used codebook to the most used one, in per cent of what is possible."""
    codes = usage["codes"]
    ranges = []
    for name, spread, full, form, full_text in (
        ("codes used at least once", usage["usage"], 1.0, "{:.1%}", "100%"),
        ("perplexity", usage["perplexity"], codes, "{:,.1f}", f"{codes:,}"),
    ):
        low, median, high = (100 * min(spread[key] / full, 1.0) for key in ("min", "median", "max"))
        texts = {key: form.format(spread[key]) for key in ("min", "median", "max")}
        ranges.append({"name": name, "texts": texts, "full": full_text, "left": low, "median": median, "width": max(high - low, 0.4)})
    return ranges
