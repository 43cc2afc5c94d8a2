"""What a person reads of an evaluation: report.html (one self-contained file) and report.md, made from a finished evaluation folder.

The stage writes metrics.json and reconstructions.png; everything here is drawn from those two, so a report can be made again at any time.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import OutputError
from ..files import read_json, write_bytes

METRICS_NAME = "metrics.json"
GRID_NAME = "reconstructions.png"
REPORT_NAME = "report.html"
_IMAGENET_VAL_IMAGES = 50_000
_FAILED_SHOWN = 20
_COLUMNS = ("rfid", "psnr_db", "ssim", "lpips_alex")
# Below this side a browser's smoothing would hide the pixels that the picture is about.
_SMALL_PX = 128
_ROW_MEANINGS = {
    "original": "the crops against themselves: a check",
    "vae": "the VAE alone, nothing quantized: the ceiling",
    "quantized": "the tokens, decoded without the rectifier",
    "rectified": "the tokens, decoded with the rectifier",
}


def write_report(directory: Path | str) -> Path:
    """Write report.md and report.html into a finished evaluation folder, over those of an earlier time.

    Returns:
        The path of report.html.

    Raises:
        OutputError: `directory` holds no finished evaluation, or cannot be written.
    """
    directory = Path(directory)
    metrics = read_json(directory / METRICS_NAME)
    if metrics is None or not (directory / GRID_NAME).is_file():
        raise OutputError(f"{directory} holds no finished evaluation: it needs {METRICS_NAME} and {GRID_NAME}; give the evaluate command first")
    with Image.open(directory / GRID_NAME) as grid:
        tiles = cut_tiles(grid, metrics["pictures"])
    write_bytes(directory / "report.md", markdown_report(metrics).encode())
    write_bytes(directory / REPORT_NAME, html_report(metrics, tiles).encode())
    return directory / REPORT_NAME


def headline_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the heading first: the four rows with rFID, PSNR, SSIM, LPIPS. A dash stands for what could not be computed."""
    images = metrics["images"]
    rfid = "rFID" if images == _IMAGENET_VAL_IMAGES else f"rFID@{images}"
    table = [["row", f"{rfid} ↓", "PSNR (dB) ↑", "SSIM ↑", "LPIPS-Alex ↓"]]
    for name, row in metrics["rows"].items():
        # A null PSNR is that of identical images: every other one is finite.
        psnr = "∞" if row["psnr_db"] is None else _number(row["psnr_db"], 2)
        table.append([name, _number(row["rfid"], 2), psnr, _number(row["ssim"], 4), _number(row["lpips_alex"], 4)])
    return table


def verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence: what quantization costs, and how much of it the rectifier wins back."""
    vae, quantized, rectified = (metrics["rows"][row]["psnr_db"] for row in ("vae", "quantized", "rectified"))
    if vae is None or quantized is None or rectified is None:
        return "Some rows equal the originals bit for bit, so there is no loss to compare."
    lost, won = vae - quantized, rectified - quantized
    if lost <= 0:
        return f"Quantization costs nothing here: {-lost:.2f} dB above the VAE alone."
    change = f"wins back {won:.2f} dB of it ({won / lost:.0%})" if won >= 0 else f"loses another {-won:.2f} dB"
    return f"Quantization costs {lost:.2f} dB against the VAE alone; the rectifier {change}."


def cut_tiles(grid: Image.Image, layout: Mapping[str, Any]) -> list[list[Image.Image]]:
    """The pictures of reconstructions.png at their own size: one list for each image, in the order of the columns."""
    tile, side = layout["tile_px"], layout["tile_px"] // layout["scale"]
    return [
        [grid.crop((left, top, left + tile, top + tile)).resize((side, side), Image.Resampling.NEAREST) for left in layout["left"]]
        for top in layout["top"]
    ]


def markdown_report(metrics: Mapping[str, Any]) -> str:
    """The report for a terminal or a repository."""
    table = headline_table(metrics)
    lines = ["# Evaluation of a ReVQ tokenizer", "", _subtitle(metrics), "", *_markdown_table(table), "", verdict(metrics), ""]
    lines += [f"- {name}: {value}" for name, value in _facts(metrics)]
    lines += ["", "![original, vae, quantized, rectified](reconstructions.png)", "", "## Codebook usage", ""]
    usage = metrics["codebook_usage"]
    spread = [["over the codebooks", "min", "median", "max"]]
    spread.append(["codes used at least once", *(f"{usage['usage'][key]:.1%}" for key in ("min", "median", "max"))])
    spread.append(["perplexity", *(f"{usage['perplexity'][key]:,.1f}" for key in ("min", "median", "max"))])
    lines += [*_markdown_table(spread), ""]
    if metrics["notes"]:
        lines += ["## Notes", "", *(f"- **{name}**: {text}" for name, text in _notes(metrics)), ""]
    lines += ["## Provenance", "", *(f"- {name}: {value}" for name, value in _provenance(metrics)), ""]
    return "\n".join(lines)


def html_report(metrics: Mapping[str, Any], tiles: Sequence[Sequence[Image.Image]]) -> str:
    """The report as one HTML file that needs no network: style and pictures are inside."""
    notes = _notes(metrics)
    sections = [
        _html_facts(metrics),
        _html_headline(metrics, [name for name, _ in notes]),
        _html_pictures(metrics["pictures"], tiles),
        _html_usage(metrics["codebook_usage"]),
        _html_notes(notes),
        _html_provenance(metrics),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>revq evaluation: {escape(_title(metrics))}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<p class="eyebrow">revq evaluation</p>
<h1>{escape(_title(metrics))}</h1>
<p class="subtitle">{escape(_subtitle(metrics))}</p>
</header>
<main>
{"".join(sections)}
</main>
</body>
</html>
"""


