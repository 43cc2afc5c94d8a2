"""Damage that Pillow does not report: it would give a picture that is partly grey or wrong.

- PNG: Pillow passes over the checksums of the pixel data. libpng and this project refuse a critical chunk whose checksum is wrong.
- JPEG: where the compressed data end too early but an end mark follows (a mended download, a transfer in text mode), libjpeg fills the rest
  with grey and only warns, which Pillow does not pass on. JPEG has no checksum: damaged bytes that still decode to the end are not found.
"""

from __future__ import annotations

import io
import random
import struct
from zlib import crc32

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
_MCU = 16  # px: the largest block that libjpeg fills at once
_GREY, _SLACK = 127.5, 2.5
_OTHER = bytes(random.Random(0).choices(range(255), k=4093))  # without 255, which begins a marker
_OTHER_BYTES = 1 << 26  # at most: enough for 16 million pixels whatever the code, and for more with most codes


def png_damage(data: bytes) -> str:
    """What is wrong with the checksums of a PNG's critical chunks; empty where nothing is, or it is no PNG."""
    if not data.startswith(_PNG):
        return ""
    position = len(_PNG)
    while position + 12 <= len(data):
        (size,), kind = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        end = position + 8 + size
        if kind[:1].isupper() and end + 4 <= len(data) and crc32(memoryview(data)[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return f"the checksum of its {kind.decode('ascii', 'backslashreplace')} chunk is wrong"
        if kind == b"IEND":
            return ""
        position = end + 4
    return ""  # cut off: Pillow finds that out where pixels are missing


def ends_in_filler(data: bytes, image: Image.Image) -> bool:
    """Whether the last block of a decoded JPEG is what libjpeg makes up where data are missing.

    That is plain grey, which may also be in the picture. To tell them apart, other data are put where the compressed data end: a picture
    that was whole stays the same, one that was not has the other data in place of the grey.
    """
    if not _is_grey(_last_block(image)):
        return False
    end = _end_of_first_scan(data)
    if end is None:
        return False
    other = _OTHER * (min(4 * image.width * image.height, _OTHER_BYTES) // len(_OTHER) + 1)
    with Image.open(io.BytesIO(data[:end] + other + data[end:]), formats=["JPEG"]) as padded:
        try:
            padded.load()
        except Exception:  # e.g. the other data are no valid code: then they were read, so that data were missing
            return True
        return _last_block(padded).tobytes() != _last_block(image).tobytes()


def _last_block(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop(((width - 1) // _MCU * _MCU, (height - 1) // _MCU * _MCU, width, height))


def _is_grey(block: Image.Image) -> bool:
    """The last pixel of the block: the others may be blended with their neighbours' colours."""
    pixel = block.getpixel((block.width - 1, block.height - 1))
    values = pixel if isinstance(pixel, tuple) else (pixel,)
    return all(value is not None and abs(value - _GREY) <= _SLACK for value in values[:3])


def _end_of_first_scan(data: bytes) -> int | None:
    """Offset of the marker after the first compressed data; None where the segments cannot be followed."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xDA:  # start of scan
            break
    else:
        return None
    while (position := data.find(b"\xff", position)) >= 0:
        after = position + 1
        while data[after : after + 1] == b"\xff":  # any number of them may stand before a marker
            after += 1
        if after == len(data):
            return None
        if data[after] not in {0x00, *range(0xD0, 0xD8)}:  # neither a stuffed byte nor a restart
            return position
        position = after + 1
    return None
