"""The HTML report of one evaluation: one file that needs no network. Style and script lie in `assets/`; pictures are inside as data.

Without JavaScript and on paper it is plain grids of pictures; the script only adds the slider that lays a reconstruction over its original.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from .charts import Chart, legend, svg
from .figures import codebook_charts, tolerance_charts, training_charts
from .report import (
    NOT_COMPARABLE,
    class_table,
    facts,
    headline_table,
    notes,
    provenance,
    shares,
    shown_columns,
    speed,
    subtitle,
    title,
    tolerance_table,
    verdict,
)

Tiles = Sequence[Sequence[Image.Image]]
# Below this side a browser's smoothing would hide the pixels that the picture is about.
_SMALL_PX = 128
_HEAT_FULL = 64
"""Mean difference over the colours, in levels of 255, at which the error map is brightest."""
_HEAT = ((0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191))
_ROW_MEANINGS = {
    "original": "the crops against themselves: a check",
    "vae": "the VAE alone, nothing quantized: the ceiling, unless tokens are refined",
    "quantized": "the tokens, decoded without the rectifier",
    "rectified": "the tokens, decoded with the rectifier",
}


def html_report(metrics: Mapping[str, Any], tiles: Tiles, extremes: Tiles = ()) -> str:
    """The whole report; `tiles` and `extremes` are the pictures of the two sheets."""
    told = notes(metrics)
    sections = [
        _facts(metrics),
        _headline(metrics, [name for name, _ in told]),
        _pictures(metrics["pictures"], tiles),
        _extremes(metrics.get("extremes"), extremes),
        _tolerance(metrics),
        _usage(metrics),
        _classes(metrics.get("classes")),
        _training(metrics.get("training")),
        _notes(told),
        _provenance(metrics),
    ]
    return page(f"revq evaluation: {title(metrics)}", "revq evaluation", title(metrics), subtitle(metrics), "".join(sections), script=True)


def comparison_page(table: Sequence[Sequence[str]], differences: Sequence[str]) -> str:
    """The HTML of `revq compare`."""
    warned = "".join(f'<p class="warning">{escape(text)}</p>\n' for text in differences)
    alike = "" if differences else '<p class="lead">Same protocol, same images, same metric weights.</p>\n'
    lead = "The rectified row of each evaluation; the VAE's own PSNR is the ceiling of its row."
    content = f"<section>\n{warned}{alike}{table_html(table, 'comparison')}</section>"
    return page("revq comparison", "revq comparison", f"{len(table) - 1} tokenizers", lead, content)


def page(name: str, eyebrow: str, heading: str, lead: str, content: str, *, script: bool = False) -> str:
    """A whole HTML document around `content`."""
    code = f"<script>{_asset('report.js')}</script>\n" if script else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}</title>
<style>{_asset("report.css")}</style>
</head>
<body>
<header>
<p class="eyebrow">{escape(eyebrow)}</p>
<h1>{escape(heading)}</h1>
<p class="subtitle">{escape(lead)}</p>
</header>
<main>
{content}
</main>
{code}</body>
</html>
"""


def table_html(table: Sequence[Sequence[str]], label: str) -> str:
    """A table whose first column names its rows, in a box that scrolls sideways where it is too wide."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in table[0])
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>\n' for name, *values in table[1:]
    )
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">
<table class="plain"><thead><tr>{head}</tr></thead><tbody>
{rows}</tbody></table></div>
"""


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _facts(metrics: Mapping[str, Any]) -> str:
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in facts(metrics))
    return f'<dl class="facts">{cells}</dl>\n'


