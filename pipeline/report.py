"""What a person reads of an evaluation: report.html (one self-contained file), report.md and tolerance.png, made from a finished evaluation folder.

The stage writes metrics.json and the sheets of pictures; everything here is drawn from those, so a report can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import OutputError
from ..files import read_json, write_bytes
from .charts import png
from .figures import tolerance_charts

METRICS_NAME = "metrics.json"
GRID_NAME = "reconstructions.png"
EXTREMES_NAME = "extremes.png"
TOLERANCE_NAME = "tolerance.png"
REPORT_NAME = "report.html"
COLUMNS = ("rfid", "psnr_db", "ssim", "lpips_alex", "lpips_vgg", "inception_score")
_ALWAYS = ("rfid", "psnr_db", "ssim", "lpips_alex")
_TITLES = {
    "psnr_db": ("PSNR (dB) ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "lpips_alex": ("LPIPS-Alex ↓", 4),
    "lpips_vgg": ("LPIPS-VGG ↓", 4),
    "inception_score": ("Inception score ↑", 2),
}
_FAILED_SHOWN = 20
NOT_COMPARABLE = "not comparable to published numbers"


def write_report(directory: Path | str) -> Path:
    """Write report.md, report.html and tolerance.png into a finished evaluation folder, over those of an earlier time.

    Returns:
        The path of report.html.

    Raises:
        OutputError: `directory` holds no finished evaluation, or cannot be written.
    """
    from .page import html_report

    directory = Path(directory)
    metrics = read_json(directory / METRICS_NAME)
    if metrics is None or not (directory / GRID_NAME).is_file():
        raise OutputError(f"{directory} holds no finished evaluation: it needs {METRICS_NAME} and {GRID_NAME}; give the evaluate command first")
    tiles = _tiles(directory / GRID_NAME, metrics["pictures"])
    extremes = _tiles(directory / EXTREMES_NAME, metrics["extremes"]) if metrics.get("extremes") else []
    charts = tolerance_charts(metrics.get("tolerance"))
    if charts:
        write_bytes(directory / TOLERANCE_NAME, png(charts))
    write_bytes(directory / "report.md", markdown_report(metrics).encode())
    write_bytes(directory / REPORT_NAME, html_report(metrics, tiles, extremes).encode())
    return directory / REPORT_NAME


def shown_columns(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics with a column: the usual four, and others that were measured."""
    rows = metrics["rows"].values()
    return [name for name in COLUMNS if name in _ALWAYS or any(row.get(name) is not None for row in rows)]


def headline_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the heading first: the four rows with their metrics. A dash stands for what could not be computed."""
    columns = shown_columns(metrics)
    label = metrics.get("rfid_label") or f"rFID@{metrics['images']}"
    table = [["row", *(f"{label} ↓" if name == "rfid" else _TITLES[name][0] for name in columns)]]
    for name, row in metrics["rows"].items():
        table.append([name, *(metric_text(row, column) for column in columns)])
    return table


def metric_text(row: Mapping[str, Any], column: str) -> str:
    """One value of a row; a null PSNR is that of identical images, for every other one is finite."""
    if column == "psnr_db" and row[column] is None:
        return "∞"
    return number(row.get(column), 2 if column == "rfid" else _TITLES[column][1])


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
    """The pictures of a sheet at their own size: one list for each image, in the order of the columns."""
    tile, side = layout["tile_px"], layout["tile_px"] // layout["scale"]
    return [
        [grid.crop((left, top, left + tile, top + tile)).resize((side, side), Image.Resampling.NEAREST) for left in layout["left"]]
        for top in layout["top"]
    ]


def _tiles(path: Path, layout: Mapping[str, Any]) -> list[list[Image.Image]]:
    with Image.open(path) as grid:
        return cut_tiles(grid, layout)


def title(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['tokens_per_image']:,} tokens of {metrics['codebook_usage']['codes']:,} codes"


def subtitle(metrics: Mapping[str, Any]) -> str:
    protocol, steps = metrics["protocol"], metrics["protocol"].get("refine_steps")
    refined = f", tokens refined by {steps} steps" if steps else ""
    return f"{metrics['images']:,} images of {metrics['sources']['images']} at {protocol['image_size']} px, protocol {protocol['name']}{refined}"


def number(value: float | None, digits: int) -> str:
    """Fixed digits without a minus before zero; a dash for None."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a tokenizer's user asks first, as (name, value)."""
    return [
        ("tokens per image", f"{metrics['tokens_per_image']:,}"),
        ("bits per image", f"{metrics['bits_per_image']:,.0f}"),
        ("bits per pixel", f"{metrics['bits_per_pixel']:.3f}"),
        ("images", f"{metrics['images']:,}"),
    ]


