"""Stage three: how good is this tokenizer? Decode unseen images with the frozen decoder and measure what was lost, and where.

Reads:   a tokenizer folder (or the run folder of train-rectifier around it) and images.
Writes:  OUT/config.json, OUT/reconstructions.png, and last OUT/metrics.json; `pipeline.report` makes report.md and report.html of them.
Command: revq evaluate TOKENIZER IMAGES OUT [--inception-weights PATH] [--batch-size 64] [--limit N] [--vae OVERRIDE]

Four rows, all against the same crops: *original* (against itself: the check of the pipeline), *vae* (no quantization: the ceiling),
*quantized* (no rectifier) and *rectified*. PSNR of equal images is infinite, which JSON cannot say: it is null there, with a note.

Shapes: B batch, M pictures shown, S image side in pixels, T tokens per image (= codebooks), K codes per codebook.
"""

from __future__ import annotations

import hashlib
import io
import platform
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..cache.images import UnreadableImage, load_pixels, read_ahead
from ..cache.sources import ImageSource, open_source, order_sha256
from ..errors import ConfigError, ImageError, OutputError, TokenizerError, VAEError
from ..files import claim_output, output_kind, read_json, write_bytes, write_json
from ..models.device import pick_device
from ..models.tokenizer import ReVQTokenizer
from . import ranks
from .events import Advance, Begin, Event, Note, Result
from .metrics import (
    LPIPS_SMALLEST_SIDE,
    MEANINGFUL_FID_IMAGES,
    ROWS,
    CodebookUsage,
    RowMetrics,
    load_inception,
    load_lpips,
    to_signed,
    to_uint8,
)
from .weights import ALEXNET, INCEPTION, FoundWeights, WeightFile, find_weights

EVALUATION_KIND = "revq-evaluation"
METRICS_NAME = "metrics.json"
GRID_NAME = "reconstructions.png"
PROTOCOLS = ("revq",)
_PICTURES = 8
_SMALLEST_TILE_PX = 128


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of one evaluation."""

    tokenizer: str
    """Tokenizer folder, run folder of train-rectifier, or hub id."""
    images: str
    """Images that training did not see: folder, .tar, WebDataset shards, Parquet (see `cache.sources.open_source`), or "photographs:held-out"."""
    out: str
    """Output folder: new, or of the same evaluation."""
    protocol: str = "revq"
    """How images are cropped and compared; "revq" is the only one so far."""
    inception_weights: str | None = None
    """torch-fidelity's Inception checkpoint; None means the torch hub cache, then a download."""
    batch_size: int = 64
    """Images decoded at once; bounds the memory, does not change the numbers."""
    limit: int | None = None
    """Evaluate the first so many images; None means all."""
    vae: str | None = None
    """Where to find the VAE; None means where the tokenizer says."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    workers: int = 8
    """Threads that load images ahead."""
    overwrite: bool = False
    """Replace another evaluation in `out`, once this one has succeeded."""
    download: bool = True
    """False never tries the network for the weights of rFID and LPIPS."""

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f'protocol must be "revq", which is the only one so far, not {self.protocol!r}')
        for name in ("batch_size", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, or None for all images, not {self.limit}")


@dataclass(frozen=True)
class _Crop:
    """One image of the source; `pixels` (3,S,S) uint8 is None where it cannot be read, for `reason`."""

    index: int
    key: str
    pixels: NDArray[np.uint8] | None
    reason: str = ""


@dataclass(frozen=True)
class _Picture:
    """One image to show: every row's uint8 (3,S,S), and its PSNR in dB by row."""

    key: str
    rows: dict[str, Tensor]
    psnr_db: dict[str, float]


