"""From a finished pass over the images to what is written down: metrics.json and images.parquet.

Shapes: N images, T tokens per image (= codebooks), K codes per codebook.
"""

from __future__ import annotations

import hashlib
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...cache.sources import ImageSource
from ...models.tokenizer import ReVQTokenizer
from .. import ranks
from .feature_sets import SetMetrics
from .inception import Inception
from .metric_notes import write_notes
from .metrics import IMAGE_METRICS, METRICS, ROWS, finite_or_none, spread
from .networks import precision_flags
from .protocols import Protocol, is_imagenet_val, rfid_label
from .state import COLUMNS, LATENT_METRICS, EvaluationState
from .weights import FoundWeights

INCEPTION = Inception.name
_CLASSES_SHOWN = 10
_LOWER_IS_BETTER = ("rfid", "kid", "lpips_alex", "lpips_vgg", "fd_", "kid_")


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a summary needs to know besides the numbers."""

    tokenizer: ReVQTokenizer
    source: ImageSource
    protocol: Protocol
    weights: Mapping[str, FoundWeights]
    settings: Mapping[str, Any]
    """Choices of this run that are recorded as they are: seed, precision, batch size."""
    tokenizer_name: str
    features: Mapping[str, Any] | None
    """The network of `--features`: as it was given, its name and fingerprint; None where there is none."""
    reused_features: int
    """Originals whose Inception features came from the cache."""


def summarize(state: EvaluationState, context: Context, *, tolerance: dict[str, Any] | None, training: dict[str, Any] | None) -> dict[str, Any]:
    """The content of metrics.json, but for the pictures."""
    tokenizer, source = context.tokenizer, context.source
    keys = [source.items[index].key for index in state.index]
    each = state.usage.each()
    rows = row_values(state, has_rectifier=tokenizer.rectifier is not None)
    imagenet_val = is_imagenet_val(keys)
    metrics = {
        "protocol": describe_protocol(context),
        "images": state.images,
        "rfid_label": rfid_label(state.images, imagenet_val=imagenet_val, published_weights=context.weights["rfid"].published),
        "rows": rows,
        "recovered": recovered(rows),
        "tokens_per_image": tokenizer.tokens,
        "bits_per_image": tokenizer.bits_per_image,
        "bits_per_pixel": tokenizer.bits_per_image / tokenizer.image_size**2,
        "codebook_usage": {**{name: spread(values) for name, values in each.items()}, "codes": tokenizer.codes, "images": state.images},
        "latent_error": {row: {name: float(state.column(row, name).mean()) for name in LATENT_METRICS} for row in ("quantized", "rectified")},
        "dataset": {
            "imagenet_val": imagenet_val,
            "listed": state.listed,
            "unreadable": len(state.failed),
            "enlarged": state.enlarged,
            "skipped": source.skipped.counts(),
        },
        "fingerprints": {
            "tokenizer": tokenizer.fingerprint,
            "vae": tokenizer.vae.fingerprint,
            "images": hashlib.sha256(b"".join(state.digests)).hexdigest()[:16],
        },
        "sources": {"tokenizer": context.tokenizer_name, "vae": tokenizer.vae.id, "images": source.name},
        "round_trip": state.round_trip,
        "throughput": throughput(state, context),
        "classes": class_values(state, source),
        "tolerance": tolerance,
        "training": training,
        "codebooks": {name: [round(value, 6) for value in values] for name, values in each.items()},
    }
    return {**metrics, "notes": write_notes(metrics, state, context.weights, tokenizer, source, context.protocol)}


def row_values(state: EvaluationState, *, has_rectifier: bool) -> dict[str, dict[str, float | None]]:
    """Every metric of every row; None for one that was left out, that needs more images, or that is infinite (PSNR of equal images)."""
    sets = {name: each.metrics() for name, each in state.sets.items()}
    nothing = SetMetrics(frechet=None, kid=None, kid_standard_error=None, score=None, agreement=None)
    values: dict[str, dict[str, float | None]] = {}
    for row in ROWS:
        same = "quantized" if row == "rectified" and not has_rectifier else row
        found = {name: finite_or_none(float(state.column(row, name).mean())) for name in IMAGE_METRICS}
        inception = sets[INCEPTION][same] if INCEPTION in sets else nothing
        found |= {"rfid": inception.frechet, "kid": inception.kid, "kid_standard_error": inception.kid_standard_error}
        found["inception_score"] = inception.score
        values[row] = {name: found[name] for name in METRICS}
        for name, each in sets.items():
            if name != INCEPTION:
                other = {f"fd_{name}": each[same].frechet, f"kid_{name}": each[same].kid, f"kid_{name}_standard_error": each[same].kid_standard_error}
                values[row] |= other | ({f"agreement_{name}": each[same].agreement} if each[same].agreement is not None else {})
    return values


def recovered(rows: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Share of what quantization lost, from vae to quantized, that the rectifier recovers; None where nothing was lost or measured."""
    shares: dict[str, float | None] = {}
    for name in rows["vae"]:
        if name.endswith("_standard_error") or name == "inception_score":
            continue
        vae, quantized, rectified = (rows[row][name] for row in ("vae", "quantized", "rectified"))
        if vae is None or quantized is None or rectified is None:
            shares[name] = None
            continue
        lower = name.startswith(_LOWER_IS_BETTER)
        lost = quantized - vae if lower else vae - quantized
        won = quantized - rectified if lower else rectified - quantized
        shares[name] = won / lost if lost > 0 else None
    return shares