def _title(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['tokens_per_image']:,} tokens of {metrics['codebook_usage']['codes']:,} codes"


def _subtitle(metrics: Mapping[str, Any]) -> str:
    protocol = metrics["protocol"]
    return f"{metrics['images']:,} images of {metrics['sources']['images']} at {protocol['image_size']} px, protocol {protocol['name']}"


def _number(value: float | None, digits: int) -> str:
    """Fixed digits without a minus before zero; a dash for None."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("tokens per image", f"{metrics['tokens_per_image']:,}"),
        ("bits per image", f"{metrics['bits_per_image']:,.0f}"),
        ("bits per pixel", f"{metrics['bits_per_pixel']:.3f}"),
        ("images", f"{metrics['images']:,}"),
    ]


def _notes(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Notes as text; the list of unreadable images is shortened."""
    notes = dict(metrics["notes"])
    failed = notes.pop("failed", [])
    notes = {name: notes[name] for name in sorted(notes, key=lambda name: (*_COLUMNS, name).index(name))}
    texts = [(name, str(text)) for name, text in notes.items()]
    if failed:
        shown = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in failed[:_FAILED_SHOWN])
        more = f"; and {len(failed) - _FAILED_SHOWN} more in {METRICS_NAME}" if len(failed) > _FAILED_SHOWN else ""
        texts.append(("unreadable", f"{len(failed)} images are left out. {shown}{more}"))
    return texts