def speed(metrics: Mapping[str, Any]) -> str | None:
    """Throughput in words; None where it was not measured."""
    rates = metrics.get("throughput") or {}
    encode, decode = rates.get("encode_images_per_s"), rates.get("decode_images_per_s")
    if not encode or not decode:
        return None
    return f"encode {encode:,.1f} and decode {decode:,.1f} images/s on {rates['device']}, {rates['batch_size']} at once"


def shares(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Share of the quantization loss that the rectifier wins back, by every metric that can tell."""
    names = {"psnr_db": "PSNR", "ssim": "SSIM", "lpips_alex": "LPIPS-Alex", "lpips_vgg": "LPIPS-VGG", "rfid": metrics.get("rfid_label", "rFID")}
    won = metrics.get("won_back") or {}
    return [(title, f"{won[name]:.0%}") for name, title in names.items() if won.get(name) is not None]


def notes(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Notes as text, those of the table's columns first; the list of unreadable images is shortened."""
    found = dict(metrics["notes"])
    failed = found.pop("failed", [])
    order = (*COLUMNS, *(name for name in found if name not in COLUMNS))
    texts = [(name, str(found[name])) for name in order if name in found]
    if failed:
        shown = "; ".join(f"{entry['key']}: {entry['reason']}" for entry in failed[:_FAILED_SHOWN])
        more = f"; and {len(failed) - _FAILED_SHOWN} more in {METRICS_NAME}" if len(failed) > _FAILED_SHOWN else ""
        texts.append(("unreadable", f"{len(failed)} images are left out. {shown}{more}"))
    return texts


def provenance(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where everything came from and how it was measured, as (name, value)."""
    protocol, sources, fingerprints = metrics["protocol"], metrics["sources"], metrics["fingerprints"]
    pairs = [(name, f"{sources[name]} (fingerprint {fingerprints[name]})") for name in ("tokenizer", "vae", "images")]
    for name, value in protocol.items():
        if name == "weights":
            pairs += [(f"weights of {metric}", _weights(found)) for metric, found in value.items()]
        elif isinstance(value, Mapping):
            pairs.append((name, ", ".join(f"{key} {_plain(item)}" for key, item in value.items())))
        else:
            pairs.append((name.replace("_", " "), _plain(value)))
    trip = metrics.get("round_trip")
    if trip:
        same = "the same pictures" if not trip["largest_difference"] else f"pictures up to {trip['largest_difference']} levels apart"
        pairs.append(("stored tokens", f"indices to bytes and back, decoded, against encode and decode at once: {same} ({trip['images']} images)"))
    return pairs


def _weights(found: Mapping[str, Any]) -> str:
    if not found["sha256"]:
        return "missing"
    return f"{found['file']}, {'published' if found['published'] else 'other than the published ones'} (SHA-256 {found['sha256']})"


def _plain(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is text and the others numbers."""
    rule = "|" + "---|" + "---:|" * (len(table[0]) - 1)
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return [lines[0], rule, *lines[1:]]


def tolerance_table(tolerance: Mapping[str, Any]) -> list[list[str]]:
    """Noise against what it does, both kinds, then the tokenizer's own errors at their size in either measure."""
    titles = {"psnr_db": "PSNR (dB)", "ssim": "SSIM", "lpips_alex": "LPIPS-Alex", "rfid": f"rFID@{tolerance['images']}"}
    measured = [metric for metric in titles if any(point.get(metric) is not None for point in tolerance["isotropic"])]
    digits = {metric: 4 if metric in {"ssim", "lpips_alex"} else 2 for metric in measured}
    table = [["noise", *(titles[metric] for metric in measured)]]
    for kind in ("isotropic", "decoder"):
        for point in tolerance.get(kind) or []:
            if point["noise"] == 0 and kind == "decoder":
                continue
            name = "none" if point["noise"] == 0 else f"{kind} {point['noise']:g}"
            table.append([name, *(number(point[metric], places) for metric, places in digits.items())])
    for row, mark in tolerance["marks"].items():
        sizes = f"{mark['noise']['isotropic']:.3f}" + (f" / {mark['noise']['decoder']:.3f}" if tolerance.get("decoder") else "")
        table.append([f"{row} ({sizes})", *(number(mark[metric], places) for metric, places in digits.items())])
    return table


def class_table(classes: Mapping[str, Any]) -> list[list[str]]:
    """The worst classes and then the best, by PSNR of the rectified row."""
    entries = [*classes["worst"], *reversed(classes["best"])]
    digits = {"ssim": 4, "lpips_alex": 4}
    lines = [
        [entry["name"] or "(none)", str(entry["images"]), metric_text(entry, "psnr_db"), *(number(entry[name], n) for name, n in digits.items())]
        for entry in entries
    ]
    return [["class", "images", "PSNR (dB)", "SSIM", "LPIPS-Alex"], *lines]


def usage_table(usage: Mapping[str, Any]) -> list[list[str]]:
    """Smallest, median and largest over the codebooks."""
    keys = ("min", "median", "max")
    return [
        ["over the codebooks", *keys],
        ["codes used at least once", *(f"{usage['usage'][key]:.1%}" for key in keys)],
        ["perplexity", *(f"{usage['perplexity'][key]:,.1f}" for key in keys)],
    ]


def markdown_report(metrics: Mapping[str, Any]) -> str:
    """The report for a terminal or a repository."""
    lines = ["# Evaluation of a ReVQ tokenizer", "", subtitle(metrics), "", *markdown_table(headline_table(metrics)), "", verdict(metrics), ""]
    if metrics.get("rfid_label") != "rFID":
        lines += [f"{metrics.get('rfid_label') or 'rFID'} is {NOT_COMPARABLE}.", ""]
    lines += [f"- {name}: {value}" for name, value in facts(metrics)]
    if shares(metrics):
        lines.append("- loss won back by the rectifier: " + ", ".join(f"{name} {share}" for name, share in shares(metrics)))
    if speed(metrics):
        lines.append(f"- speed: {speed(metrics)}")
    lines += ["", "![original, vae, quantized, rectified](reconstructions.png)", ""]
    if metrics.get("extremes"):
        lines += ["## Worst and best images", "", "![the worst images, then the best](extremes.png)", ""]
    if metrics.get("tolerance"):
        lines += ["## Tolerance of the decoder", "", "![quality against noise on the latents](tolerance.png)", ""]
        lines += [*markdown_table(tolerance_table(metrics["tolerance"])), ""]
    lines += ["## Codebook usage", "", *markdown_table(usage_table(metrics["codebook_usage"])), ""]
    if metrics.get("classes"):
        lines += ["## Classes: the worst, then the best", "", *markdown_table(class_table(metrics["classes"])), ""]
    if metrics["notes"]:
        lines += ["## Notes", "", *(f"- **{name}**: {text}" for name, text in notes(metrics)), ""]
    lines += ["## Provenance", "", *(f"- {name}: {value}" for name, value in provenance(metrics)), ""]
    return "\n".join(lines)
