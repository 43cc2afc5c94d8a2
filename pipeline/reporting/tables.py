"""The texts and tables of a report: rows of strings, the heading first, that Markdown and HTML lay out alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METRICS_NAME = "metrics.json"
COLUMNS = ("rfid", "kid", "lpips_alex", "lpips_vgg", "psnr_db", "ssim", "inception_score")
"""What the field judges by first."""
_ALWAYS = ("rfid", "kid", "lpips_alex", "psnr_db", "ssim")
_TITLES = {
    "rfid": ("rFID ↓", 2),
    "kid": ("KID × 1000 ↓", 2),
    "lpips_alex": ("LPIPS-Alex ↓", 4),
    "lpips_vgg": ("LPIPS-VGG ↓", 4),
    "psnr_db": ("PSNR (dB) ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "inception_score": ("Inception score ↑", 2),
}
_OF_OTHER_NETWORKS = {"fd_": ("Frechet distance ({}) ↓", 2), "kid_": ("KID × 1000 ({}) ↓", 2), "agreement_": ("same class ({}) ↑", 3)}
"""By the first letters of a metric of `--features`: title and digits."""
_ERROR = "_standard_error"
_FAILED_SHOWN = 20
NOT_COMPARABLE = "not comparable to published numbers"


def shown_columns(metrics: Mapping[str, Any]) -> list[str]:
    """The metrics with a column: the usual five, and others that were measured."""
    rows = list(metrics["rows"].values())
    others = [name for name in rows[0] if name not in COLUMNS and not name.endswith(_ERROR)] if rows else []
    return [name for name in (*COLUMNS, *others) if name in _ALWAYS or any(row.get(name) is not None for row in rows)]


def column_title(name: str, label: str) -> str:
    """Heading of a metric's column, with an arrow to the better side; `label` is what rFID may be called here."""
    if name == "rfid":
        return f"{label} ↓"
    if name in _TITLES:
        return _TITLES[name][0]
    prefix = _other(name)
    return _OF_OTHER_NETWORKS[prefix][0].format(name.removeprefix(prefix))


def _other(name: str) -> str:
    return next(prefix for prefix in _OF_OTHER_NETWORKS if name.startswith(prefix))


def headline_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, the heading first: the four rows with their metrics. A dash stands for what could not be computed."""
    columns = shown_columns(metrics)
    label = metrics.get("rfid_label") or f"rFID@{metrics['images']}"
    table = [["row", *(column_title(name, label) for name in columns)]]
    for name, row in metrics["rows"].items():
        table.append([name, *(metric_text(row, column) for column in columns)])
    return table


def metric_text(row: Mapping[str, Any], column: str) -> str:
    """One value of a row; a null PSNR is that of identical images, for every other one is finite."""
    if column == "psnr_db" and row[column] is None:
        return "∞"
    digits = _TITLES[column][1] if column in _TITLES else _OF_OTHER_NETWORKS[_other(column)][1]
    if not column.startswith("kid"):
        return number(row.get(column), digits)
    value, error = row.get(column), row.get(column + _ERROR)
    text = number(None if value is None else 1000 * value, digits)
    return text if error is None else f"{text} ± {number(1000 * error, digits)}"


def verdict(metrics: Mapping[str, Any]) -> str:
    """What quantization costs, and how much of it the rectifier recovers: by the distances that were measured, then in decibels."""
    rows = [metrics["rows"][row] for row in ("vae", "quantized", "rectified")]
    psnr = [row["psnr_db"] for row in rows]
    if None in psnr:
        return "Some rows equal the originals bit for bit, so there is no loss to compare."
    label = metrics.get("rfid_label") or f"rFID@{metrics['images']}"
    told = [
        f"{title} from {number(vae, digits)} to {number(quantized, digits)}, and the rectifier takes it to {number(rectified, digits)}"
        for name, title, digits in (("rfid", label, 2), ("lpips_alex", "LPIPS-Alex", 4))
        for vae, quantized, rectified in [[row.get(name) for row in rows]]
        if vae is not None and quantized is not None and rectified is not None
    ]
    lost, won = psnr[0] - psnr[1], psnr[2] - psnr[1]
    if lost <= 0:
        decibels = f"Quantization costs nothing here: {-lost:.2f} dB above the VAE alone."
    else:
        change = f"recovers {won:.2f} dB of it ({won / lost:.0%})" if won >= 0 else f"loses another {-won:.2f} dB"
        decibels = f"Quantization costs {lost:.2f} dB against the VAE alone; the rectifier {change}."
    return f"Quantization moves {'; '.join(told)}. {decibels}" if told else decibels


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
    rfid = metrics.get("rfid_label", "rFID")
    names = {"rfid": rfid, "kid": "KID", "lpips_alex": "LPIPS-Alex", "lpips_vgg": "LPIPS-VGG", "psnr_db": "PSNR", "ssim": "SSIM"}
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
        elif value is None:
            continue
        elif name == "features":
            pairs.append(("feature network", f"{value['network']}, as {value['name']} (SHA-256 {value['sha256']})"))
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