def _headline(metrics: Mapping[str, Any], noted: Sequence[str]) -> str:
    heading, *rows = headline_table(metrics)
    marks = {name: f'<a class="mark" href="#note-{noted.index(name) + 1}" aria-label="note">{noted.index(name) + 1}</a>' for name in noted}
    warned = f"<small>{NOT_COMPARABLE}</small>" if metrics.get("rfid_label") != "rFID" else ""
    head = ""
    for text, name in zip(heading[1:], shown_columns(metrics), strict=True):
        head += f'<th scope="col">{escape(text)}{marks.get(name, "")}{warned if name == "rfid" else ""}</th>'
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body += f'<tr class="{escape(name)}"><th scope="row">{escape(name)}<small>{escape(_ROW_MEANINGS.get(name, ""))}</small></th>{cells}</tr>\n'
    won = ", ".join(f"{name} {share}" for name, share in shares(metrics))
    lines = [f"Share of the loss won back: {won}." if won else "", f"Speed: {speed(metrics)}." if speed(metrics) else ""]
    more = "".join(f'<p class="lead">{escape(line)}</p>' for line in lines if line)
    return f"""<section aria-labelledby="quality">
<h2 id="quality">Reconstruction</h2>
<p class="verdict">{escape(verdict(metrics))}</p>
<div class="scroll" tabindex="0" role="region" aria-label="metrics of the four rows">
<table><thead><tr><th scope="col"><span class="unseen">row</span></th>{head}</tr></thead><tbody>
{body}</tbody></table></div>
{more}</section>
"""


def _pictures(layout: Mapping[str, Any], tiles: Tiles) -> str:
    return f"""<section aria-labelledby="pictures">
<h2 id="pictures">Pictures</h2>
<p class="lead">Spread evenly over the images, not chosen. Under each: its own PSNR. The error map shows how far the rectified picture is from the
original, from black (equal) to white ({_HEAT_FULL} of 255 levels or more).</p>
<div id="viewer" hidden>
<div class="stage"><img class="under" alt=""><img class="over" alt=""><span class="handle"></span>
<input type="range" min="0" max="100" value="50" aria-label="how much of the original is laid over"></div>
<p class="told"><span class="left">original</span><span class="what" aria-live="polite"></span><span class="right"></span></p>
<div class="controls"><button type="button" data-step="-1" aria-label="previous picture">←</button>
<div role="group" aria-label="compare with" class="rows"></div>
<button type="button" data-step="1" aria-label="next picture">→</button></div>
</div>
{_picture_rows(layout, tiles)}</section>
"""


def _extremes(layout: Mapping[str, Any] | None, tiles: Tiles) -> str:
    if not layout or not tiles:
        return ""
    parts = ""
    for kind, name in (("worst", "Lowest PSNR"), ("best", "Highest PSNR")):
        chosen = [i for i, found in enumerate(layout["kinds"]) if found == kind]
        part = {**layout, "keys": [layout["keys"][i] for i in chosen], "psnr_db": [layout["psnr_db"][i] for i in chosen]}
        parts += f"<h3>{name}</h3>\n{_picture_rows(part, [tiles[i] for i in chosen])}"
    return f"""<section aria-labelledby="extremes">
<h2 id="extremes">Worst and best images</h2>
<p class="lead">By PSNR of the rectified row, over all images. images.parquet has every image's own scores.</p>
{parts}</section>
"""


def _picture_rows(layout: Mapping[str, Any], tiles: Tiles) -> str:
    columns = [*layout["columns"], "error"]
    rows = f'<div class="heads" aria-hidden="true">{"".join(f"<span>{escape(name)}</span>" for name in columns)}</div>\n'
    for key, psnr_db, images in zip(layout["keys"], layout["psnr_db"], tiles, strict=True):
        figures = ""
        for name, image in zip(columns, [*images, error_map(images[0], images[-1])], strict=True):
            value = psnr_db.get(name)
            caption = f"{value:.1f} dB" if value is not None else ""
            figures += (
                f'<figure data-row="{escape(name)}"><img src="{_data_url(image)}" width="{image.width}" height="{image.height}" '
                f'alt="{escape(f"{name}: {key}")}"><figcaption><b>{escape(name)}</b><span>{caption}</span></figcaption></figure>'
            )
        small = " small" if images[0].width < _SMALL_PX else ""
        rows += f'<div class="pictures{small}" title="{escape(key)}">{figures}</div>\n'
    return rows


