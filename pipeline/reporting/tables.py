"""The texts and tables of a report: rows of strings, the heading first, that Markdown and HTML lay out alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS_NAME = "metrics.json"
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
    """One sentence: what quantization costs, and how much of it the rectifier recovers."""
    vae, quantized, rectified = (metrics["rows"][row]["psnr_db"] for row in ("vae", "quantized", "rectified"))
    if vae is None or quantized is None or rectified is None:
        return "Some rows equal the originals bit for bit, so there is no loss to compare."
    lost, won = vae - quantized, rectified - quantized
    if lost <= 0:
        return f"Quantization costs nothing here: {-lost:.2f} dB above the VAE alone."
    change = f"recovers {won:.2f} dB of it ({won / lost:.0%})" if won >= 0 else f"loses another {-won:.2f} dB"
    return f"Quantization costs {lost:.2f} dB against the VAE alone; the rectifier {change}."


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
    """Share of the quantization loss that the rectifier recovers, by every metric that can tell."""
    names = {"psnr_db": "PSNR", "ssim": "SSIM", "lpips_alex": "LPIPS-Alex", "lpips_vgg": "LPIPS-VGG", "rfid": metrics.get("rfid_label", "rFID")}
    won = metrics.get("recovered") or {}
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
