"""Stage three: how good is this tokenizer? Decode unseen images with the frozen decoder and measure what was lost, and where.

Reads:   a tokenizer folder (or the run folder of train-rectifier around it) and images.
Writes:  OUT/config.json, images.parquet (every image's own scores), reconstructions.png, extremes.png, and last metrics.json;
         `pipeline.report` makes report.html, report.md and tolerance.png of them. While it works, OUT/partial-*.pt: the same command again continues.
Command: revq evaluate TOKENIZER IMAGES OUT [--protocol revq|adm] [--inception-weights PATH] [--limit N] [--vae OVERRIDE]

Four rows, all against the same crops: *original* (against itself: the check of the pipeline), *vae* (no quantization: the ceiling),
*quantized* (no rectifier) and *rectified*. PSNR of equal images is infinite, which JSON cannot say: it is null there, with a note.
Under torchrun every rank takes its share of the batches, and rank 0 writes.

Shapes: B batch, N images, S image side in pixels, T tokens per image (= codebooks), K codes per codebook.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..cache.sources import ImageSource, open_source, order_sha256
from ..errors import ImageError, TokenizerNotFoundError
from ..files import local_path, output_kind
from ..models.device import pick_device
from ..models.tokenizer import ReVQTokenizer
from . import ranks
from .configs import EvaluateConfig
from .evaluation.feature_sets import FeatureSets
from .evaluation.features import FeatureCache, OtherFeatures, cache_folder
from .evaluation.inception import CLASSES, FEATURES, Inception
from .evaluation.instruments import Instruments, open_instruments
from .evaluation.loader import Batch, Loader
from .evaluation.metrics import ROWS, score_images
from .evaluation.outputs import EVALUATION_KIND, METRICS_NAME, finished_metrics, write_evaluation
from .evaluation.protocols import PROTOCOLS
from .evaluation.reconstruct import check_round_trip, reconstruct
from .evaluation.state import EvaluationState, Measured, new_state, resume, save_partial
from .evaluation.summary import Context
from .evaluation.tolerance import affordable_images, measure_tolerance
from .evaluation.weights import FoundWeights, find_metric_weights
from .events import Advance, Begin, Event, Note, Result
from .output_folder import OutputFolder, note_on_writer, output_folder

_SAVE_EVERY_S = 120.0
_ROUND_TRIP_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """What the evaluation reads and never changes."""

    config: EvaluateConfig
    tokenizer: ReVQTokenizer
    source: ImageSource
    count: int
    loader: Loader
    weights: dict[str, FoundWeights]
    other: OtherFeatures | None
    """The network of `--features`."""
    caches: dict[str, FeatureCache]
    """By network, of the originals' features; none where they are not kept."""


def evaluate(config: EvaluateConfig) -> Iterator[Event]:
    """Measure a tokenizer on images; see the top of this file for what is written.

    Raises:
        ConfigError: metric weights that are given but missing or of another network; a device that is not there.
        ImageError: no image, or none that can be read.
        TokenizerError, VAEError, MismatchError: no tokenizer, no VAE, or not the VAE it was trained with.
        OutputError: `out` holds something else, or cannot be written.
    """
    with output_folder(config.out, kind=EVALUATION_KIND, command="evaluate") as folder:
        yield from _evaluate(config, folder)


def _evaluate(config: EvaluateConfig, folder: OutputFolder) -> Iterator[Event]:
    """The stage, in a folder that is held. It is claimed at the end where it replaces another evaluation, which stays until then."""
    yield from note_on_writer(config.tokenizer)
    inputs = yield from _open(config)
    out, identity = folder.path, _identity(inputs)
    replaces = ranks.broadcast(config.overwrite and output_kind(out) == EVALUATION_KIND)
    resumed = not replaces and folder.claim(identity)
    finished = ranks.on_first(lambda: finished_metrics(out, inputs.weights)) if resumed else None
    if finished is not None:
        yield Note(text=f"{out} already holds this evaluation; nothing to do")
        yield _result(out, finished)
        return
    instruments = open_instruments(inputs.weights, inputs.other, inputs.tokenizer.device)
    state = yield from _measure_all(inputs, instruments, None if replaces else out)
    state.merge_ranks()
    if not state.images:
        index, reason = state.failed[0]
        key = inputs.source.items[index].key
        raise ImageError(f"none of the {inputs.count} images in {inputs.source.name} can be read; the first, {key}: {reason}")
    if state.failed:
        yield Note(text=f"{len(state.failed)} of {inputs.count} images cannot be read and are left out; {METRICS_NAME} names them", warning=True)
    tolerance = yield from _tolerance(inputs, instruments, state)
    claim = partial(folder.replace, identity) if replaces else None
    context = _context(inputs)
    metrics = ranks.on_first(lambda: write_evaluation(out, state, context, inputs.loader, tolerance=tolerance, claim=claim))
    yield _result(out, metrics)


