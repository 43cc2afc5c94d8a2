"""The pixel protocol: against torchvision, by properties, and on the odd files that folders hold."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from revq.cache import images as images_module
from revq.cache.images import Pixels, UnreadableImage, View, centre_crop, load_pixels, load_views, random_crop, read_ahead
from revq.cache.sources import open_source

sides = st.integers(1, 3000)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def test_real_photographs_give_the_very_pixels_of_torchvisions_resize_and_centre_crop(imagenet_sample: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    source = open_source(imagenet_sample / "val")
    for size in (64, 256):
        oracle = Compose([Resize(size), CenterCrop(size)])
        for index in range(0, 100, 9):
            data = source.read(index)
            expected = np.asarray(oracle(Image.open(io.BytesIO(data)).convert("RGB"))).transpose(2, 0, 1)
            np.testing.assert_array_equal(load_pixels(data, size).array, expected)


@given(sides, sides, st.integers(1, 512))
def test_the_crop_is_inside_the_resized_image_and_central_to_half_a_pixel(width: int, height: int, size: int) -> None:
    new_width, new_height, left, top = centre_crop(width, height, size)
    assert min(new_width, new_height) == size
    assert 0 <= left <= new_width - size
    assert 0 <= top <= new_height - size
    assert abs(2 * left - (new_width - size)) <= 1
    assert abs(2 * top - (new_height - size)) <= 1
    assert abs(max(new_width, new_height) - size * max(width, height) / min(width, height)) < 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 48), st.integers(0, 3))
def test_any_size_of_image_gives_a_full_square_whose_box_lies_in_the_image(width: int, height: int, size: int, number: int) -> None:
    pixels = load_pixels(encoded(Image.new("RGB", (width, height), (9, 8, 7))), size, view=View(1, 2, number))
    assert pixels.array.shape == (3, size, size)
    assert pixels.array.dtype == np.uint8
    assert np.unique(pixels.array.reshape(3, -1), axis=1).T.tolist() == [[9, 8, 7]]
    left, top, right, bottom = pixels.box
    assert (pixels.width, pixels.height) == (width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(sides, sides, st.integers(0, 2**32), st.integers(0, 2**31), st.integers(1, 100))
def test_a_random_view_is_a_square_of_half_to_all_of_the_largest_one(width: int, height: int, seed: int, image: int, number: int) -> None:
    view = View(seed, image, number)
    (left, top, right, bottom), flipped = random_crop(width, height, view)
    assert right - left == bottom - top
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    short = min(width, height)
    assert short * 0.5**0.5 - 1 <= right - left <= short
    assert random_crop(width, height, view) == ((left, top, right, bottom), flipped)


def test_random_views_cover_sizes_places_and_both_flips() -> None:
    drawn = [random_crop(500, 300, View(0, image, 1)) for image in range(400)]
    areas = [((box[2] - box[0]) / 300) ** 2 for box, _ in drawn]
    assert 0.45 < np.mean([flipped for _, flipped in drawn]) < 0.55
    assert abs(np.mean(areas) - 0.75) < 0.02
    assert min(box[0] for box, _ in drawn) < 5
    assert max(box[2] for box, _ in drawn) > 495
    assert len({random_crop(500, 300, View(seed, 3, number)) for seed in range(10) for number in range(1, 10)}) == 90


def test_a_random_crop_never_changes_from_one_version_to_the_next() -> None:
    assert random_crop(500, 375, View(7, 123, 2)) == ((104, 6, 440, 342), True)


def test_a_flipped_view_is_the_mirror_image_of_its_box() -> None:
    data = encoded(Image.fromarray(noise(80, 60)))
    view = next(View(0, image, 1) for image in range(50) if random_crop(80, 60, View(0, image, 1))[1])
    pixels = load_pixels(data, 16, view=view)
    straight = Image.fromarray(noise(80, 60)).crop(pixels.box).resize((16, 16), Image.Resampling.BILINEAR)
    assert pixels.flipped
    np.testing.assert_array_equal(pixels.array.transpose(1, 2, 0)[:, ::-1], np.asarray(straight))


def test_several_views_at_once_equal_each_alone() -> None:
    data = encoded(Image.fromarray(noise(90, 70)))
    views = [View(5, 3, number) for number in range(4)]
    for view, pixels in zip(views, load_views(data, 32, views), strict=True):
        alone = load_pixels(data, 32, view=view)
        np.testing.assert_array_equal(pixels.array, alone.array)
        assert (pixels.box, pixels.flipped) == (alone.box, alone.flipped)


def test_a_region_of_a_file_is_seen_as_an_image_of_its_own() -> None:
    whole = Image.fromarray(noise(200, 150))
    region = load_pixels(encoded(whole), 32, box=(40, 30, 140, 110))
    cut_out = load_pixels(encoded(whole.crop((40, 30, 140, 110))), 32)
    np.testing.assert_array_equal(region.array, cut_out.array)
    assert (region.width, region.height) == (100, 80)
    assert region.box == (50, 30, 130, 110)


def test_a_long_image_equals_the_plain_way_to_a_rounding() -> None:
    image = Image.fromarray(noise(450, 50))
    size = 24
    new_width, new_height, left, top = centre_crop(450, 50, size)
    plain = image.resize((new_width, new_height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    difference = load_pixels(encoded(image), size).array.transpose(1, 2, 0).astype(int) - np.asarray(plain)
    assert abs(difference).max() <= 1


def test_an_image_of_1_by_20000_pixels_is_never_scaled_up_whole_which_would_take_4_gigabytes() -> None:
    code = """