@dataclass(kw_only=True)
class _Tally:
    """What one pass over the images adds up. Its size does not depend on their number, unreadable ones aside."""

    metrics: RowMetrics
    usage: CodebookUsage
    shown_from: list[int]
    """Image numbers, rising: from each on, the next readable image is shown."""
    crops_sha256: Any = field(default_factory=hashlib.sha256)
    pictures: list[_Picture] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def evaluate(config: EvaluateConfig) -> Iterator[Event]:
    """Measure a tokenizer on images; see the top of this file for what is written.

    Raises:
        ConfigError: metric weights that are given but missing or of another network; a device that is not there.
        ImageError: no image, or none that can be read.
        TokenizerError, VAEError, MismatchError: no tokenizer, no VAE, or not the VAE it was trained with.
        OutputError: `out` holds something else, or cannot be written.
    """
    ranks.refuse_many("evaluate")
    device = pick_device(config.device)
    tokenizer = ReVQTokenizer.from_pretrained(_tokenizer_folder(config.tokenizer), vae=config.vae, device=device).eval()
    _ = tokenizer.vae  # loaded now, so that a missing or another VAE is found before any work
    source = open_source(config.images)
    count = min(len(source.items), config.limit or len(source.items))
    weights = yield from _find_metric_weights(config, tokenizer.image_size, count)

    out, identity = Path(config.out), _identity(config, tokenizer, source, count)
    replaces = config.overwrite and output_kind(out) == EVALUATION_KIND
    if not replaces and claim_output(out, kind=EVALUATION_KIND, identity=identity):
        finished = _finished_metrics(out, weights)
        if finished is not None:
            yield Note(text=f"{out} already holds this evaluation; nothing to do")
            yield _result(out, finished)
            return

    tally = _Tally(
        metrics=RowMetrics(
            inception=load_inception(weights["rfid"].path, device) if weights["rfid"].path else None,
            lpips=load_lpips(weights["lpips_alex"].path, device) if weights["lpips_alex"].path else None,
            device=device,
        ),
        usage=CodebookUsage(tokenizer.tokens, tokenizer.codes, device),
        shown_from=sorted({round(i * (count - 1) / max(_PICTURES - 1, 1)) for i in range(_PICTURES)}),
    )
    yield Begin(task="evaluate", total=count, unit="images")
    for crops in _load_batches(source, count, tokenizer.image_size, config, tally.failed):
        psnr_db = _measure_batch(tokenizer, crops, tally)
        yield Advance(done=tally.metrics.images + len(tally.failed), values={"psnr_db": psnr_db})
    if not tally.metrics.images:
        raise ImageError(f"none of the {count} images in {source.name} can be read; the first, {tally.failed[0]['key']}: {tally.failed[0]['reason']}")
    if tally.failed:
        yield Advance(done=count)
        yield Note(text=f"{len(tally.failed)} of {count} images cannot be read and are left out; {METRICS_NAME} names them", warning=True)

    grid, layout = draw_grid([[picture.rows[row] for row in ROWS] for picture in tally.pictures], ROWS)
    metrics = _assemble(config, tokenizer, source.name, tally, weights, layout)
    if replaces:
        claim_output(out, kind=EVALUATION_KIND, identity=identity, overwrite=True)
    write_bytes(out / GRID_NAME, grid)
    write_json(out / METRICS_NAME, metrics)
    yield _result(out, metrics)


def _assemble(
    config: EvaluateConfig, tokenizer: ReVQTokenizer, images: str, tally: _Tally, weights: dict[str, FoundWeights], layout: dict[str, Any]
) -> dict[str, Any]:
    """The content of metrics.json."""
    metrics = {
        "protocol": _protocol(config, tokenizer, weights),
        "images": tally.metrics.images,
        "rows": tally.metrics.compute(),
        "tokens_per_image": tokenizer.tokens,
        "bits_per_image": tokenizer.bits_per_image,
        "bits_per_pixel": tokenizer.bits_per_image / tokenizer.image_size**2,
        "codebook_usage": {**tally.usage.compute(), "codes": tokenizer.codes, "images": tally.metrics.images},
        "fingerprints": {
            "tokenizer": tokenizer.fingerprint,
            "vae": tokenizer.vae.fingerprint,
            "images": tally.crops_sha256.hexdigest()[:16],
        },
        "sources": {"tokenizer": config.tokenizer, "vae": tokenizer.vae.id, "images": images},
        "pictures": {
            **layout,
            "keys": [picture.key for picture in tally.pictures],
            "psnr_db": [picture.psnr_db for picture in tally.pictures],
        },
    }
    return {**metrics, "notes": _notes(metrics, tally, weights, has_rectifier=tokenizer.rectifier is not None)}


def _result(out: Path, metrics: dict[str, Any]) -> Result:
    return Result(value={**metrics, "out": str(out), "report": str(out / "report.html")})


def _tokenizer_folder(name: str) -> str:
    """The tokenizer inside a run folder of train-rectifier; any other folder, or hub id, as it is.

    Raises:
        TokenizerError: `name` can only be a path, and nothing is there.
    """
    path = Path(name).expanduser()
    if (path / "tokenizer" / "config.json").is_file():
        return str(path / "tokenizer")
    if not path.exists() and (name.startswith((".", "~")) or name.count("/") != 1):
        raise TokenizerError(f"there is no tokenizer at {name}; give the folder that train-rectifier wrote, or a hub id such as owner/name")
    return str(path) if path.exists() else name


