"""Reading whole shards of a split's `latents` into memory that is there already.

zarr-python reads a shard through an event loop and fills the result with the fill value before it copies every chunk into it, which is ten
times slower than reading the file (docs/notes/store.md). Here a shard's index is parsed, and each chunk that is wanted goes straight to
where it belongs; its checksum and its values are looked at while they are in the processor's cache. Layouts that are not known here go the
plain zarr way, and a test compares the two.

A shard in Zarr v3: the encoded chunks one after another, then the index: for each chunk (offset, length) as little-endian uint64, both 2^64-1
for a chunk that was never written, and the crc32c of that. https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/

Shapes: N rows; C,H,W latent channels, rows, columns.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import google_crc32c
import numpy as np
import zarr
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore

from ..errors import StoreError

_MISSING = np.uint64(2**64 - 1)
_CRC_BYTES = 4
_DECODERS: dict[str, Any] = {"zstd": Zstd(), "blosc": Blosc()}  # what they decode says how it was encoded


@dataclass(frozen=True)
class _Layout:
    """What this module must know of an array to decode its shards itself."""

    chunk_rows: int
    chunks: int
    """Of a shard, those beyond the array's end included."""
    compressor: str | None
    """Name of the codec between the values and their checksum."""

    @property
    def index_bytes(self) -> int:
        return 16 * self.chunks + _CRC_BYTES