def _provenance(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where everything came from and how it was measured, as (name, value)."""
    protocol, sources, fingerprints = metrics["protocol"], metrics["sources"], metrics["fingerprints"]
    pairs = [(name, f"{sources[name]} (fingerprint {fingerprints[name]})") for name in ("tokenizer", "vae", "images")]
    pairs += [(name, str(protocol[name])) for name in ("resize", "crop", "reference", "rounding", "psnr_db", "ssim")]
    for name in ("rfid", "lpips_alex"):
        settings = {key: value for key, value in protocol[name].items() if key != "weights_sha256"}
        sha256 = protocol[name]["weights_sha256"]
        pairs.append((name, "; ".join(map(str, settings.values())) + (f" (SHA-256 {sha256})" if sha256 else " (missing)")))
    versions = ", ".join(f"{name} {number}" for name, number in protocol["versions"].items())
    return [*pairs, ("computed on", protocol["device"]), ("versions", versions)]


def _markdown_table(table: list[list[str]]) -> list[str]:
    rule = "|" + "---|" + "---:|" * (len(table[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], rule, *lines[1:]]


def _html_facts(metrics: Mapping[str, Any]) -> str:
    cells = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in _facts(metrics))
    return f'<dl class="facts">{cells}</dl>\n'


def _html_headline(metrics: Mapping[str, Any], noted: list[str]) -> str:
    heading, *rows = headline_table(metrics)
    marks = {name: f'<a class="mark" href="#note-{noted.index(name) + 1}" aria-label="note">{noted.index(name) + 1}</a>' for name in noted}
    head = "".join(f'<th scope="col">{escape(text)}{marks.get(name, "")}</th>' for text, name in zip(heading[1:], _COLUMNS, strict=True))
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body += f'<tr class="{escape(name)}"><th scope="row">{escape(name)}<small>{escape(_ROW_MEANINGS.get(name, ""))}</small></th>{cells}</tr>\n'
    return f"""<section aria-labelledby="quality">
<h2 id="quality">Reconstruction</h2>
<p class="verdict">{escape(verdict(metrics))}</p>
<div class="scroll" tabindex="0" role="region" aria-label="metrics of the four rows">
<table><thead><tr><th scope="col"><span class="unseen">row</span></th>{head}</tr></thead><tbody>
{body}</tbody></table></div>
</section>
"""


def _html_pictures(layout: Mapping[str, Any], tiles: Sequence[Sequence[Image.Image]]) -> str:
    columns = layout["columns"]
    heads = "".join(f"<span>{escape(name)}</span>" for name in columns)
    rows = ""
    for key, psnr_db, images in zip(layout["keys"], layout["psnr_db"], tiles, strict=True):
        figures = ""
        for name, image in zip(columns, images, strict=True):
            value = psnr_db.get(name)
            caption = f"{value:.1f} dB" if value is not None else ""
            figures += (
                f'<figure><img src="{_data_url(image)}" width="{image.width}" height="{image.height}" alt="{escape(f"{name}: {key}")}">'
                f"<figcaption><b>{escape(name)}</b><span>{caption}</span></figcaption></figure>"
            )
        small = " small" if images[0].width < _SMALL_PX else ""
        rows += f'<div class="pictures{small}" title="{escape(key)}">{figures}</div>\n'
    return f"""<section aria-labelledby="pictures">
<h2 id="pictures">Pictures</h2>
<p class="lead">Spread evenly over the images, not chosen. Under each: its own PSNR.</p>
<div class="heads" aria-hidden="true">{heads}</div>
{rows}</section>
"""


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html_usage(usage: Mapping[str, Any]) -> str:
    codes = usage["codes"]
    bars = _html_range("codes used at least once", usage["usage"], 1.0, "{:.1%}", "100%")
    bars += _html_range("perplexity", usage["perplexity"], float(codes), "{:,.1f}", f"{codes:,}")
    return f"""<section aria-labelledby="usage">
<h2 id="usage">Codebook usage</h2>
<p class="lead">Over these {usage["images"]:,} images. The bar reaches from the least used codebook to the most used one; the line is the median.</p>
{bars}</section>
"""


def _html_range(title: str, spread: Mapping[str, float], full: float, form: str, full_text: str) -> str:
    low, median, high = (spread[key] for key in ("min", "median", "max"))
    left, middle, right = (100 * min(value / full, 1.0) for value in (low, median, high))
    numbers = "".join(f"<span>{name} <b>{form.format(spread[name])}</b></span>" for name in ("min", "median", "max"))
    return f"""<div class="range"><p><strong>{escape(title)}</strong>{numbers}</p>
<div class="track"><i class="span" style="left:{left:.2f}%;width:{max(right - left, 0.4):.2f}%"></i>
<i class="median" style="left:{middle:.2f}%"></i></div>
<p class="ends"><span>0</span><span>{escape(full_text)}</span></p></div>
"""


def _html_notes(notes: list[tuple[str, str]]) -> str:
    if not notes:
        return ""
    items = ""
    for number, (name, text) in enumerate(notes, 1):
        before, mend, after = text.partition("mend it with: ")
        command, comma, rest = after.partition(", or ")
        told = escape(before) + (f"mend it with<code>{escape(command)}</code>{escape(comma.lstrip(', ') + rest)}" if mend else "")
        items += f'<li id="note-{number}"><b>{escape(name)}</b> {told}</li>\n'
    return f'<section aria-labelledby="notes">\n<h2 id="notes">Notes</h2>\n<ol class="notes">\n{items}</ol></section>\n'


def _html_provenance(metrics: Mapping[str, Any]) -> str:
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _provenance(metrics))
    return f'<section aria-labelledby="provenance">\n<h2 id="provenance">Provenance</h2>\n<dl class="provenance">{pairs}</dl></section>\n'


_STYLE = """
:root { --paper: #fbfaf8; --ink: #1d1f24; --soft: #666a73; --line: #e3e0da; --card: #ffffff; --accent: #0f6f6b; --wash: #e4f1ef; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e9e7e2; --soft: #9b9fa8; --line: #2d3136; --card: #1c1f23; --accent: #6cc7bf; --wash: #1c302f; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 56px 32px 72px; max-width: 940px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 36px; line-height: 1.15; letter-spacing: -.02em; font-weight: 650; text-wrap: balance; }
h2 { margin: 0 0 6px; font-size: 21px; letter-spacing: -.01em; font-weight: 620; }
section { margin-top: 52px; }
.eyebrow { margin: 0 0 10px; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .08em; text-transform: uppercase; }
.subtitle { margin: 10px 0 0; color: var(--soft); overflow-wrap: anywhere; }
.lead, .verdict { margin: 0 0 18px; color: var(--soft); max-width: 68ch; }
.verdict { color: var(--ink); }
.facts { display: grid; grid-template-columns: repeat(4, 1fr); margin: 32px 0 0; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); overflow: hidden; }
.facts div { display: flex; flex-direction: column; padding: 16px 20px; box-shadow: 1px 0 0 var(--line), 0 1px 0 var(--line); }
.facts dd { margin: 0; font-size: 26px; line-height: 1.2; font-weight: 620; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.facts dt { color: var(--soft); font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 12px 0 12px 20px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { width: 104px; position: relative; padding-top: 6px; padding-bottom: 8px; color: var(--soft); font-size: 13.5px; font-weight: 500; }
thead th:first-child { width: auto; }
tbody th { padding-left: 12px; text-align: left; font-weight: 600; white-space: normal; }
tbody th small { display: block; color: var(--soft); font-size: 13.5px; font-weight: 400; }
td { font-size: 18px; }
td:last-child, thead th:last-child { padding-right: 12px; }
tr.rectified > * { background: var(--wash); border-bottom-color: transparent; }
tr.rectified > th { border-radius: 8px 0 0 8px; } tr.rectified > td:last-child { border-radius: 0 8px 8px 0; }
tr.rectified td { color: var(--accent); font-weight: 650; }
.mark { margin-left: 4px; padding: 0 5px; border-radius: 8px; background: var(--wash); color: var(--accent); font-size: 11px; font-weight: 600;
  text-decoration: none; vertical-align: 4px; }
.mark:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.heads, .pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
.heads { position: sticky; top: 0; z-index: 1; padding: 10px 0 8px; background: var(--paper); font-size: 14px; font-weight: 600; }
.pictures { margin-bottom: 14px; break-inside: avoid; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line); }
.small img { image-rendering: pixelated; }
figcaption { display: flex; justify-content: space-between; gap: 8px; min-height: 21px; padding-top: 3px; color: var(--soft); font-size: 13px;
  font-variant-numeric: tabular-nums; }
figcaption b { display: none; color: var(--ink); font-weight: 600; }
.range { margin-top: 22px; }
.range p { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 0 0 8px; color: var(--soft); font-size: 14px; font-variant-numeric: tabular-nums; }
.range strong { flex: 1 1 190px; color: var(--ink); font-size: 15px; font-weight: 600; }
.range b { color: var(--ink); font-weight: 600; }
.track { position: relative; height: 14px; border-radius: 7px; background: var(--line); }
.track i { position: absolute; top: 0; bottom: 0; }
.track .span { border-radius: 7px; background: var(--accent); opacity: .45; }
.track .median { top: -3px; bottom: -3px; width: 3px; margin-left: -1.5px; border-radius: 2px; background: var(--accent); }
.range .ends { justify-content: space-between; margin: 4px 0 0; font-size: 12.5px; }
.notes { margin: 14px 0 0; padding-left: 22px; color: var(--soft); font-size: 14.5px; }
.notes li { margin-bottom: 12px; padding-left: 6px; overflow-wrap: anywhere; }
.notes li:target { background: var(--wash); border-radius: 6px; }
.notes b { color: var(--ink); font-weight: 600; }
code { display: block; margin: 8px 0; padding: 10px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  color: var(--ink); font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.provenance { display: grid; grid-template-columns: 130px 1fr; gap: 8px 20px; margin: 14px 0 0; font-size: 14.5px; }
.provenance dt { color: var(--soft); }
.provenance dd { margin: 0; overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 620px) {
  body { padding: 32px 16px 48px; }
  h1 { font-size: 28px; }
  section { margin-top: 40px; }
  .facts { grid-template-columns: 1fr 1fr; }
  .facts div { padding: 12px 16px; }
  .facts dd { font-size: 22px; }
  th, td { padding: 10px 0 10px 10px; }
  thead th { width: auto; font-size: 12px; white-space: normal; vertical-align: bottom; }
  tbody th { padding-left: 8px; font-size: 15px; }
  tbody th small { display: none; }
  td { font-size: 15.5px; }
  td:last-child, thead th:last-child { padding-right: 8px; }
  .heads { display: none; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 8px 10px; margin-bottom: 22px; padding-bottom: 14px; border-bottom: 1px solid var(--line); }
  figcaption b { display: inline; }
  .provenance { grid-template-columns: 1fr; gap: 0; }
  .provenance dd { margin-bottom: 10px; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --card: #fff; --accent: #0f6f6b; --wash: #eef5f4; }
  body { max-width: none; padding: 0; font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .heads { position: static; }
  section { margin-top: 28px; }
  h2 { break-after: avoid; }
  tr, .range, li { break-inside: avoid; }
}
"""
