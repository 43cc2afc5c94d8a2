"""Shards decoded by ourselves: the same bytes as zarr's own reading, the same refusals, in every layout and store."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from revq.cache.shards import ShardReader, all_finite
from revq.errors import StoreError

SHAPE = (3, 2, 4)
ROWS, CHUNK, SHARD = 53, 4, 12  # the last shard has one whole chunk and one row of another
CODECS = {
    "crc32c": [Crc32cCodec()],
    "zstd": [ZstdCodec(level=1), Crc32cCodec()],
    "blosc": [BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec()],
}
UNKNOWN = {"gzip": [GzipCodec(), Crc32cCodec()], "no checksum": [ZstdCodec(level=1)], "checksum inside": [Crc32cCodec(), ZstdCodec(level=1)]}


def make_array(store: LocalStore | MemoryStore, codecs: list, *, dtype: str = "float16", **options: object) -> tuple[zarr.Array, NDArray]:
    layout = {"chunks": (CHUNK, *SHAPE), "shards": (SHARD, *SHAPE), "fill_value": math.nan} | options
    array = zarr.create_array(store, name="split/latents", shape=(ROWS, *SHAPE), dtype=dtype, compressors=codecs, **layout)
    values = np.random.default_rng(0).normal(size=array.shape).astype(dtype)
    array[:] = values
    return array, values


def read(array: zarr.Array, rows: NDArray[np.int64]) -> NDArray:
    """Rows of any shards, ascending, through the reader."""
    reader = ShardReader(array, "train")
    out = np.empty((len(rows), *array.shape[1:]), array.dtype)
    shards = rows // reader.shard_rows
    for shard in np.unique(shards):
        block = np.empty((int((shards == shard).sum()), *array.shape[1:]), array.dtype)
        reader.read(rows[shards == shard], block)
        out[shards == shard] = block
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("store", ["local", "memory"])
@pytest.mark.parametrize("codecs", CODECS)
def test_a_known_layout_is_decoded_to_the_same_bytes_as_zarrs(tmp_path: Path, codecs: str, store: str, dtype: str) -> None:
    array, values = make_array(LocalStore(tmp_path) if store == "local" else MemoryStore(), CODECS[codecs], dtype=dtype)
    assert ShardReader(array, "train").fast
    everything = np.arange(ROWS)
    assert read(array, everything).tobytes() == values.tobytes() == np.asarray(array[:]).tobytes()
    for share in (0.9, 0.3, 0.02):
        rows = everything[np.random.default_rng(1).random(ROWS) < share]
        assert read(array, rows).tobytes() == values[rows].tobytes()


@pytest.mark.parametrize(
    ("codecs", "options"),
    [
        *((codecs, {}) for codecs in UNKNOWN.values()),
        (CODECS["zstd"], {"shards": None}),
        (CODECS["zstd"], {"chunks": (CHUNK, 3, 1, 4)}),
        (CODECS["zstd"], {"serializer": BytesCodec(endian="big")}),
    ],
    ids=[*UNKNOWN, "no shards", "cut rows", "big endian"],
)
def test_an_unknown_layout_is_left_to_zarr(codecs: list, options: dict) -> None:
    array, values = make_array(MemoryStore(), codecs, **options)
    assert not ShardReader(array, "train").fast
    np.testing.assert_array_equal(read(array, np.arange(ROWS)), values)


@pytest.mark.parametrize("codecs", CODECS)
def test_a_byte_flipped_anywhere_is_never_read_as_data(tmp_path: Path, codecs: str) -> None:
    array, _ = make_array(LocalStore(tmp_path), CODECS[codecs])
    file = tmp_path / "split/latents/c/1/0/0/0"
    whole = file.read_bytes()
    rows = np.arange(SHARD, 2 * SHARD)
    for offset in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=r'rows 12 to 23 of split "train" cannot be read'):
            read(array, rows)
    file.write_bytes(whole)
    read(array, rows)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize(
    "kept", [0, 10, 60, 0.5, -1], ids=["empty", "shorter than its index", "as long as its index", "half", "without its last byte"]
)
def test_a_truncated_shard_is_refused(tmp_path: Path, codecs: str, kept: float) -> None:
    array, _ = make_array(LocalStore(tmp_path), CODECS[codecs])
    file = tmp_path / "split/latents/c/4/0/0/0"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(StoreError, match=r"rows 48 to 52 .*cannot be read"):
        read(array, np.arange(48, ROWS))


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("store", ["local", "memory"])
def test_what_was_never_written_is_the_fill_value_as_in_zarr(tmp_path: Path, codecs: str, store: str) -> None:
    array, values = make_array(LocalStore(tmp_path) if store == "local" else MemoryStore(), CODECS[codecs], fill_value=7)
    array[4:8] = values[4:8] = 7  # a chunk in a shard
    array[24:36] = values[24:36] = 7  # a shard
    np.testing.assert_array_equal(read(array, np.arange(ROWS)), values)
    assert np.asarray(array[:]).tobytes() == values.tobytes()


def test_a_lost_shard_or_chunk_of_a_store_filled_with_nan_names_its_first_row(tmp_path: Path) -> None:
    array, _ = make_array(LocalStore(tmp_path), CODECS["zstd"])
    array[16:20] = math.nan
    with pytest.raises(StoreError, match=r"row 16 .*not finite in torch.float16"):
        read(array, np.arange(ROWS))
    read(array, np.array([12, 15, 20]))
    (tmp_path / "split/latents/c/1/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"row 13 .*not finite"):
        read(array, np.arange(13, ROWS))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused_only_where_its_row_is_asked_for(value: float) -> None:
    array, values = make_array(MemoryStore(), CODECS["crc32c"])
    values[30, 1, 1, 3] = value
    array[:] = values
    with pytest.raises(StoreError, match="row 30 "):
        read(array, np.arange(ROWS))
    rows = np.delete(np.arange(ROWS), 30)
    np.testing.assert_array_equal(read(array, rows), values[rows])


def test_every_float16_is_told_finite_or_not() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    assert [all_finite(every[index : index + 1]) for index in range(len(every))] == np.isfinite(every).tolist()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_float32_values_are_told_finite_or_not(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    assert all_finite(values) == bool(np.isfinite(values).all())