def _open(config: EvaluateConfig) -> Generator[Event, None, _Inputs]:
    """Everything that can be missing, before anything slow."""
    device = pick_device(config.device)
    tokenizer = ReVQTokenizer.from_pretrained(_tokenizer_folder(config.tokenizer), vae=config.vae, device=device).eval()
    _ = tokenizer.vae  # loaded now, so that a missing or another VAE is found before any work
    source = open_source(config.images)
    yield from (Note(text=text) for text in source.notes)
    count = min(len(source.items), config.limit or len(source.items))
    weights = yield from find_metric_weights(
        inception=config.inception_weights, download=config.download, image_size=tokenizer.image_size, count=count
    )
    other = OtherFeatures(config.features, device) if config.features else None
    folder = cache_folder(config.cache)
    networks = {Inception.name: weights["rfid"].sha256} | ({other.name: other.sha256} if other and other.weights_known else {})
    return _Inputs(
        config=config,
        tokenizer=tokenizer,
        source=source,
        count=count,
        loader=Loader(source=source, image_size=tokenizer.image_size, crop=config.protocol, batch_size=config.batch_size, workers=config.workers),
        weights=weights,
        other=other,
        caches={name: FeatureCache(folder, sha256) for name, sha256 in networks.items() if folder and sha256},
    )


def _measure_all(inputs: _Inputs, instruments: Instruments, kept_in: Path | None) -> Generator[Event, None, EvaluationState]:
    """One pass over this rank's images, kept in the folder `kept_in` while it runs; None keeps nothing."""
    tokenizer, world = inputs.tokenizer, ranks.world_size()
    make = partial(
        new_state, tokens=tokenizer.tokens, codes=tokenizer.codes, images=inputs.count, device=tokenizer.device, sets=_sets(inputs, instruments)
    )
    settings = _partial_settings(inputs)
    state = resume(make, kept_in, settings) if kept_in else make()
    total = inputs.loader.share(inputs.count, rank=ranks.rank(), ranks=world)
    yield Begin(task=ranks.task_of_share("evaluate"), total=total, unit="images", done=state.seen)
    saved = time.monotonic()
    try:
        for batch in inputs.loader.batches(range(inputs.count), rank=ranks.rank(), ranks=world, skip=state.batches):
            state.commit(batch, _measure(inputs, instruments, batch) if batch.crops else None)
            if kept_in and time.monotonic() - saved > _SAVE_EVERY_S:
                save_partial(state, kept_in, settings)
                saved = time.monotonic()
            yield Advance(done=state.seen, values=_watched(state))
    except (KeyboardInterrupt, GeneratorExit):
        if kept_in and state.whole and state.batches:
            save_partial(state, kept_in, settings)
        raise
    return state


def _sets(inputs: _Inputs, instruments: Instruments) -> dict[str, Callable[[], FeatureSets]]:
    """What makes the sums of each network's features."""
    common: dict[str, Any] = {"rows": _measured_rows(inputs.tokenizer), "images": inputs.count, "device": inputs.tokenizer.device}
    sizes: dict[str, tuple[int, int | None]] = {}
    if instruments.inception:
        sizes[instruments.inception.name] = (FEATURES, CLASSES if instruments.inception.has_logits else None)
    if instruments.other:
        sizes[instruments.other.name] = (instruments.other.size, instruments.other.classes)
    return {name: partial(FeatureSets, features=features, classes=classes, **common) for name, (features, classes) in sizes.items()}


def _measured_rows(tokenizer: ReVQTokenizer) -> list[str]:
    """The rows whose features are taken: without a rectifier the last is another's copy."""
    return [row for row in ROWS if row != "rectified" or tokenizer.rectifier is not None]


