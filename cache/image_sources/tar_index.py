"""Where the members of a tar lie, found by reading its headers alone: 512 bytes of each member, its data are skipped.

Python's tarfile gives the same offsets at 0.4 of the speed (docs/notes/images.md), and takes a damaged header for the end of the archive.
Formats: ustar, GNU (long names, sizes past 8 GiB) and pax. Refused, with what and where: compressed archives, archives that are cut off or
damaged, sparse files, and what `cat` makes of several tars. A name is what unpacking makes of it: without "./" or "/" before it, and
without what is before a "..".
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

from ...errors import ImageError
from ..places import RandomFile

BLOCK = 512
_ZERO = bytes(BLOCK)
_LOCAL_STEP = 4096  # bytes read at once: a page costs no more than a header
_END_BYTES = 1 << 20  # of zeros behind a tar's end mark that are looked at: tar fills its last record of 10 KiB, or what --blocking-factor says
_REMOTE_STEP = 1 << 20  # a request takes about as long for 1 MiB as for 512 bytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
_REGULAR, _FOLDER, _LINKS, _NO_DATA = b"0\x007", b"5", b"12", b"123456"
_ABOUT_THE_NEXT = b"KLXgx"  # GNU's long link and name, Sun's and POSIX's records
_ODD = re.compile(rb"(?:^|/)\.{0,2}(?:/|$)")  # an empty part of a path, "." or ".."


class Member(NamedTuple):
    """One file, folder or link in a tar."""

    name: bytes
    offset: int
    """Of the data, in bytes from the start of the file; the header is the 512 bytes before."""
    size: int
    header_crc: int
    """CRC-32 of that header, so that a reader finds out when the archive is no longer the one that was listed."""
    kind: str
    """"file", "folder", "link" or "other"."""
    target: bytes = b""
    """Name of the member that a link stands for; empty where that is outside of the archive."""


class TarWalk:
    """Iterates over the members of one tar, which may itself lie inside a larger file."""

    def __init__(self, file: RandomFile, where: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing is read before the first step.

        Args:
            file: the open file.
            where: what errors call the archive.
            start: offset of the archive in the file, in bytes.
            stop: offset of its end; None means the file's end.
        """
        self._file, self.where, self._start = file, where, start
        self._stop = file.size if stop is None else stop
        self._step = _LOCAL_STEP if file.local else _REMOTE_STEP
        self._window, self._window_at = b"", 0
        self.rooted = False
        """Whether there was an entry for the root itself, as in a tar made of "."."""

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes of the archive; near the member that was last given, they are there already."""
        at = offset - self._window_at
        if at < 0 or at + count > len(self._window):
            self._window = self._file.read_at(offset, min(max(count, self._step), max(self._stop - offset, 0)))
            self._window_at, at = offset, 0
        return self._window[at : at + count]

    def __iter__(self) -> Iterator[Member]:
        """Raises ImageError, see the top of this file; and OSError."""
        position, long_name, long_link, pax = self._start, b"", b"", {}
        while True:
            header = self.read(position, BLOCK)
            if header == _ZERO:
                self._check_end(position)
                return
            self._check(header, position)
            kind, size, data = header[156:157], _number(header[124:136]), position + BLOCK
            if kind in _ABOUT_THE_NEXT and data + size <= self._stop:
                if kind == b"L":
                    long_name = self.read(data, size).rstrip(b"\0")
                elif kind == b"K":
                    long_link = self.read(data, size).rstrip(b"\0")
                elif kind in b"xX":
                    pax = _pax_records(self.read(data, size))
                position = data + _padded(size)
                continue
            name = pax.get(b"path") or long_name or _name(header)
            size = int(pax.get(b"size", size))
            shown = name.decode("utf-8", "backslashreplace")
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in pax):
                raise ImageError(f"{self.where} holds the sparse file {shown}, which cannot be read by offset; pack it again without --sparse")
            if kind in _NO_DATA:
                size = 0
            if data + size > self._stop:
                raise ImageError(f"{self.where} is cut off inside its member {shown} ({data + size - self._stop} bytes are missing); fetch it again")
            position = data + _padded(size)
            link = pax.get(b"linkpath") or long_link or header[157:257].partition(b"\0")[0]
            long_name, long_link, pax = b"", b"", {}
            clean = _clean(name)
            if clean:
                yield Member(clean, data, size, crc32(header), _kind_word(kind, name), _target(clean, kind, link))
            else:
                self.rooted = True

    def _check_end(self, position: int) -> None:
        """Raises ImageError where more tar follows: `cat a.tar b.tar` is no tar of both, and every program unpacks the first alone."""
        stop = min(self._stop, position + _END_BYTES)
        header = _ZERO
        while header == _ZERO and position < stop:
            header = self.read(position, BLOCK)
            position += BLOCK
        if header != _ZERO and len(header) == BLOCK and _checksum_holds(header):
            mend = "join tars with tar -Af, or give them one by one"
            raise ImageError(f"{self.where} holds another tar behind its end mark, at byte {position - BLOCK}, that unpacking would not find; {mend}")

    def _check(self, header: bytes, position: int) -> None:
        """Raises ImageError where `header` is none."""
        if len(header) == BLOCK and _checksum_holds(header):
            return
        if position == self._start:
            packed = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
            if packed:
                raise ImageError(compressed_message(self.where, packed))
            raise ImageError(f"{self.where} is no tar archive, or its first header is damaged")
        if len(header) < BLOCK:
            raise ImageError(f"{self.where} is cut off: it ends at byte {position + len(header)} without tar's end mark; fetch it again")
        raise ImageError(f"{self.where} is damaged: there is no tar header at byte {position}, where one must be; fetch it again")


def compressed_message(where: str, packer: str) -> str:
    """Says how to unpack it, where it is a local file and not in another archive."""
    plain = re.sub(r"(\.tar)?\.[^./]*$", "", where)
    command = f": {packer} -dc {shlex.quote(where)} > {shlex.quote(plain + ('-plain.tar' if plain + '.tar' == where else '.tar'))}"
    told = f"{where} is compressed ({packer}), so its images cannot be read one by one; unpack it to a plain .tar first"
    return told + command if os.path.isfile(where) else told


def _checksum_holds(header: bytes) -> bool:
    try:
        return int(header[148:156].strip(b"\0 ") or b"0", 8) == sum(header) - sum(header[148:156]) + 8 * 32
    except ValueError:
        return False


def _number(field: bytes) -> int:
    """A size: octal digits, or (GNU, past 8 GiB) a big-endian number marked by the highest bit. The checksum vouches for it."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << 95) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        return header[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _clean(name: bytes) -> bytes:
    if not _ODD.search(name):
        return name
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    while b".." in parts:
        del parts[: parts.index(b"..") + 1]
    return b"/".join(parts)


def _target(name: bytes, kind: bytes, link: bytes) -> bytes:
    """The member that a link names: a hard link by its name in the archive, a symbolic one from the folder that it lies in."""
    if kind != b"2":
        return _clean(link) if kind == b"1" else b""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return b"" if target.startswith((b"/", b"..")) else target


def _kind_word(kind: bytes, name: bytes) -> str:
    if kind in _REGULAR:
        return "folder" if name.endswith(b"/") else "file"  # before ustar, a folder was a file with a slash
    return "folder" if kind == _FOLDER else "link" if kind in _LINKS else "other"


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE\\n`, one after the other."""
    records: dict[bytes, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not int(length):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key] = value
        data = data[int(length) :]
    return records
