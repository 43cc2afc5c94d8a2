"""The named protocols: their crops against slow oracles, and when a distance may be called rFID."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from revq.cache.crops import CROPS, load_square
from revq.cache.images import UnreadableImage, load_pixels
from revq.stages.evaluation.protocols import PROTOCOLS, is_imagenet_val, other_crops, rfid_label

Floats = NDArray[np.float64]


def box(x: Floats) -> Floats:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x: Floats) -> Floats:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))


def resample(picture: Floats, size: int, kernel: object, reach: float) -> Floats:
    """One axis (the first) to `size` by an antialiased filter, rounded to whole levels, as Pillow's description says."""
    length = picture.shape[0]
    scale = length / size
    wide = max(scale, 1.0)
    out = np.empty((size, *picture.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(0, int(centre - reach * wide + 0.5)), min(length, int(centre + reach * wide + 0.5))
        weights = kernel((np.arange(first, last) + 0.5 - centre) / wide)  # type: ignore[operator]
        out[i] = np.tensordot(weights / weights.sum(), picture[first:last], axes=1)
    return np.floor(out.clip(0, 255) + 0.5)


def resize(picture: Floats, width: int, height: int, kernel: object, reach: float) -> Floats:
    """Columns first, then rows."""
    columns = resample(picture.transpose(1, 0, 2), width, kernel, reach).transpose(1, 0, 2)
    return resample(columns, height, kernel, reach)


def adm_oracle(picture: NDArray[np.uint8], size: int) -> Floats:
    """ADM's crop, word by word: halve while the shorter side is at least twice the size, bicubic to it, cut the centre."""
    image = picture.astype(float)
    while min(image.shape[:2]) >= 2 * size:
        image = resize(image, image.shape[1] // 2, image.shape[0] // 2, box, 0.5)
    scale = size / min(image.shape[:2])
    image = resize(image, round(image.shape[1] * scale), round(image.shape[0] * scale), cubic, 2.0)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def encoded(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Size:
    """Width and height of an image, and the side that it is brought to."""

    id: str
    width: int
    height: int
    side: int


SIZES = [
    Size("halved twice", 301, 263, 64),
    Size("just twice the side", 128, 200, 64),
    Size("a pixel below twice the side", 127, 200, 64),
    Size("enlarged", 40, 57, 64),
    Size("the side itself", 64, 64, 64),
]


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
def test_the_adm_crop_equals_an_oracle_written_from_its_description(case: Size, imagenet_sample: Path) -> None:
    path = sorted((imagenet_sample / "val").rglob("*.JPEG"))[3]
    picture = np.asarray(Image.open(path).convert("RGB").resize((case.width, case.height)))
    ours = load_square(encoded(picture), case.side, crop="adm").pixels.transpose(1, 2, 0).astype(float)
    expected = adm_oracle(picture, case.side)
    assert ours.shape == (case.side, case.side, 3)
    assert np.abs(ours - expected).max() <= 1
    assert np.abs(ours - expected).mean() < 0.02


def test_the_revq_crop_is_that_of_every_other_stage_and_the_two_differ(imagenet_sample: Path) -> None:
    data = sorted((imagenet_sample / "val").rglob("*.JPEG"))[0].read_bytes()
    ours = load_square(data, 64, crop="revq")
    assert np.array_equal(ours.pixels, load_pixels(data, 64).array)
    assert np.abs(ours.pixels.astype(float) - load_square(data, 64, crop="adm").pixels).mean() > 1


@pytest.mark.parametrize("crop", CROPS)
def test_a_square_is_cut_from_the_region_alone_and_knows_its_shorter_side(crop: str) -> None:
    picture = np.zeros((50, 90, 3), dtype=np.uint8)
    picture[10:40, 20:60] = 200
    square = load_square(encoded(picture), 16, crop=crop, box=(20, 10, 60, 40))
    assert square.shorter_side == 30
    assert (square.pixels == 200).all()


def test_a_very_long_image_is_cropped_without_being_enlarged_whole() -> None:
    picture = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (2, 1, 3))
    ours = load_square(encoded(picture), 32, crop="adm").pixels
    expected = adm_oracle(picture, 32).transpose(2, 0, 1)
    assert np.abs(ours.astype(float) - expected).max() <= 2


@pytest.mark.parametrize("crop", CROPS)
def test_bytes_that_are_no_image_are_unreadable_under_either_crop(crop: str) -> None:
    for data in (b"", b"no picture", encoded(np.zeros((40, 40, 3), np.uint8))[:60]):
        with pytest.raises(UnreadableImage):
            load_square(data, 16, crop=crop)


def imagenet_val_keys(count: int = 50_000) -> list[str]:
    return [f"n01440764/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, count + 1)]


@dataclass(frozen=True)
class Names:
    """Names of images, and whether they are those of ImageNet's validation set."""

    id: str
    keys: list[str]
    expected: bool


NAMES = [
    Names("all of them", imagenet_val_keys(), True),
    Names("all of them with a class in the name", [key.replace(".JPEG", "_n01440764.JPEG") for key in imagenet_val_keys()], True),
    Names("one missing", imagenet_val_keys(49_999), False),
    Names("one twice", [*imagenet_val_keys(49_999), imagenet_val_keys(1)[0]], False),
    Names("one of another name", [*imagenet_val_keys(49_999), "n01440764/photo.JPEG"], False),
    Names("fifty thousand others", [f"{i}.png" for i in range(50_000)], False),
    Names("none", [], False),
]


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case.id)
def test_imagenet_val_is_known_by_its_names(case: Names) -> None:
    assert is_imagenet_val(case.keys) is case.expected


def test_a_distance_is_called_rfid_only_on_imagenet_val_with_the_published_weights() -> None:
    assert rfid_label(50_000, imagenet_val=True, published_weights=True) == "rFID"
    assert rfid_label(50_000, imagenet_val=True, published_weights=False) == "rFID@50000"
    assert rfid_label(50_000, imagenet_val=False, published_weights=True) == "rFID@50000"
    assert rfid_label(195, imagenet_val=False, published_weights=True) == "rFID@195"


def test_a_tokenizer_of_other_crops_is_told_and_one_of_the_same_is_not() -> None:
    config = {"resize_filter": "bilinear-antialias", "crop": "centre"}
    assert other_crops(PROTOCOLS["revq"], config) is None
    assert other_crops(PROTOCOLS["revq"], {}) is None
    assert "trained on other crops (bilinear-antialias, centre)" in (other_crops(PROTOCOLS["adm"], config) or "")


def test_a_protocol_tells_every_choice() -> None:
    for name, protocol in PROTOCOLS.items():
        told = protocol.describe()
        assert told["name"] == name
        assert {"resize", "antialias", "crop", "rounding", "reference", "inception_network", "inception_weights", "feature_precision"} <= set(told)
        assert "6726825d" in told["inception_weights"]