import io, resource
from PIL import Image
from revq.cache.images import load_pixels
file = io.BytesIO()
Image.new("RGB", (1, 20000), (1, 2, 3)).save(file, "PNG")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pixels = load_pixels(file.getvalue(), 256)
assert pixels.array.shape == (3, 256, 256) and pixels.height == 20000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # KiB


@dataclass(frozen=True)
class Kind:
    id: str
    make: Callable[[], bytes]
    rgb: tuple[int, int, int]


def animated(file_format: str = "GIF", **options: object) -> bytes:
    frames = [Image.new("RGB", (20, 20), color) for color in ((255, 0, 0), (0, 255, 0))]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)


def png(size: int, depth: int, color: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of kinds that Pillow does not write: `row` is every row's bytes, `chunks` come before the pixels."""
    header = struct.pack(">IIBBBBB", size, size, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress((b"\0" + row) * size)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)


def ycck() -> bytes:
    """A JPEG of cyan, magenta, yellow and black as Photoshop writes it: inverted, its first three channels as YCbCr."""
    y, cb, cr = Image.new("RGB", (20, 20), (0, 255, 255)).convert("YCbCr").split()  # the colour (0,255,255,0) in CMYK, which is red
    inverted = [Image.eval(band, lambda value: 255 - value) for band in (y, cb, cr)]
    data = encoded(Image.merge("CMYK", [*inverted, Image.new("L", (20, 20), 0)]), "JPEG", quality=100)
    at = data.index(b"Adobe") + 11
    return data[:at] + b"\x02" + data[at + 1 :]  # the marker's transform: YCCK


KINDS = [
    Kind("grey", lambda: encoded(Image.new("L", (20, 20), 77)), (77, 77, 77)),
    Kind("one-bit", lambda: encoded(Image.new("1", (20, 20), 1)), (255, 255, 255)),
    Kind("palette", lambda: encoded(Image.new("RGB", (20, 20), (255, 0, 0)).convert("P", palette=Image.Palette.WEB)), (255, 0, 0)),
    Kind("opaque", lambda: encoded(Image.new("RGBA", (20, 20), (10, 20, 30, 255))), (10, 20, 30)),
    Kind("transparent", lambda: encoded(Image.new("RGBA", (20, 20), (10, 20, 30, 0))), (255, 255, 255)),
    Kind("half", lambda: encoded(Image.new("LA", (20, 20), (0, 127))), (128, 128, 128)),
    Kind("transparent-colour", lambda: encoded(Image.new("RGB", (20, 20), (1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    Kind("16-bit", lambda: encoded(Image.fromarray(np.full((20, 20), 0x80FF, np.uint16))), (128, 128, 128)),
    Kind("cmyk", lambda: encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    Kind("16-bit-rgb", lambda: png(9, 16, 2, struct.pack(">HHH", 0xC8FF, 0x1E00, 0x3C80) * 9), (200, 30, 60)),
    Kind("16-bit-rgba", lambda: png(9, 16, 6, struct.pack(">HHHH", 0xC8FF, 0x1E00, 0x3C80, 0) * 9), (255, 255, 255)),
    Kind("palette-with-alpha", lambda: encoded(Image.new("RGB", (20, 20), (255, 0, 0)).quantize(4), transparency=bytes(4)), (255, 255, 255)),
    Kind("cmyk-jpeg-of-adobe", lambda: encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    Kind("ycck-jpeg", ycck, (255, 0, 0)),
    Kind("ycbcr-tiff", lambda: encoded(Image.new("RGB", (20, 20), (128, 128, 128)).convert("YCbCr"), "TIFF"), (128, 128, 128)),
    Kind("animated-gif", animated, (255, 0, 0)),
    Kind("animated-webp", lambda: animated("WEBP", lossless=True), (255, 0, 0)),
    Kind("animated-png", lambda: animated("PNG"), (255, 0, 0)),
    Kind("mpo", lambda: animated("MPO", quality=100), (254, 0, 0)),
    Kind("grey-jpeg-that-ends-in-grey", lambda: encoded(Image.new("L", (20, 20), 128), "JPEG"), (128, 128, 128)),
    Kind("jpeg-that-ends-in-grey", lambda: encoded(Image.new("RGB", (40, 40), (128, 128, 128)), "JPEG"), (128, 128, 128)),
    Kind("progressive-that-ends-in-grey", lambda: encoded(Image.new("RGB", (40, 40), (128,) * 3), "JPEG", progressive=True), (128, 128, 128)),
    Kind("png-with-broken-profile", lambda: png(9, 8, 0, b"\x07" * 9, (b"iCCP", b"a\0\0garbage")), (7, 7, 7)),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.id)
def test_every_kind_of_pixel_becomes_rgb_as_documented(kind: Kind) -> None:
    pixels = load_pixels(kind.make(), 8).array
    assert abs(pixels.astype(int) - np.array(kind.rgb)[:, None, None]).max() <= 1


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter for display
    image = Image.fromarray(noise(40, 20))
    rotated, plain = load_pixels(encoded(image, exif=exif), 16), load_pixels(encoded(image), 16)
    np.testing.assert_array_equal(rotated.array, plain.array)
    assert (rotated.width, rotated.height) == (40, 20)


def bomb() -> bytes:
    return encoded(Image.new("1", (20000, 20000)))


def warned_bomb() -> bytes:
    return encoded(Image.new("1", (10000, 10000)))


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")


@dataclass(frozen=True)
class Bad:
    id: str
    make: Callable[[], bytes]
    reason: str


def huge_header() -> bytes:
    small = png(9, 8, 0, b"\0" * 9)
    header = struct.pack(">II", 30000, 30000) + small[24:29]
    return small[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small[33:]


def with_bytes(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 20  # announces 65535 entries
PNG = encoded(Image.fromarray(noise(64, 64)))
FRAME = JPEG.index(b"\xff\xc0") + 5  # height and width in the frame header

BAD = [
    Bad("empty", lambda: b"", "empty"),
    Bad("text", lambda: b"this is no picture\n", "not a BMP, GIF, JPEG.*this is no p"),
    Bad("truncated-jpeg", lambda: JPEG[: len(JPEG) // 2], "truncated"),
    Bad("header-only", lambda: JPEG[:4], "not a BMP"),
    Bad("truncated-png", lambda: encoded(Image.fromarray(noise(64, 64)))[:2000], "truncated|Truncated"),
    Bad("float", lambda: encoded(Image.new("F", (9, 9)), "TIFF"), "mode F"),
    Bad("lab", lambda: encoded(Image.new("LAB", (9, 9)), "TIFF"), "mode LAB"),
    Bad("heic", lambda: b"\0\0\0\x18ftypheic" + bytes(90), "ftypheic"),
    Bad("postscript", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not a BMP"),
    Bad("truncated-progressive", lambda: encoded(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)[:-300], "truncated"),
    Bad("jpeg-with-an-early-end-mark", lambda: with_bytes(JPEG, len(JPEG) // 2, b"\xff\xd9"), "end before the picture"),
    Bad("jpeg-cut-and-mended", lambda: JPEG[: len(JPEG) // 2] + b"\xff\xd9", "end before the picture"),
    Bad("jpeg-cut-inside-a-pair-and-mended", lambda: JPEG[: JPEG.index(b"\xff\x00", len(JPEG) // 2) + 1] + b"\xff\xd9", "end before the picture"),
    Bad("jpeg-with-fewer-rows-than-it-says", lambda: with_bytes(JPEG, FRAME, b"\x01\xe0"), "end before the picture"),
    Bad("jpeg-huge-in-its-header-only", lambda: with_bytes(JPEG, FRAME, b"\xff\xf0\xff\xf0"), "pixels"),
    Bad("png-huge-in-its-header-only", lambda: huge_header(), "pixels"),
    Bad("png-with-a-flipped-bit", lambda: with_bytes(PNG, 3000, bytes([PNG[3000] ^ 1])), "checksum of its IDAT"),
    Bad("png-with-a-bomb-in-its-text", lambda: png(9, 8, 0, b"\0" * 9, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "too large"),
    Bad("bomb", bomb, "pixels"),
    Bad("bomb-that-pillow-only-warns-of", warned_bomb, "pixels"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_what_gives_no_picture_gives_a_reason_of_one_line_the_same_each_time(bad: Bad) -> None:
    data = bad.make()
    with pytest.raises(UnreadableImage, match=bad.reason) as caught:
        load_pixels(data, 16)
    with pytest.raises(UnreadableImage) as again:
        load_pixels(data, 16)
    assert "\n" not in caught.value.reason
    assert again.value.reason == caught.value.reason
    assert " at 0x" not in caught.value.reason


SOUND = [
    Bad("trailing-garbage", lambda: JPEG + b"garbage" * 100, ""),
    Bad("broken-exif", lambda: encoded(Image.fromarray(noise(64, 64)), "JPEG", exif=BROKEN_EXIF), ""),
    Bad("broken-profile", lambda: encoded(Image.fromarray(noise(64, 64)), "JPEG", icc_profile=b"nonsense" * 10), ""),
]


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.id)
def test_what_is_broken_beside_the_picture_does_not_matter_and_nothing_warns(case: Bad) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(load_pixels(case.make(), 16).array, load_pixels(JPEG, 16).array)
    assert caught == []


def test_a_bomb_is_refused_before_any_of_it_is_decoded() -> None:
    data = bomb()
    begun = time.perf_counter()
    with pytest.raises(UnreadableImage):
        load_pixels(data, 16)
    assert time.perf_counter() - begun < 0.1  # decoding its 400 million pixels takes seconds
    assert len(data) < 100_000


@pytest.fixture(scope="module")
def real_files(imagenet_sample: Path) -> dict[str, bytes]:
    """Two small real photographs, one of them as PNG too, and as progressive JPEG."""
    smallest = sorted((imagenet_sample / "val").rglob("*.JPEG"), key=lambda path: path.stat().st_size)[:2]
    image = Image.open(io.BytesIO(smallest[0].read_bytes())).convert("RGB").resize((90, 70))
    kinds = {"png": encoded(image), "progressive": encoded(image, "JPEG", progressive=True), "exif": encoded(image, "JPEG", exif=BROKEN_EXIF)}
    return {"jpeg": smallest[0].read_bytes(), "jpeg-2": smallest[1].read_bytes(), "palette": encoded(image.quantize(9), transparency=1), **kinds}


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_damaged_real_files_give_pixels_or_a_reason_and_never_anything_else(real_files: dict[str, bytes], data: st.DataObject) -> None:
    damaged = bytearray(real_files[data.draw(st.sampled_from(sorted(real_files)))])
    reach = data.draw(st.sampled_from([40, 700, len(damaged)]))  # headers are where it hurts most
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(reach, len(damaged)) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "remove"]))
        if change == "set":
            damaged[at] = data.draw(st.integers(0, 255))
        elif change == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=40))
        else:
            del damaged[at + 1 : None if change == "cut" else at + 9]
        damaged = damaged or bytearray(1)
    with contextlib.suppress(UnreadableImage):
        assert load_pixels(bytes(damaged), 16).array.shape == (3, 16, 16)


def test_no_real_photograph_is_taken_for_damaged_and_each_that_is_cut_and_mended_is_found(imagenet_sample: Path) -> None:
    found = 0
    for path in sorted((imagenet_sample / "val").rglob("*.JPEG"))[::7]:
        data = path.read_bytes()
        load_pixels(data, 32)
        with pytest.raises(UnreadableImage):
            load_pixels(data[: len(data) * 3 // 4] + b"\xff\xd9", 32)
        found += 1
    assert found == 15


def test_a_picture_too_large_is_refused_even_where_pillow_warns_in_vain() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnreadableImage, match=f"10000 x 10000 pixels are more than the {images_module.MAX_IMAGE_PIXELS}"):
            load_pixels(warned_bomb(), 16)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_read_ahead_keeps_the_order_for_any_number_of_workers(imagenet_sample: Path, workers: int) -> None:
    source = open_source(imagenet_sample / "val")

    def load(index: int) -> Pixels:
        return load_pixels(source.read(index), 32)

    results = list(read_ahead(load, range(12), workers=workers, ahead=5))
    for index, pixels in enumerate(results):
        np.testing.assert_array_equal(pixels.array, load(index).array)


def test_read_ahead_begins_no_more_than_asked_and_stops_when_closed() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item

    results = read_ahead(work, range(1000), workers=2, ahead=6)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(begun) <= 9
