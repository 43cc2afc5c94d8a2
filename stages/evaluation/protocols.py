"""What an evaluation fixes so that its numbers can be compared: the named protocols, and when a Frechet distance may be called rFID.

Both protocols score the same way and differ in the crop:

- `revq`: shorter side to S with an antialiased bilinear filter, central square. The crop of every other stage.
- `adm`:  ADM's crop (box halving, then bicubic), which many published ImageNet figures were measured with.

The reference is always the identical crops, never the raw files, and its statistics are taken in the same pass by the same network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

IMAGENET_VAL_IMAGES = 50_000
_IMAGENET_VAL_KEY = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every choice but the image size, which is the tokenizer's."""

    name: str
    resize: str
    """How the shorter side comes to the image size, and by which filter."""
    antialias: bool = True
    """Whether the filter covers all pixels that it shrinks."""
    crop: str = "centre"
    trained_on: tuple[str, str]
    """(resize_filter, crop) that a tokenizer of the same crops has in its config.json."""
    rounding: str = "decoded images to the nearest uint8 level before every metric"
    reference: str = "the identical crops"
    real_statistics: str = "of the same crops, through the same network in the same pass; sample covariance (N-1)"
    inception_network: str = "torch-fidelity inception-v3-compat: 2048 pooled features, TensorFlow-1 bilinear resize to 299 px without antialias"
    inception_weights: str = "weights-inception-2015-12-05-6726825d.pth"
    kid: str = "unbiased over all pairs, cubic kernel (x.y/2048 + 1)^3, not scaled; above 5000 images the mean over 10 disjoint subsets of 1000"
    kid_standard_error: str = "jackknife over the images; over subsets, their standard deviation by the root of their number"
    feature_precision: str = "float32 network (no TF32), float64 moments"
    inception_score: str = "exp of the mean KL divergence of the 1008 unbiased logits, 10 splits shuffled with seed 2020"
    psnr_db: str = "RGB in [0,1], each image, then the mean"
    ssim: str = "RGB in [0,1], float64, Gaussian window of sigma 1.5 and 11 px, border reflected, each image, then the mean"
    lpips: str = "version 0.1, RGB in [-1,1], each image, then the mean"

    def describe(self) -> dict[str, Any]:
        """The protocol as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "trained_on"}


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="revq",
            resize="shorter side to the image size, bilinear (Pillow), the longer side rounded down",
            trained_on=("bilinear-antialias", "centre"),
        ),
        Protocol(
            name="adm",
            resize="both sides halved by a box filter while the shorter is at least twice the image size, then bicubic (Pillow) to it",
            trained_on=("adm", "centre"),
        ),
    )
}


def is_imagenet_val(keys: Iterable[str]) -> bool:
    """True where the images' names are those of ImageNet's validation set: `ILSVRC2012_val_00000001` to `..._00050000`, each once.

    Names are all that can be checked without the images; the fingerprint of the crops stands beside every value.
    """
    numbers = []
    for key in keys:
        match = _IMAGENET_VAL_KEY.search(key)
        if match is None:
            return False
        numbers.append(int(match.group(1)))
    return len(numbers) == IMAGENET_VAL_IMAGES and set(numbers) == set(range(1, IMAGENET_VAL_IMAGES + 1))


def rfid_label(images: int, *, imagenet_val: bool, published_weights: bool) -> str:
    """ "rFID" only on the whole of ImageNet val with the published weights; otherwise "rFID@n", which no published number compares to."""
    return "rFID" if imagenet_val and published_weights else f"rFID@{images}"


def other_crops(protocol: Protocol, tokenizer_config: dict[str, Any]) -> str | None:
    """What to say where the tokenizer was trained on other crops than the protocol's; None where on the same, or it does not tell."""
    trained = (tokenizer_config.get("resize_filter"), tokenizer_config.get("crop"))
    if None in trained or trained == protocol.trained_on:
        return None
    return (
        f"the tokenizer was trained on other crops ({trained[0]}, {trained[1]}) than those of protocol {protocol.name} "
        f"({protocol.trained_on[0]}, {protocol.trained_on[1]}): it is measured on images unlike those it knows"
    )