def throughput(state: EvaluationState, context: Context) -> dict[str, Any]:
    """Images per second of images to tokens and of tokens to images, on one rank's device; the first batch, which warms up, is left out."""
    rates = {f"{name}_images_per_s": state.timed / seconds if seconds > 0 else None for name, seconds in state.seconds.items()}
    return {**rates, "images": state.timed, "batch_size": context.settings["batch_size"], "device": _device_name(context.tokenizer.device)}


def class_values(state: EvaluationState, source: ImageSource) -> dict[str, Any] | None:
    """Mean scores of the rectified row by class, the worst and the best classes by PSNR; None where the images have no classes or one."""
    names = [source.items[index].class_name for index in state.index]
    members: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        members.setdefault(name, []).append(position)
    if len(members) < 2:
        return None
    columns = {metric: state.column("rectified", metric) for metric in IMAGE_METRICS}
    classes: list[dict[str, Any]] = []
    for name, positions in members.items():
        means = {metric: finite_or_none(float(values[positions].mean())) for metric, values in columns.items()}
        classes.append({"name": name, "images": len(positions), **means})
    classes.sort(key=lambda entry: (math.inf if entry["psnr_db"] is None else entry["psnr_db"], entry["name"]))
    each = min(_CLASSES_SHOWN, len(classes) // 2)
    return {"count": len(classes), "worst": classes[:each], "best": classes[::-1][:each]}


def image_table(state: EvaluationState, source: ImageSource) -> bytes:
    """images.parquet: a line for every image of the source that was asked for, with its scores or the reason why it has none."""
    lines: list[dict[str, Any]] = []
    table = state.table()
    for position, index in enumerate(state.index):
        scores = {name: _known(value) for name, value in zip(COLUMNS, table[position].tolist(), strict=True)}
        lines.append({"row": index, "status": "ok", "reason": "", "sha256": state.digests[position].hex(), **scores})
    lines += [{"row": index, "status": "failed", "reason": reason, "sha256": "", **dict.fromkeys(COLUMNS)} for index, reason in state.failed]
    lines.sort(key=lambda line: line["row"])
    items = [source.items[line["row"]] for line in lines]
    columns: dict[str, Any] = {
        "key": pa.array([item.key for item in items], pa.string()),
        "label": pa.array([item.label for item in items], pa.int32()),
        "class_name": pa.array([item.class_name for item in items], pa.string()),
    }
    for name in ("row", "status", "reason", "sha256"):
        columns[name] = pa.array([line[name] for line in lines])
    for name in COLUMNS:
        columns[name] = pa.array([line[name] for line in lines], pa.float64())
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def describe_protocol(context: Context) -> dict[str, Any]:
    """Every choice that another evaluation would have to share for its numbers to compare."""
    weights = {
        name: {"file": found.path.name if found.path else None, "sha256": found.sha256, "published": found.published}
        for name, found in context.weights.items()
    }
    packages = ("revq", "torch", "torchvision", "torchmetrics", "torch-fidelity", "diffusers", "numpy", "scipy", "pillow")
    return {
        **context.protocol.describe(),
        "image_size": context.tokenizer.image_size,
        "weights": weights,
        "features": context.features,
        **context.settings,
        "vae_precision": f"encoder fp32, decoder {context.settings['precision']}",
        "flags": precision_flags(),
        "device": _device_name(context.tokenizer.device),
        "ranks": ranks.world_size(),
        "cached_features": context.reused_features,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _known(value: float) -> float | None:
    """None for a value that was not measured; infinity stays."""
    return None if math.isnan(value) else value


def thinned(history: Mapping[str, Sequence[Any]], most: int = 400) -> dict[str, list[Any]]:
    """Columns of equal length with at most about `most` lines, the last one kept."""
    length = max((len(values) for values in history.values()), default=0)
    step = -(-length // most) if length > most else 1
    kept = sorted({*range(0, length, step), length - 1}) if length else []
    return {name: [values[i] for i in kept] for name, values in history.items()}