class _Source(Protocol):
    """The bytes of one shard."""

    size: int

    def read(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Fill the buffer with the bytes from `offset` on; raises ValueError where there are too few."""


class ShardReader:
    """Reads rows of an array of latents, shard by shard. Safe to call from several threads.

    Memory: beside the result two chunks for each thread, or a whole shard where the store is no local folder.
    """

    def __init__(self, array: zarr.Array, name: str) -> None:
        """`array` (N,C,H,W) of float16, float32 or float64; `name` is that of its split, for messages."""
        self.name = name
        self.dtype: np.dtype[Any] = array.dtype
        self.shard_rows = int((array.shards or array.chunks)[0])
        self._array = array
        self._layout = _known_layout(array)

    @property
    def fast(self) -> bool:
        """Whether the layout is known, so that zarr is not asked for the values."""
        return self._layout is not None

    def read(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill `out` (len(rows),C,H,W), C-contiguous and of the array's dtype, with these rows of one shard, ascending.

        Raises:
            StoreError: a chunk of them is damaged, or a value of them is not finite; it names the rows.
        """
        shard = int(rows[0]) // self.shard_rows
        assert out.flags.c_contiguous
        assert out.dtype == self.dtype
        assert int(rows[-1]) // self.shard_rows == shard
        try:
            if self._layout is None:
                start = int(rows[0])
                out[...] = np.asarray(self._array[start : int(rows[-1]) + 1])[rows - start]
                self._check_finite(out, rows)
            else:
                self._read_chunks(shard, self._layout, rows, out)
        except StoreError:
            raise
        except Exception as error:  # zarr raises ValueError, RuntimeError and its codecs' own for a chunk whose checksum does not fit
            first = shard * self.shard_rows
            last = min(first + self.shard_rows, self._array.shape[0]) - 1
            raise StoreError(f'rows {first} to {last} of split "{self.name}" cannot be read ({error}); encode it again with --overwrite') from error

    def not_finite(self, row: int, dtype: object) -> StoreError:
        """The error of a row that holds NaN or an infinity in `dtype`."""
        return StoreError(f'row {row} of split "{self.name}" is not finite in {dtype}; encode it again with --dtype float32 --overwrite')

    def _check_finite(self, values: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Raises StoreError that names the first of `rows` whose values are not finite."""
        if not all_finite(values):
            finite = np.isfinite(values).reshape(len(rows), -1).all(1)
            raise self.not_finite(int(rows[np.flatnonzero(~finite)[0]]), f"torch.{self.dtype}")

    def _read_chunks(self, shard: int, layout: _Layout, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        with self._open(shard) as source:
            if source is None:
                out[...] = self._array.fill_value
                self._check_finite(out, rows)
                return
            index = _read_index(source, layout)
            flat = out.reshape(len(rows), -1).view(np.uint8)
            within = rows - shard * self.shard_rows
            bounds = np.searchsorted(within, np.arange(layout.chunks + 1) * layout.chunk_rows)
            wanted = np.flatnonzero(np.diff(bounds))
            encoded = np.empty(_longest(index[wanted]) if layout.compressor else _CRC_BYTES, np.uint8)
            decoded = np.empty((layout.chunk_rows, flat.shape[1]) if len(wanted) * layout.chunk_rows > len(rows) else 0, np.uint8)
            for chunk in wanted.tolist():
                start, stop = int(bounds[chunk]), int(bounds[chunk + 1])
                if stop - start == layout.chunk_rows:
                    self._read_chunk(source, layout, index[chunk], encoded, flat[start:stop].reshape(-1))
                else:
                    self._read_chunk(source, layout, index[chunk], encoded, decoded.reshape(-1))
                    flat[start:stop] = decoded[within[start:stop] - chunk * layout.chunk_rows]
                self._check_finite(out[start:stop], rows[start:stop])

    def _read_chunk(self, source: _Source, layout: _Layout, place: NDArray[np.uint64], encoded: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Decode one chunk into `target`, which is as long as the whole chunk; `encoded` is room for what is read on the way."""
        if place[0] == place[1] == _MISSING:
            target.view(self.dtype)[...] = self._array.fill_value
            return
        offset, length = map(int, place)
        if layout.compressor is None:
            if length != len(target) + _CRC_BYTES:
                raise ValueError(f"a chunk has {length} bytes, not {len(target) + _CRC_BYTES}")
            source.read(offset, target)
            source.read(offset + len(target), encoded[:_CRC_BYTES])
            _check(target, encoded[:_CRC_BYTES])
        else:
            source.read(offset, encoded[:length])
            data, checksum = encoded[: length - _CRC_BYTES], encoded[length - _CRC_BYTES : length]
            _check(data, checksum)
            _DECODERS[layout.compressor].decode(data, out=target)

    @contextmanager
    def _open(self, shard: int) -> Iterator[_Source | None]:
        """The bytes of a shard; None where the store does not have it."""
        key = self._array.metadata.encode_chunk_key((shard,) + (0,) * (self._array.ndim - 1))
        path = f"{self._array.path}/{key}" if self._array.path else key
        if not isinstance(self._array.store, LocalStore):
            buffer = sync(self._array.store.get(path, prototype=default_buffer_prototype()))
            yield None if buffer is None else _Memory(np.asarray(buffer.as_numpy_array()).view(np.uint8))
            return
        file = self._array.store.root / path
        if not file.exists():
            yield None
            return
        with open(file, "rb", buffering=0) as opened:
            yield _File(opened)


class _File:
    """A shard in a local file: reads go straight into the buffers."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def read(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        self._file.seek(offset)
        done = 0
        while done < len(buffer):
            count = self._file.readinto(buffer[done:].data)
            if not count:
                raise ValueError(f"the shard ends at byte {self.size}, before byte {offset + len(buffer)}")
            done += count


class _Memory:
    """A shard that was fetched whole."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, buffer: NDArray[np.uint8]) -> None:
        if offset + len(buffer) > self.size:
            raise ValueError(f"the shard ends at byte {self.size}, before byte {offset + len(buffer)}")
        buffer[...] = self._data[offset : offset + len(buffer)]


def _read_index(source: _Source, layout: _Layout) -> NDArray[np.uint64]:
    """(chunks,2): offset and length of each chunk."""
    if source.size < layout.index_bytes:
        raise ValueError(f"a shard of {source.size} bytes is too short for its index of {layout.index_bytes}")
    data = np.empty(layout.index_bytes, np.uint8)
    source.read(source.size - layout.index_bytes, data)
    _check(data[:-_CRC_BYTES], data[-_CRC_BYTES:])
    return data[:-_CRC_BYTES].view("<u8").reshape(-1, 2)


def _longest(places: NDArray[np.uint64]) -> int:
    lengths = places[places[:, 1] != _MISSING, 1]
    return int(lengths.max()) if len(lengths) else 0


def _check(data: NDArray[np.uint8], checksum: NDArray[np.uint8]) -> None:
    computed = google_crc32c.value(data)
    if computed.to_bytes(_CRC_BYTES, "little") != checksum.tobytes():
        raise ValueError(f"the stored checksum is {checksum.tobytes()[::-1].hex()}, that of the bytes found is {computed:08x}")


def all_finite(values: NDArray[Any]) -> bool:
    """Whether no value (float16, float32 or float64) is NaN or infinite.

    Those are the values whose exponent bits are all set: the largest signed and unsigned integers with the same bits. Two integer maxima run at
    the speed of memory; `np.isfinite` on float16 is ten times slower, `torch.isfinite` ninety times (docs/notes/store.md).
    """
    bits = values.dtype.itemsize * 8
    infinity = int(np.array(np.inf, values.dtype).view(f"i{bits // 8}"))
    if values.size == 0:
        return True
    return int(values.view(f"i{bits // 8}").max()) < infinity and int(values.view(f"u{bits // 8}").max()) < infinity + (1 << (bits - 1))


def _known_layout(array: zarr.Array) -> _Layout | None:
    """None where a chunk is not a run of whole rows, or a codec is not one that we write."""
    metadata: Any = array.metadata.to_dict()
    codecs = metadata["codecs"]
    if array.shards is None or len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed" or array.dtype.str not in ("<f2", "<f4", "<f8"):
        return None
    sharding = codecs[0]["configuration"]
    serializer, *inner = sharding["codecs"]
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    names = [codec["name"] for codec in inner]
    known = (
        array.chunks[1:] == array.shards[1:] == array.shape[1:]
        and sharding["index_location"] == "end"
        and [serializer, *sharding["index_codecs"]] == [plain, plain, {"name": "crc32c"}]
        and names[-1:] == ["crc32c"]
        and (len(names) == 1 or (len(names) == 2 and names[0] in _DECODERS))
    )
    return _Layout(array.chunks[0], array.shards[0] // array.chunks[0], names[0] if len(names) == 2 else None) if known else None