def _identity(config: EvaluateConfig, tokenizer: ReVQTokenizer, source: ImageSource, count: int) -> dict[str, Any]:
    """What the numbers depend on, save the metric weights: those may come later, and then only add what was null."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "vae": tokenizer.vae.fingerprint,
        "images": source.name,
        "images_order_sha256": order_sha256(source.items[:count]),
        "count": count,
        "protocol": config.protocol,
        "image_size": tokenizer.image_size,
    }


def _find_metric_weights(config: EvaluateConfig, image_size: int, count: int) -> Generator[Event, None, dict[str, FoundWeights]]:
    """Weights of rFID and LPIPS by metric; yields what the user should know, a missing one above all."""
    too_few = f"the Frechet distance needs at least 2 images, and there is {count}" if count < 2 else ""
    too_small = f"LPIPS needs images of at least {LPIPS_SMALLEST_SIDE} px, and these have {image_size}" if image_size < LPIPS_SMALLEST_SIDE else ""
    found = {
        "rfid": (yield from _find_one(INCEPTION, config.inception_weights, config.download, too_few)),
        "lpips_alex": (yield from _find_one(ALEXNET, None, config.download, too_small)),
    }
    for name, weights in found.items():
        if weights.reason:
            yield Note(text=f"{name} is left out: {weights.reason}", warning=True)
    return found


def _find_one(weights: WeightFile, path: str | None, download: bool, hindrance: str) -> Generator[Event, None, FoundWeights]:
    if path is None and hindrance:
        return FoundWeights(path=None, sha256=None, published=False, reason=hindrance)
    found = find_weights(weights, path=path, download=False)
    if found.path is None and download:
        yield Note(text=f"downloading the weights of {weights.title}: {weights.url}")
        found = find_weights(weights)
    return FoundWeights(path=None, sha256=None, published=False, reason=hindrance) if hindrance else found


def _finished_metrics(out: Path, weights: dict[str, FoundWeights]) -> dict[str, Any] | None:
    """The metrics of an earlier run of the same evaluation; None where there are none yet, or weights that it lacked are here now.

    Raises:
        OutputError: it was measured with other weights of rFID or LPIPS.
    """
    metrics = read_json(out / METRICS_NAME)
    if metrics is None or not (out / GRID_NAME).is_file():
        return None
    for name, found in weights.items():
        before = metrics["protocol"][name]["weights_sha256"]
        if found.sha256 and before is None:
            return None
        if found.sha256 and found.sha256 != before:
            raise OutputError(
                f"{out} holds this evaluation with other weights for {name} (SHA-256 {before[:8]} there, {found.sha256[:8]} now); "
                "choose another folder or pass --overwrite"
            )
    return metrics


def _load_batches(source: ImageSource, count: int, image_size: int, config: EvaluateConfig, failed: list[dict[str, str]]) -> Iterator[list[_Crop]]:
    """Readable crops in the source's order, `batch_size` at a time, loaded ahead by threads; the others go to `failed`."""

    def load(index: int) -> _Crop:
        item = source.items[index]
        try:
            return _Crop(index, item.key, load_pixels(source.read(index), image_size, box=item.box).array)
        except UnreadableImage as error:
            return _Crop(index, item.key, None, error.reason)
        except OSError as error:
            return _Crop(index, item.key, None, error.strerror or type(error).__name__)

    batch: list[_Crop] = []
    for crop in read_ahead(load, range(count), workers=config.workers, ahead=2 * config.batch_size):
        if crop.pixels is None:
            failed.append({"key": crop.key, "reason": crop.reason})
            continue
        batch.append(crop)
        if len(batch) == config.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _measure_batch(tokenizer: ReVQTokenizer, crops: list[_Crop], tally: _Tally) -> float:
    """Decode one batch every way and add it to `tally`; returns the mean PSNR (dB) of its rectified row."""
    pixels = np.stack([crop.pixels for crop in crops if crop.pixels is not None])
    tally.crops_sha256.update(pixels.data)
    rows, indices = reconstruct_rows(tokenizer, torch.from_numpy(pixels).to(tokenizer.device), [crop.key for crop in crops])
    tally.usage.update(indices)
    scores = tally.metrics.update(rows)
    for i, crop in enumerate(crops):
        shown = len(tally.pictures)
        if shown < len(tally.shown_from) and crop.index >= tally.shown_from[shown]:
            psnr_db = {row: scores[row]["psnr_db"][i] for row in ROWS[1:]}
            tally.pictures.append(_Picture(crop.key, {row: rows[row][i].cpu() for row in ROWS}, psnr_db))
    return sum(scores["rectified"]["psnr_db"]) / len(crops)


