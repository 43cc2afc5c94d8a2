"""What a reader of an evaluation's numbers must know: why a value is null, and what it does not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...cache.sources import ImageSource
from ...models.tokenizer import ReVQTokenizer
from .inception import Inception
from .metrics import MEANINGFUL_FID_IMAGES, ROWS
from .protocols import Protocol, other_crops
from .state import EvaluationState
from .tolerance import has_decoder_metric
from .weights import FoundWeights

_SPLITS = 10


def write_notes(
    metrics: Mapping[str, Any],
    state: EvaluationState,
    weights: Mapping[str, FoundWeights],
    tokenizer: ReVQTokenizer,
    source: ImageSource,
    protocol: Protocol,
) -> dict[str, Any]:
    """Notes by the name of the metric that they are about."""
    notes: dict[str, Any] = {name: found.reason for name, found in weights.items() if found.reason}
    notes |= _about_inception(metrics, weights["rfid"], has_last_layer=Inception.name in state.sets and bool(state.sets[Inception.name].scores))
    for name in ("lpips_alex", "lpips_vgg"):
        if weights[name].path is not None and not weights[name].published:
            notes[name] = _other_weights(weights[name])
    images, codes = state.images, tokenizer.codes
    equal = [row for row in ROWS if metrics["rows"][row]["psnr_db"] is None]
    if equal:
        notes["psnr_db"] = f"{', '.join(equal)}: identical images: PSNR is infinite"
    if images < codes:
        notes["codebook_usage"] = f"{images} images can use at most {images} of the {codes} codes of a codebook ({images / codes:.2%})"
    steps = metrics["protocol"]["refine_steps"]
    if steps:
        notes["refined"] = (
            f"the tokens were refined for each image in {steps} steps through the decoder and back: quantized and rectified may pass the vae row, "
            "their latents are further from the encoder's, and encoding takes longer"
        )
    if tokenizer.rectifier is None:
        notes["rectified"] = "this tokenizer has no rectifier: the row equals quantized"
    crops = other_crops(protocol, tokenizer.config)
    if crops:
        notes["crops"] = crops
    if state.enlarged:
        notes["enlarged"] = f"{state.enlarged} of {images} images are smaller than {tokenizer.image_size} px and were enlarged by the crop"
    if metrics["tolerance"] is not None and not has_decoder_metric(tokenizer):
        notes["tolerance"] = f"no curve in the decoder's metric: the transform {tokenizer.config.get('transform')} does not weigh positions"
    if state.round_trip and state.round_trip["largest_difference"]:
        notes["round_trip"] = f"stored tokens decode to pictures that differ by up to {state.round_trip['largest_difference']} of 255 levels"
    if source.skipped:
        notes["skipped"] = f"{len(source.skipped)} entries of the source are passed over: {source.skipped}"
    if state.failed:
        notes["failed"] = [{"key": source.items[index].key, "reason": reason} for index, reason in state.failed]
    return notes


def _about_inception(metrics: Mapping[str, Any], weights: FoundWeights, *, has_last_layer: bool) -> dict[str, str]:
    """What the distances and the inception score of this evaluation can be compared to."""
    if weights.path is None:
        return dict.fromkeys(("kid", "inception_score"), "needs the same weights as rfid")
    images = metrics["images"]
    notes = {}
    if images < 2:
        notes["rfid"] = f"the Frechet distance needs at least 2 images, and {images} could be read"
        notes["kid"] = f"the kernel distance needs at least 2 images, and {images} could be read"
    elif images < MEANINGFUL_FID_IMAGES:
        notes["rfid"] = (
            f"over {images} images, fewer than the {MEANINGFUL_FID_IMAGES} features: not meaningful, and not comparable to published numbers"
        )
        notes["kid"] = f"unbiased over {images} images, but uncertain by its standard error: compare it over the same images alone"
    elif metrics["rfid_label"] != "rFID":
        notes["rfid"] = "not comparable to published numbers, which are over the 50,000 images of ImageNet val with the published weights"
    if not has_last_layer:
        notes["inception_score"] = f"needs the last layer of the network, which {weights.path.name} leaves out"
    elif metrics["rows"]["original"]["inception_score"] is None:
        notes["inception_score"] = f"needs a readable image in each of its {_SPLITS} splits, and {images} images could be read"
    if not weights.published:
        other = _other_weights(weights)
        notes = {name: f"{notes[name]}; {other}" if name in notes else other for name in ("rfid", "kid", "inception_score")}
    return notes


def _other_weights(found: FoundWeights) -> str:
    return f"measured with other weights than the published ones (SHA-256 {(found.sha256 or '')[:8]}): not comparable to any other value"