def _measure(inputs: _Inputs, instruments: Instruments, batch: Batch) -> Measured:
    """Decode one batch every way and score it."""
    tokenizer = inputs.tokenizer
    originals = batch.pixels().to(tokenizer.device)
    done = reconstruct(tokenizer, originals, [inputs.source.items[crop.index].key for crop in batch.crops], **_way(inputs))
    scores = score_images(done.rows, originals, instruments.lpips)
    for row, errors in done.latent_errors.items():
        scores[row] |= errors
    features: dict[str, dict[str, Tensor]] = {}
    logits: dict[str, dict[str, Tensor]] = {}
    digests = [crop.digest for crop in batch.crops]
    for name, network in instruments.feature_networks().items():
        features[name], logits[name] = {}, {}
        for row in _measured_rows(tokenizer):
            cache = inputs.caches.get(name) if row == "original" else None
            features[name][row] = cache.features(network, originals, digests) if cache else network.features(done.rows[row])
            if network.has_logits:
                logits[name][row] = network.logits(features[name][row])
    few = slice(0, _ROUND_TRIP_IMAGES)
    round_trip = check_round_trip(tokenizer, originals[few], done.indices[few], **_way(inputs)) if batch.number == 0 else None
    return Measured(scores=scores, indices=done.indices, features=features, logits=logits, seconds=done.seconds, round_trip=round_trip)


def _way(inputs: _Inputs) -> dict[str, Any]:
    """How images become tokens and pictures."""
    return {"bf16": inputs.config.precision == "bf16", "refine": inputs.config.refine}


def _watched(state: EvaluationState) -> dict[str, float]:
    """The figure to show beside the progress: the rectified row's PSNR, as the result will have it, over all images of this rank so far."""
    return {"rectified_psnr_db": float(state.column("rectified", "psnr_db").mean())} if state.images else {}


def _tolerance(inputs: _Inputs, instruments: Instruments, state: EvaluationState) -> Generator[Event, None, dict[str, Any] | None]:
    """The tolerance curve over images spread evenly over those that were measured; None where it is switched off."""
    if not inputs.config.tolerance:
        return None
    asked = inputs.config.tolerance_images
    wanted = affordable_images(inputs.tokenizer, state.images) if asked is None else min(asked, state.images)
    positions = sorted({state.index[round(i * (state.images - 1) / max(wanted - 1, 1))] for i in range(wanted)})
    alex = {name: network for name, network in instruments.lpips.items() if name == "lpips_alex"}
    fewer = Instruments(inception=instruments.inception, lpips=alex)
    return (yield from measure_tolerance(inputs.tokenizer, inputs.loader, positions, fewer, seed=inputs.config.seed, **_way(inputs)))


def _context(inputs: _Inputs) -> Context:
    config = inputs.config
    return Context(
        tokenizer=inputs.tokenizer,
        source=inputs.source,
        protocol=PROTOCOLS[config.protocol],
        weights=inputs.weights,
        settings={"seed": config.seed, "precision": config.precision, "batch_size": config.batch_size, "refine_steps": config.refine},
        tokenizer_name=config.tokenizer,
        features={"network": config.features, "name": inputs.other.name, "sha256": inputs.other.sha256} if inputs.other else None,
        reused_features=sum(ranks.gather(inputs.caches[Inception.name].reused if Inception.name in inputs.caches else 0)),
    )


def _result(out: Path, metrics: dict[str, Any]) -> Result:
    return Result(value={**metrics, "out": str(out), "report": str(out / "report.html")})


def _tokenizer_folder(name: str) -> str:
    """The tokenizer inside a run folder of train-rectifier; any other folder, or hub id, as it is.

    Raises:
        TokenizerError: `name` can only be a path, and nothing is there.
    """
    path = local_path(name)
    there = os.path.exists(path)  # Path.exists raises OSError where the name is too long
    if there and (path / "tokenizer" / "config.json").is_file():
        return str(path / "tokenizer")
    if not there and (name.startswith((".", "~")) or name.count("/") != 1):
        raise TokenizerNotFoundError(f"there is no tokenizer at {name}; give the folder that train-rectifier wrote, or a hub id such as owner/name")
    return str(path) if there else name


def _identity(inputs: _Inputs) -> dict[str, Any]:
    """What the numbers depend on, save the metric weights: those may come later, and then only add what was null."""
    config, tokenizer, source = inputs.config, inputs.tokenizer, inputs.source
    return {
        "tokenizer": tokenizer.fingerprint,
        "vae": tokenizer.vae.fingerprint,
        "images": source.name,
        "images_order_sha256": order_sha256(source.items[: inputs.count]),
        "count": inputs.count,
        "protocol": config.protocol,
        "image_size": tokenizer.image_size,
        "precision": config.precision,
        "refine": config.refine,
        "tolerance_images": config.tolerance_images if config.tolerance else 0,
        "seed": config.seed,
        **({"features": inputs.other.sha256} if inputs.other else {}),
    }


def _partial_settings(inputs: _Inputs) -> dict[str, Any]:
    """What a stopped pass must share with the one that continues it."""
    weights = {name: found.sha256 for name, found in inputs.weights.items()}
    return {**_identity(inputs), "batch_size": inputs.config.batch_size, "device": str(inputs.tokenizer.device.type), "weights": weights}