@torch.no_grad()
def reconstruct_rows(tokenizer: ReVQTokenizer, originals: Tensor, keys: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Originals (B,3,S,S) uint8 -> every row's uint8 (B,3,S,S), and the indices (B,T).

    Args:
        keys: names of the images, for the error.

    Raises:
        VAEError, TokenizerError: a decoded value is not finite.
    """
    latents = tokenizer.vae.encode(to_signed(originals))
    indices = tokenizer.encode_latents(latents)
    decoded = {
        "vae": tokenizer.vae.decode(latents),
        "quantized": tokenizer.decode(indices, rectify=False),
        "rectified": tokenizer.decode(indices, rectify=True),
    }
    for row, images in decoded.items():
        finite = images.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            key = keys[int((~finite).nonzero()[0])]
            error = VAEError if row == "vae" else TokenizerError
            raise error(f"the {row} row of image {key} decodes to values that are not finite; its metrics would mean nothing")
    return {"original": originals, **{row: to_uint8(images) for row, images in decoded.items()}}, indices


def draw_grid(pictures: list[list[Tensor]], headings: tuple[str, ...]) -> tuple[bytes, dict[str, Any]]:
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


def _protocol(config: EvaluateConfig, tokenizer: ReVQTokenizer, weights: dict[str, FoundWeights]) -> dict[str, Any]:
    """Every choice that another evaluation would have to share for its numbers to compare."""
    device = tokenizer.device
    return {
        "name": config.protocol,
        "image_size": tokenizer.image_size,
        "resize": "shorter side to image_size, antialiased bilinear (Pillow)",
        "crop": "centre",
        "reference": "the same crops",
        "rounding": "decoded images to uint8 before every metric",
        "rfid": {
            "network": "torch-fidelity inception-v3-compat, 2048 pooled features",
            "resize": "TensorFlow-1 bilinear to 299 px, no antialias",
            "precision": "float32 network, float64 moments",
            "weights": INCEPTION.file_name,
            "weights_sha256": weights["rfid"].sha256,
        },
        "psnr_db": "RGB in [0,1], each image, then the mean",
        "ssim": "RGB in [0,1], Gaussian window of sigma 1.5 and 11 px, each image, then the mean",
        "lpips_alex": {
            "input": "RGB in [-1,1], each image, then the mean",
            "weights": ALEXNET.file_name,
            "weights_sha256": weights["lpips_alex"].sha256,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("revq", "torch", "torchvision", "torchmetrics", "torch-fidelity", "pillow")},
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _notes(metrics: dict[str, Any], tally: _Tally, weights: dict[str, FoundWeights], *, has_rectifier: bool) -> dict[str, Any]:
    """What a reader of the numbers must know: why a value is null, and what it does not show. Keys are those of the metrics."""
    images, codes = tally.metrics.images, metrics["codebook_usage"]["codes"]
    notes: dict[str, Any] = {name: found.reason for name, found in weights.items() if found.reason}
    if tally.metrics.inception is not None and images < 2:
        notes["rfid"] = f"the Frechet distance needs at least 2 images, and {images} could be read"
    elif tally.metrics.inception is not None and images < MEANINGFUL_FID_IMAGES:
        notes["rfid"] = (
            f"over {images} images, fewer than the {MEANINGFUL_FID_IMAGES} features: not meaningful, and not comparable to published numbers"
        )
    for name, found in weights.items():
        if found.path is not None and not found.published:
            other = f"measured with other weights than the published ones (SHA-256 {(found.sha256 or '')[:8]}): not comparable to any other value"
            notes[name] = f"{notes[name]}; {other}" if name in notes else other
    equal = [row for row in ROWS if metrics["rows"][row]["psnr_db"] is None]
    if equal:
        notes["psnr_db"] = f"{', '.join(equal)}: identical images: PSNR is infinite"
    if images < codes:
        notes["codebook_usage"] = f"{images} images can use at most {images} of the {codes} codes of a codebook ({images / codes:.2%})"
    if not has_rectifier:
        notes["rectified"] = "this tokenizer has no rectifier: the row equals quantized"
    if tally.failed:
        notes["failed"] = tally.failed
    return notes