def error_map(original: Image.Image, other: Image.Image) -> Image.Image:
    """Mean absolute difference over the colours of each pixel, as a palette picture from black to white."""
    ours, theirs = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (original, other))
    level = np.abs(ours - theirs).mean(axis=2) / _HEAT_FULL
    image = Image.fromarray((level.clip(0, 1) * 63).round().astype(np.uint8), "P")
    places = np.linspace(0, len(_HEAT) - 1, 64)
    palette = np.stack([np.interp(places, range(len(_HEAT)), [colour[channel] for colour in _HEAT]) for channel in range(3)], axis=1)
    image.putpalette(palette.round().astype(np.uint8).tobytes())
    return image


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _charts(charts: Sequence[Chart]) -> str:
    figures = "".join(f'<figure class="chart"><figcaption>{legend(chart)}</figcaption>{svg(chart)}</figure>\n' for chart in charts)
    return f'<div class="charts">\n{figures}</div>\n' if charts else ""


def _tolerance(metrics: Mapping[str, Any]) -> str:
    tolerance = metrics.get("tolerance")
    if not tolerance:
        return ""
    return f"""<section aria-labelledby="tolerance">
<h2 id="tolerance">How much error the decoder forgives</h2>
<p class="lead">Gaussian noise on the latents of {tolerance["images"]} images, decoded. The dots are this tokenizer's own
latents, at the size of their error in either measure: a dot above the curve of PSNR is an error that hurts less than noise of the same size.{
        " Noise in the decoder's metric moves the picture alike in every direction, to first order." if tolerance.get("decoder") else ""
    }</p>
{_charts(tolerance_charts(tolerance))}{table_html(tolerance_table(tolerance), "quality against noise")}</section>
"""


def _usage(metrics: Mapping[str, Any]) -> str:
    usage = metrics["codebook_usage"]
    codes = usage["codes"]
    bars = _range("codes used at least once", usage["usage"], 1.0, "{:.1%}", "100%")
    bars += _range("perplexity", usage["perplexity"], float(codes), "{:,.1f}", f"{codes:,}")
    return f"""<section aria-labelledby="usage">
<h2 id="usage">Codebook usage</h2>
<p class="lead">Over these {usage["images"]:,} images. The bar reaches from the least used codebook to the most used one; the line is the median.</p>
{bars}{_charts(codebook_charts(metrics))}</section>
"""


def _range(name: str, spread: Mapping[str, float], full: float, form: str, full_text: str) -> str:
    low, median, high = (spread[key] for key in ("min", "median", "max"))
    left, middle, right = (100 * min(value / full, 1.0) for value in (low, median, high))
    numbers = "".join(f"<span>{key} <b>{form.format(spread[key])}</b></span>" for key in ("min", "median", "max"))
    return f"""<div class="range"><p><strong>{escape(name)}</strong>{numbers}</p>
<div class="track"><i class="span" style="left:{left:.2f}%;width:{max(right - left, 0.4):.2f}%"></i>
<i class="median" style="left:{middle:.2f}%"></i></div>
<p class="ends"><span>0</span><span>{escape(full_text)}</span></p></div>
"""


def _classes(classes: Mapping[str, Any] | None) -> str:
    if not classes:
        return ""
    return f"""<section aria-labelledby="classes">
<h2 id="classes">Classes</h2>
<p class="lead">The worst and the best of {classes["count"]:,} classes, by mean PSNR of the rectified row.</p>
{table_html(class_table(classes), "classes")}</section>
"""


def _training(training: Mapping[str, Any] | None) -> str:
    charts = training_charts(training)
    if not charts:
        return ""
    return f"""<section aria-labelledby="training">
<h2 id="training">Training</h2>
<p class="lead">From the run's metrics.parquet.</p>
{_charts(charts)}</section>
"""


def _notes(told: Sequence[tuple[str, str]]) -> str:
    if not told:
        return ""
    items = ""
    for position, (name, text) in enumerate(told, 1):
        before, mend, after = text.partition("mend it with: ")
        command, comma, rest = after.partition(", or ")
        words = escape(before) + (f"mend it with<code>{escape(command)}</code>{escape(comma.lstrip(', ') + rest)}" if mend else "")
        items += f'<li id="note-{position}"><b>{escape(name)}</b> {words}</li>\n'
    return f'<section aria-labelledby="notes">\n<h2 id="notes">Notes</h2>\n<ol class="notes">\n{items}</ol></section>\n'


def _provenance(metrics: Mapping[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in provenance(metrics))
    return f'<section aria-labelledby="provenance">\n<h2 id="provenance">Provenance</h2>\n<dl class="provenance">{pairs}</dl></section>\n'
